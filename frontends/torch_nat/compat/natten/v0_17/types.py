"""Type aliases."""

from torch import Tensor

from torch_nat.compat.natten.v0_21.types import (
    CausalArg1DType,
    CausalArg1DTypeOrDed,
    CausalArg2DType,
    CausalArg2DTypeOrDed,
    CausalArg3DType,
    CausalArg3DTypeOrDed,
    CausalArgType,
    Dimension1DType,
    Dimension1DTypeOrDed,
    Dimension2DType,
    Dimension2DTypeOrDed,
    Dimension3DType,
    Dimension3DTypeOrDed,
    DimensionType,
    NoneType,
    QKTileShapeType,
)
from torch_nat.compat.natten.v0_21.utils.tuples import create_causal_arg_from_bool, create_dim_from_int

FnaTileShapeType = FnaForwardConfigType = QKTileShapeType
FnaBackwardConfigType = (
    tuple[Dimension1DType, Dimension1DType, Dimension1DType, bool]
    | tuple[Dimension2DType, Dimension2DType, Dimension2DType, bool]
    | tuple[Dimension3DType, Dimension3DType, Dimension3DType, bool]
)
ListOrNestedTensor = list | Tensor

__all__ = [
    "CausalArg1DType",
    "CausalArg1DTypeOrDed",
    "CausalArg2DType",
    "CausalArg2DTypeOrDed",
    "CausalArg3DType",
    "CausalArg3DTypeOrDed",
    "CausalArgType",
    "Dimension1DType",
    "Dimension1DTypeOrDed",
    "Dimension2DType",
    "Dimension2DTypeOrDed",
    "Dimension3DType",
    "Dimension3DTypeOrDed",
    "DimensionType",
    "FnaBackwardConfigType",
    "FnaForwardConfigType",
    "FnaTileShapeType",
    "ListOrNestedTensor",
    "NoneType",
    "create_causal_arg_from_bool",
    "create_dim_from_int",
]
