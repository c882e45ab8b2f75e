"""How the tiled backward (cuda_src/kernels/tiled_queries.cu, tiled_keys.cu) cuts a map; see common/tiled_boxes.cuh.

A `Geometry` says how, for one of its two passes: tiles of 16 own tokens in one plane, regions of tiles, one for each
warp, and the span of what a region sees, which comes through shared memory plane by plane. Pure integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations
from math import ceil, lcm, prod
from typing import Literal, NamedTuple

from natcore.planning.axis import Axis, intervals, up
from natcore.planning.plan import DeviceFacts
from natcore.planning.tiling import first_query
from natcore.problem import Problem
from natcore.views import ITEM_SIZES

Pass = Literal["queries", "keys"]
PASSES: tuple[Pass, ...] = ("queries", "keys")
TILES = ((4, 4), (2, 8), (1, 16))  # rows and columns of the 16 tokens of a tile
REGION_BYTES, TILE_BYTES = 96, 64  # REGION and TILE of common/tiled_boxes.cuh
LONG = 1 << 12  # positions of an axis whose tiles are all looked at; longer ones repeat themselves


def orders(rank: int) -> Iterator[tuple[int, int, int]]:
    """Ways to hand the problem's axes to the kernel; -1 stands for a missing one."""
    for order in permutations(range(rank)):
        yield (-1,) * (3 - rank) + order  # type: ignore[misc]
        if rank == 2:
            yield order[0], -1, order[1]


class Reach(NamedTuple):
    """What the tiles of an axis see."""

    box: int  # tokens of the longest box, in whole units
    least: int  # the least and greatest difference key - query within a box, units and all
    greatest: int
    span: int  # tokens of the longest span of a region, up to the end of its last unit
    units: float  # of a box, on average
    plain: float  # the share of tiles for which a table of differences says all
    spans: float  # tokens of a span, on average


def _shortened(axis: Axis, length: int, period: int) -> int:
    """A length whose tiles and regions see the same patterns."""
    period = lcm(period, axis.stride)
    least = LONG + 4 * (axis.kernel + axis.stride) + 2 * period
    return length if length <= least + period else least + (length - least) % period


@lru_cache(maxsize=4096)
def reach(axis: Axis, own_keys: bool, tile: int, region: int, unit: int) -> Reach:
    """Of tiles of so many tokens and regions of so many tiles; boxes are walked in units of so many tokens."""
    boxes, spans, least, greatest, box, span, plain = 0, 0, 0, 0, 0, 0, 0
    tiles = regions = 0
    for whole in axis.lengths:
        length = _shortened(axis, whole, tile * region)
        seen = intervals(axis, length)[own_keys]
        start = 0
        for number in range(ceil(length / tile)):
            first = first_query(length, tile, number)
            low, high = seen[first][0], seen[min(first + tile, length) - 1][1]
            if number % region == 0:
                start, regions = low, regions + 1
                last = min((number + region) * tile, length) - 1
                spans += seen[last][1] - low
            wide = up(high - low, unit)
            differences = (low - (first + tile - 1), low + wide - 1 - first)
            if own_keys:
                differences = -differences[1], -differences[0]
            least, greatest = min(least, differences[0]), max(greatest, differences[1])
            box, span = max(box, wide), max(span, low + wide - start)
            boxes, tiles, plain = boxes + wide // unit, tiles + 1, plain + _plain(axis, own_keys, first, tile, length)
    return Reach(box, least, greatest, span, boxes / tiles, plain / tiles, spans / regions)


def _plain(axis: Axis, own_keys: bool, first: int, tile: int, length: int) -> bool:
    """Tile::plain of common/tiled_boxes.cuh, on one axis."""
    last, kernel = first + tile - 1, axis.kernel
    if tile == 1:
        return True
    if axis.stride > 1 or last >= length:
        return False
    if own_keys:
        return last + kernel <= length if axis.causal else first >= kernel and last < length - kernel
    return axis.causal or (first >= kernel // 2 and last - kernel // 2 + kernel <= length)


def _pitch(head_dim: int, item_size: int) -> int:
    """Bytes of a vector, as struct Rows of common/shared_rows.cuh has them."""
    chunks = up(head_dim, 16) * item_size // 16
    return 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)


