"""How the kernels of whole maps number tokens and share maps out (cuda_src/common/whole_map.cuh). Pure integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import ceil, prod

from natcore.planning.axis import Axis, defines_of
from natcore.planning.plan import DeviceFacts
from natcore.problem import Direction, Problem

MAX_TILES = 8  # of 8 tokens: 64 tokens
_SHAPES = tuple((a, b, c) for a, b, c in product((1, 2, 4, 8), repeat=3) if a * b * c == 8)
_RESERVED = 1 << 10  # bytes of shared memory that a block takes beside its own


@dataclass(frozen=True)
class Geometry:
    """Tiles of 8 tokens and how many warps, maps in shared memory and blocks there are; missing axes lead."""

    problem: Problem
    direction: Direction
    tile: tuple[int, int, int]
    warps: int
    heads: int  # of a block
    stages: int
    blocks_per_sm: int

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        return axes_of(self.problem)

    @property
    def tiles(self) -> tuple[int, int, int]:
        return tiles_of(self.axes, self.tile)

    @property
    def split(self) -> int:
        """Warps that share the queries of a map: the forward's, where there are more than two pairs of tiles."""
        return 2 if self.direction == "forward" and prod(self.tiles) > 4 and self.warps % (2 * self.heads) == 0 else 1

    @property
    def at_once(self) -> int:
        """Batch entries of a block."""
        return self.warps // (self.heads * self.split)

    @property
    def full(self) -> bool:
        """Whether all queries see all keys, and each axis is one tile or whole ones."""
        return _divide(self.axes, self.tile) and all(
            axis.lengths == (axis.kernel,) and not axis.causal for axis in self.axes
        )

    @property
    def entries(self) -> int:
        """Of a head's bias."""
        return prod(2 * axis.kernel - 1 for axis in self.axes)

    @property
    def groups(self) -> int:
        return prod(axis.dilation for axis in self.axes)

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold dK and dV of a map."""
        return ceil(prod(self.tiles) / 2) * (self.problem.head_dim + self.problem.head_dim_v) // 2

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        values: dict[str, object] = {
            "ELEMENT": p.dtype,
            "HEAD_DIM": p.head_dim,
            "HEAD_DIM_V": p.head_dim_v,
            "WARPS": self.warps,
            "HEADS": self.heads,
            "SPLIT": self.split,
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "FULL": int(self.full),
        }
        for a, (tile, tiles) in enumerate(zip(self.tile, self.tiles, strict=True)):
            values |= {f"TILE_{a}": tile, f"TILES_{a}": tiles}
        return defines_of(self.axes, p.rpb_dtype, values)

    # ---- shared memory, in bytes: as the kernels count it ----

    @property
    def scores_bytes(self) -> int:
        """struct Scores: bias by the distance of two tiles, and mask."""
        distances, tiles = prod(2 * n - 1 for n in self.tiles), prod(self.tiles)
        return 256 * self.heads * distances + 128 * (1 if self.full else tiles)

    @property
    def stage_bytes(self) -> int:
        """Of one map."""
        d, v = _pitch(self.problem.head_dim), _pitch(self.problem.head_dim_v)
        tiles = prod(self.tiles)
        tile_rows = self.axes[2].kernel if self.full and self.tile[2] == 8 and self.tiles[2] == 1 else 8
        rows = tile_rows * (tiles - 1) + 8
        if self.direction == "forward":  # of a team's
            d, v = (16 * (self.heads * x // 8 | 1) for x in (self.problem.head_dim, self.problem.head_dim_v))
            return _rounded(rows * (2 * d + v))
        return rows * (2 * d + 2 * v) + 64 * tiles

    @property
    def shared_bytes(self) -> int:
        if self.direction == "forward":
            slots = self.at_once * self.stages
            return _rounded(self.scores_bytes) + _rounded(16 * slots + 8) + slots * self.stage_bytes
        of_warp = self.stages * self.stage_bytes + 256 * prod(2 * n - 1 for n in self.tiles)
        return self.scores_bytes + self.warps * of_warp

    def fits(self, facts: DeviceFacts) -> bool:
        return self.blocks_per_sm * (self.shared_bytes + _RESERVED) <= facts.shared_bytes_per_block + _RESERVED

    # ---- blocks ----

    def slices(self, facts: DeviceFacts) -> int:
        """Of the batch, as equal as may be: blocks of a head and group."""
        p = self.problem
        slices = max(facts.multiprocessors * self.blocks_per_sm // (p.heads // self.heads * self.groups), 1)
        rounds = ceil(p.batch / (self.at_once * slices))
        return ceil(p.batch / (self.at_once * rounds))


@lru_cache(maxsize=4096)
def axes_of(problem: Problem) -> tuple[Axis, Axis, Axis]:
    w, missing = problem.window, 3 - problem.window.rank
    its = zip(problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True)
    return (*[Axis(1, 1, 1, 1, False)] * missing, *(Axis(*axis) for axis in its))  # type: ignore[return-value]


def tiles_of(axes: tuple[Axis, Axis, Axis], tile: tuple[int, int, int]) -> tuple[int, int, int]:
    a, b, c = (ceil(axis.lengths[0] / n) for axis, n in zip(axes, tile, strict=True))
    return a, b, c


def _divide(axes: tuple[Axis, Axis, Axis], tile: tuple[int, int, int]) -> bool:
    """Whether each axis is one tile or whole ones."""
    return all(axis.lengths[0] <= n or axis.lengths[0] % n == 0 for axis, n in zip(axes, tile, strict=True))


def _rounded(count: int) -> int:
    return -(-count // 128) * 128


def _pitch(head_dim: int) -> int:
    """Of struct Rows (common/shared_rows.cuh)."""
    chunks = head_dim // 8
    return 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)


@lru_cache(maxsize=4096)
def tile_for(problem: Problem) -> tuple[int, int, int] | None:
    """The shape of tiles of which the longest dilation group needs the fewest, or None beyond `MAX_TILES`."""
    axes = axes_of(problem)
    found = {tile: prod(tiles_of(axes, tile)) for tile in _SHAPES}
    best = min(_SHAPES, key=lambda tile: (found[tile], not _divide(axes, tile), -tile[2], -tile[1]))
    return best if found[best] <= MAX_TILES else None


def geometries(
    problem: Problem, direction: Direction, facts: DeviceFacts, options: Mapping[str, int]
) -> Iterator[Geometry]:
    """Those that fit a GPU and have the options, the preferred first."""
    tile = tile_for(problem)
    if tile is None:
        return
    launches = _forward_launches if direction == "forward" else _backward_launches
    for launch in launches(problem, tile, facts, options):
        values = {**dict(zip(("warps", "heads", "stages", "blocks_per_sm"), launch, strict=True)), **options}
        if min(values.values()) < 1 or values["warps"] % values["heads"] or problem.heads % values["heads"]:
            continue
        g = Geometry(problem, direction, tile, **values)
        if g.fits(facts):
            yield g


Tile = tuple[int, int, int]
Launches = Iterator[tuple[int, int, int, int]]  # warps, heads and stages of a block, blocks of a multiprocessor


def _forward_launches(problem: Problem, tile: Tile, facts: DeviceFacts, options: Mapping[str, int]) -> Launches:
    """One block of a multiprocessor: teams of 2 heads, or 3, as many as its registers allow, and two stages, but no
    more than it takes to have every multiprocessor at work."""
    grouped = problem.heads != problem.heads_kv
    heads = options.get("heads", 1 if grouped else next(n for n in (2, 3, 1) if problem.heads % n == 0))
    if heads < 1 or (grouped and heads > 1):  # a row of queries' heads has fewer of keys'
        return
    axes = axes_of(problem)
    split = 2 if prod(tiles_of(axes, tile)) > 4 else 1
    maps = problem.heads // heads * problem.batch * prod(axis.dilation for axis in axes)  # of teams
    each = ceil(maps / facts.multiprocessors)
    for teams in range(min(max(16 // (heads * split), 1), each), 0, -1):
        for stages in (2, 1) if each > teams else (1,):
            yield teams * heads * split, heads, stages, 1


def _backward_launches(problem: Problem, tile: Tile, facts: DeviceFacts, options: Mapping[str, int]) -> Launches:
    """As many warps as their registers allow, or shared memory."""
    for warps in (8, 4, 2, 1):
        yield warps, 2 if problem.heads % 2 == 0 and options.get("warps", warps) % 2 == 0 else 1, 1, 1


def choose_geometry(
    problem: Problem, direction: Direction, facts: DeviceFacts, options: Mapping[str, int]
) -> Geometry | None:
    return next(geometries(problem, direction, facts, options), None)
