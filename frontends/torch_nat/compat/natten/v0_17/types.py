"""Type aliases."""

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
)
from torch_nat.compat.natten.v0_21.utils.tuples import create_causal_arg_from_bool, create_dim_from_int

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
    "NoneType",
    "create_causal_arg_from_bool",
    "create_dim_from_int",
]
