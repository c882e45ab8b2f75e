"""Type aliases, and the kernel schedules that `kernel_schedule` may name."""

from enum import Enum

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType

CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType

Dimension1DTypeOrDed = int | Dimension1DType
Dimension2DTypeOrDed = int | Dimension2DType
Dimension3DTypeOrDed = int | Dimension3DType
DimensionTypeOrDed = int | DimensionType

CausalArg1DTypeOrDed = bool | CausalArg1DType
CausalArg2DTypeOrDed = bool | CausalArg2DType
CausalArg3DTypeOrDed = bool | CausalArg3DType
CausalArgTypeOrDed = bool | CausalArgType

QKTileShapeType = (
    tuple[Dimension1DType, Dimension1DType]
    | tuple[Dimension2DType, Dimension2DType]
    | tuple[Dimension3DType, Dimension3DType]
)


class KernelSchedule(Enum):
    """Hopper kernel designs. They choose no result, so torch_nat only checks the name."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


FmhaForwardConfigType = tuple[int, int]

CutlassFnaForwardConfigType = QKTileShapeType
CutlassFnaBackwardConfigType = QKTileShapeType
CutlassBlackwellFnaForwardConfigType = QKTileShapeType
CutlassBlackwellFnaBackwardConfigType = QKTileShapeType
CutlassHopperFnaForwardConfigType = tuple[QKTileShapeType, KernelSchedule]
CutlassHopperFnaBackwardConfigType = QKTileShapeType
FlexFnaForwardConfigType = QKTileShapeType

CutlassFmhaForwardConfigType = FmhaForwardConfigType
CutlassFmhaBackwardConfigType = FmhaForwardConfigType
CutlassBlackwellFmhaForwardConfigType = FmhaForwardConfigType
CutlassBlackwellFmhaBackwardConfigType = FmhaForwardConfigType
CutlassHopperFmhaForwardConfigType = tuple[FmhaForwardConfigType, KernelSchedule]
CutlassHopperFmhaBackwardConfigType = FmhaForwardConfigType
FlexFmhaForwardConfigType = FmhaForwardConfigType