@dataclass(frozen=True)
class Geometry:
    """How a problem is cut; per-axis entries are in the kernel's order of axes."""

    problem: Problem
    of: Pass
    order: tuple[int, int, int]  # which axis of the problem is the kernel's; -1 = a missing one
    tile: tuple[int, int]  # rows and columns of own tokens
    region: tuple[int, int]  # tiles
    stages: int  # planes in shared memory
    blocks_per_sm: int

    @property
    def own_keys(self) -> bool:
        return self.of == "keys"

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        p, w = self.problem, self.problem.window
        first, second, third = (
            Axis(1, 1, 1, 1, False)
            if a < 0
            else Axis(p.spatial[a], w.kernel_size[a], w.stride[a], w.dilation[a], w.is_causal[a])
            for a in self.order
        )
        return first, second, third

    @property
    def ordering(self) -> int:
        """The number of the order among `orders`."""
        return list(orders(self.problem.window.rank)).index(self.order)

    @property
    def columns(self) -> int:
        """Of a tile."""
        return self.tile[1]

    @property
    def step_rows(self) -> int:
        return 2 if self.tile[0] > 1 else 1

    @cached_property
    def reaches(self) -> tuple[Reach, Reach, Reach]:
        planes, rows, columns = self.axes
        return (
            reach(planes, self.own_keys, 1, 1, 1),
            reach(rows, self.own_keys, self.tile[0], self.region[0], self.step_rows),
            reach(columns, self.own_keys, self.tile[1], self.region[1], 16 // self.step_rows),
        )

    @property
    def warps(self) -> int:
        return prod(self.region)

    @property
    def heads(self) -> int:
        """Of own tokens."""
        return self.problem.heads_kv if self.own_keys else self.problem.heads

    @property
    def seen_heads(self) -> int:
        """Heads of seen tokens for one of own ones."""
        return self.problem.heads // self.problem.heads_kv if self.own_keys else 1

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of shared memory."""
        _, rows, columns = self.reaches
        return rows.span + self.step_rows - 1, up(columns.span, 8)

    @property
    def lines(self) -> int:
        _, rows, columns = self.reaches
        return columns.box // 8 if self.step_rows == 2 else rows.box

    @property
    def steps(self) -> int:
        _, rows, columns = self.reaches
        return rows.box // 2 if self.step_rows == 2 else columns.box // 16

    @property
    def mean_steps(self) -> float:
        """Of a tile, on average, all planes and heads."""
        planes, rows, columns = self.reaches
        return planes.units * rows.units * columns.units * self.seen_heads

    @property
    def plain(self) -> float:
        """The share of tiles for which a table of differences says all."""
        return self.reaches[1].plain * self.reaches[2].plain

    @property
    def differences(self) -> tuple[int, ...]:
        return tuple(r.greatest - r.least + 1 for r in self.reaches)

    @property
    def table_row(self) -> int:
        """Floats from one row of the difference table to the next: rows of a tile's tokens miss each other's banks."""
        row = self.differences[2]
        return row if self.tile[1] == 16 else row + max(0, 10 - row % 32, (42 - row % 32) * (row % 32 > 22))

    @property
    def regions(self) -> tuple[int, int]:
        """Of the longest dilation group, on axes 1 and 2."""
        rows, columns = (
            ceil(axis.lengths[0] / (tile * region))
            for axis, tile, region in zip(self.axes[1:], self.tile, self.region, strict=True)
        )
        return rows, columns

    @property
    def items(self) -> int:
        return self.problem.batch * self.axes[0].lengths[0] * prod(self.regions) * prod(self.problem.window.dilation)

    def slices(self, facts: DeviceFacts) -> int:
        """Blocks that share a head's items: as many as are resident at once."""
        return max(1, min(facts.multiprocessors * self.blocks_per_sm // self.heads, self.items))

    @property
    def entries(self) -> int:
        """Of one head's bias."""
        return prod(2 * axis.kernel - 1 for axis in self.axes)

    @property
    def pitches(self) -> tuple[int, int]:
        p = self.problem
        return _pitch(p.head_dim, ITEM_SIZES[p.dtype]), _pitch(p.head_dim_v, ITEM_SIZES[p.dtype])

    @property
    def own_stages(self) -> int:
        """OWN_STAGES of common/tiled_boxes.cuh."""
        p = self.problem
        return 2 if p.dtype == "float32" and up(p.head_dim, 16) + up(p.head_dim_v, 16) > 64 else 1

    @property
    def biased(self) -> bool:
        return self.problem.rpb_dtype is not None

    @cached_property
    def shared_bytes(self) -> int:
        """SHARED_BYTES of common/tiled_boxes.cuh."""
        slots, pitches = prod(self.span), sum(self.pitches)
        total = self.stages * up(slots * (pitches + (8 if self.own_keys else 0)), 128)
        total += self.warps * self.own_stages * 16 * pitches
        table = self.differences[0] * self.differences[1] * self.table_row
        total = up(total + (2 * self.seen_heads if self.biased else 1) * table * 4, 16)
        if self.biased and not self.own_keys:
            total += self.warps * self.reaches[0].box * self.lines * (self.steps + 1) * 512
        return total + 3 * REGION_BYTES + self.warps * (2 * TILE_BYTES + 16) + 16

    @property
    def is_legal(self) -> bool:
        """Whether the kernel's own limits hold; shared memory is another matter."""
        counts = (*self.region, self.stages, self.blocks_per_sm)
        return (
            self.tile in TILES
            and min(counts) >= 1
            and self.stages <= 2
            and self.warps * self.blocks_per_sm <= 64
            and self.warps <= 32
            and self.items < 1 << 31
            and self.items * self.heads < 1 << 40
        )

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        per_axis: dict[str, tuple] = {
            **{
                n.upper(): tuple(int(getattr(x, n)) for x in self.axes)
                for n in ("kernel", "stride", "dilation", "causal")
            },
            "FIRST_DIFFERENCE": tuple(f"({r.least})" for r in self.reaches),
            "DIFFERENCES": self.differences,
        }
        defines = {f"{name}_{a}": value for name, values in per_axis.items() for a, value in enumerate(values)}
        for name, values in (("TILE", self.tile), ("REGION", self.region), ("SPAN", self.span)):
            defines |= {f"{name}_{a}": value for a, value in enumerate(values, 1)}
        defines |= {"OWN_KEYS": int(self.own_keys), "ELEMENT": p.dtype, "HEAD_DIM": p.head_dim}
        defines |= {"HEAD_DIM_V": p.head_dim_v, "HEADS_PER_KV": self.seen_heads, "STAGES": self.stages}
        defines |= {"BLOCKS_PER_SM": self.blocks_per_sm, "LINES": self.lines, "STEPS": self.steps}
        defines |= {"PLANES": self.reaches[0].box, "TABLE_ROW": self.table_row}
        if p.dtype == "float32":
            defines["FLOAT32"] = 1
        if p.rpb_dtype is not None:
            defines["RPB"] = p.rpb_dtype
        return tuple(sorted((name, str(value)) for name, value in defines.items()))
