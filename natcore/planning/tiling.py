"""How the tensor core kernels cut a map (cuda_src/common/tiles.cuh): tiles of 16 queries, regions, spans.

Pure integers. A `Geometry` fixes everything that is compiled into such a kernel: the halo of a tile, the
span of a region, the pitches in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import ceil, inf, prod

from natcore.planning.axis import Axis, altered
from natcore.problem import Problem
from natcore.views import ITEM_SIZES

TILE_QUERIES = 16
WHOLE_BLOCKS, CHUNK_BLOCKS = 16, 12  # the most n8 blocks of scores held at once: of a tile in one go, of a part
TILE_BYTES = 44  # struct Tile of common/tiles.cuh


def first_query(length: int, tile: int, number: int) -> int:
    return min(number * tile, max(length - tile, 0))


@lru_cache(maxsize=4096)
def _halo(axis: Axis, tile: int) -> tuple[int, int, int]:
    """Keys of the longest halo of a tile, and the least and greatest difference key - query in one."""
    ranges = []
    for length in axis.lengths:
        for number in axis.sample(length, tile):
            first = first_query(length, tile, number)
            last = min(first + tile, length) - 1
            ranges.append((length, first, axis.keys(first, length)[0], axis.keys(last, length)[1]))
    halo = max(end - start for _, _, start, end in ranges)
    starts = [(min(start, max(length - halo, 0)), first) for length, first, start, _ in ranges]
    low = min(start - first for start, first in starts) - (tile - 1)
    return halo, low, max(start - first for start, first in starts) + halo - 1


@lru_cache(maxsize=4096)
def _span(axis: Axis, tile: int, region: int) -> int:
    """Keys of the longest span of a region of so many tiles."""
    halo, longest = _halo(axis, tile)[0], 0
    for length in axis.lengths:

        def key(number: int, length: int = length) -> int:
            return min(axis.keys(first_query(length, tile, number), length)[0], max(length - halo, 0))

        count = ceil(length / tile)
        regions, ends = ceil(count / region), len(axis.sample(length, tile)) // region + axis.stride + 2
        for number in {*range(min(ends, regions)), *range(max(regions - ends, 0), regions)}:
            first = number * region
            longest = max(longest, key(min(first + region, count) - 1) + halo - key(first))
    return longest


def _congruent(least: int, residue: int) -> int:
    """The least number >= least that is congruent to residue modulo 8."""
    return least + (residue - least) % 8


def _chunk(blocks: int) -> int:
    """Blocks of scores held at once: all, or equal shares of whole mask words."""
    if blocks <= WHOLE_BLOCKS:
        return blocks
    return ceil(blocks / ceil(blocks / CHUNK_BLOCKS) / 4) * 4


def _pitch(row_bytes: int) -> int:
    chunks = row_bytes // 16
    return 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)


@lru_cache(maxsize=4096)
def _table(differences: tuple[int, ...], row_keys: int, tile: tuple[int, int, int]) -> tuple[int, int]:
    """Pitches of a row and of a copy of the difference table for which a warp's loads meet few bank conflicts.

    Lane l reads two neighbours (one, where rows are odd) for query l / 4 of the tile and a block's key
    2 (l % 4), in half-warps; blocks start anywhere in a row of keys.
    """
    rows, pairs = differences[0] * differences[1], row_keys % 2 == 0
    starts = sorted({8 * j % row_keys for j in range(row_keys)})[:5]

    def wavefronts(row: int, copy: int) -> int:
        total = 0
        for start, half in product(starts, (0, 1)):
            banks: dict[int, set[int]] = {}
            for lane in range(16 * half, 16 * half + 16):
                g, key = lane // 4, start + lane % 4 * 2
                query = g // (tile[1] * tile[2]) * row * differences[1] + g // tile[2] % tile[1] * row + g % tile[2]
                at = 64 * row + key // row_keys * row + key % row_keys - query
                at += at % 2 * (copy + 1) if pairs else 0
                for word in (at, at + 1) if pairs else (at,):
                    banks.setdefault(word % 32, set()).add(word)
            total += max(len(words) for words in banks.values())
        return total

    width = differences[2] + (differences[2] % 2 if pairs else 0)
    choices = [(row, rows * row + 2 + pad) for row in range(width, width + 9, 2) for pad in range(0, 32, 2)]
    choices = [(row, copy + copy % 2) for row, copy in choices]
    best, least = (inf, 0), choices[0]
    for choice in sorted(choices, key=lambda c: c[1]):
        count, copy = wavefronts(*choice), choice[1]
        best, least = min((best, least), ((count * (1 + copy / 1024), copy), choice), key=lambda found: found[0])
        if count == 2 * len(starts):  # no conflicts: longer copies are no better
            break
    return least


@dataclass(frozen=True)
class Geometry:
    """How a problem is cut; per-axis entries are in the kernel's order of axes."""

    problem: Problem
    order: tuple[int, ...]  # which axis of the problem is the kernel's; -1 = a missing one
    tile: tuple[int, int, int]  # queries
    region: tuple[int, int, int]  # tiles
    warps: int
    blocks_per_sm: int
    chunk: int
    stages: int  # spans in shared memory
    rounds: int  # batch entries of a block

    @classmethod
    def of(cls, problem: Problem, order: tuple[int, ...], tile: tuple[int, ...], region: tuple[int, ...]) -> Geometry:
        """With one warp, one block per multiprocessor and all scores at once, or in few equal chunks."""
        g = cls(problem, order, tile, region, 1, 1, 1, 1, 1)  # type: ignore[arg-type]
        return altered(g, chunk=_chunk(g.blocks))

    def with_launch(self, warps: int, blocks_per_sm: int, stages: int = 1, rounds: int = 1) -> Geometry:
        return altered(self, warps=warps, blocks_per_sm=blocks_per_sm, stages=stages, rounds=rounds)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        p, w = self.problem, self.problem.window
        return tuple(
            Axis(1, 1, 1, 1, False)
            if a < 0
            else Axis(p.spatial[a], w.kernel_size[a], w.stride[a], w.dilation[a], w.is_causal[a])
            for a in self.order
        )

    @cached_property
    def halos(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_halo(axis, tile) for axis, tile in zip(self.axes, self.tile, strict=True))

    @cached_property
    def halo(self) -> tuple[int, ...]:
        return tuple(halo for halo, _, _ in self.halos)

    @cached_property
    def span(self) -> tuple[int, ...]:
        return tuple(_span(*x) for x in zip(self.axes, self.tile, self.region, strict=True))

    @cached_property
    def regions(self) -> tuple[int, ...]:
        """Regions of the longest dilation group, per axis."""
        each = zip(self.axes, self.tile, self.region, strict=True)
        return tuple(ceil(axis.lengths[0] / (tile * region)) for axis, tile, region in each)

    @cached_property
    def blocks(self) -> int:
        """n8 blocks of scores of a tile."""
        return ceil(prod(self.halo) / 8)

    @cached_property
    def slot_row(self) -> int:
        """Slots from one row of the span to the next; numbers of keys and slots agree modulo 8."""
        return _congruent(self.span[2], self.halo[2])

    @cached_property
    def slot_plane(self) -> int:
        return _congruent(self.span[1] * self.slot_row, self.halo[1] * self.halo[2])

    @cached_property
    def slots(self) -> int:
        return (self.span[0] - 1) * self.slot_plane + (self.span[1] - 1) * self.slot_row + self.span[2]

    @cached_property
    def pitches(self) -> tuple[int, int]:
        """Bytes of a slot of keys and of values, as struct Rows of common/tiles.cuh has them."""
        p = self.problem
        return _pitch(p.head_dim * ITEM_SIZES[p.dtype]), _pitch(p.head_dim_v * ITEM_SIZES[p.dtype])

    @cached_property
    def differences(self) -> tuple[int, ...]:
        return tuple(high - low + 1 for _, low, high in self.halos)

    @cached_property
    def table(self) -> tuple[int, int]:
        """Floats of a row of the difference table, and from one copy of the table to the next."""
        return _table(self.differences, self.halo[2], self.tile)

    @property
    def shared_bytes(self) -> int:
        """Spans of K and V; two difference tables, twice each; a Tile for each tile; two tiles of Q for each warp."""
        shared = self.stages * self.slots * sum(self.pitches)
        tables = ceil((16 * self.table[1] + TILE_BYTES * prod(self.region)) / 128) * 128
        return shared + tables + self.warps * 2 * TILE_QUERIES * max(self.pitches)

    @property
    def kept(self) -> bool:
        """Whether bias and mask of a warp's one tile stay in registers from one batch entry to the next."""
        return self.rounds > 1 and self.warps == prod(self.region) and self.chunk >= self.blocks

    @property
    def splits(self) -> int:
        return ceil(self.problem.batch / self.rounds)

    @property
    def grid(self) -> int:
        return self.splits * self.problem.heads * prod(self.regions) * prod(self.problem.window.dilation)

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        per_axis: dict[str, tuple] = {
            **{
                n.upper(): tuple(int(getattr(x, n)) for x in self.axes)
                for n in ("kernel", "stride", "dilation", "causal")
            },
            "TILE": self.tile,
            "REGION": self.region,
            "HALO": self.halo,
            "SPAN": self.span,
            "FIRST_DIFFERENCE": tuple(low for _, low, _ in self.halos),
            "DIFFERENCES": self.differences,
        }
        defines = {f"{name}_{a}": value for name, values in per_axis.items() for a, value in enumerate(values)}
        defines |= {"ELEMENT": p.dtype, "HEAD_DIM": p.head_dim, "HEAD_DIM_V": p.head_dim_v}
        defines |= {"THREADS": 32 * self.warps, "BLOCKS_PER_SM": self.blocks_per_sm, "CHUNK": self.chunk}
        defines |= {
            "RANK": p.window.rank,
            "STAGES": self.stages,
            "KEPT": int(self.kept),
            "LOOPED": int(self.rounds > 1),
        }
        defines |= {"SLOT_ROW": self.slot_row, "SLOT_PLANE": self.slot_plane}
        defines |= {"TABLE_ROW": self.table[0], "TABLE_COPY": self.table[1]}
        if p.dtype == "float32":
            defines["FLOAT32"] = 1
        if p.rpb_dtype is not None:
            defines["RPB"] = p.rpb_dtype
        return tuple(sorted((name, str(value)) for name, value in defines.items()))
