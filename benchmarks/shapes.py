"""What is measured: the rows, the bytes they must move and the scores that a tile computes for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from math import prod

from natcore.problem import Direction, Problem, Window
from natcore.reference import neighborhood
from natcore.views import ITEM_SIZES

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One workload. ``heads_kv`` and ``head_dim_v`` default to q's; ``rpb`` adds a float32 bias table."""

    name: str
    group: str
    batch: int
    spatial: Axes
    heads: int
    head_dim: int
    kernel_size: int | Axes
    stride: int | Axes = 1
    dilation: int | Axes = 1
    is_causal: bool | tuple[bool, ...] = False
    heads_kv: int = 0
    head_dim_v: int = 0
    rpb: bool = True

    @property
    def rank(self) -> int:
        return len(self.spatial)

    @property
    def tokens(self) -> int:
        return prod(self.spatial)

    @property
    def window(self) -> Window:
        return Window.of(self.rank, self.kernel_size, self.stride, self.dilation, self.is_causal)

    def problem(self, dtype: str) -> Problem:
        return Problem(
            self.window,
            self.batch,
            self.spatial,
            self.heads,
            self.heads_kv or self.heads,
            self.head_dim,
            self.head_dim_v or self.head_dim,
            extra=0,
            dtype=dtype,
            rpb_dtype="float32" if self.rpb else None,
        )

    @property
    def can_pack(self) -> bool:
        """Whether q, k and v fit one [batch, *spatial, 3, heads, head_dim] tensor."""
        return self.heads_kv in (0, self.heads) and self.head_dim_v in (0, self.head_dim)

    @property
    def label(self) -> str:
        text = f"{'x'.join(map(str, self.spatial))} b{self.batch} h{self.heads}"
        text += f"/{self.heads_kv}" if self.heads_kv else ""
        text += f" d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        for letter, value in (("k", self.kernel_size), ("s", self.stride), ("dil", self.dilation)):
            if value != 1:
                text += f" {letter}{'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
        return text + (f" causal {self.is_causal}" if self.is_causal else "")


def floor_bytes(row: Row, dtype: str, backward: bool) -> int:
    """The fewest bytes that q's, k's, v's and out's size allow, each tensor moved once per direction.

    Forward: read q, k, v, write out (4 tensors). Backward: read q, k, v, d_out, write dq, dk, dv (7 more;
    a softmax's row sums can be formed without out). The LSE and the bias, a few per cent, are left out.
    """
    shapes = row.problem(dtype).shapes
    q, k, v, out = (ITEM_SIZES[dtype] * prod(shapes[name]) for name in ("q", "k", "v", "out"))
    forward = q + k + v + out
    return forward + (2 * (q + k + v) + out if backward else 0)


def direction_bytes(row: Row, dtype: str, direction: Direction) -> int:
    """`floor_bytes` of one direction by itself."""
    forward = floor_bytes(row, dtype, backward=False)
    return floor_bytes(row, dtype, backward=True) - forward if direction == "backward" else forward


def useful_scores(row: Row) -> int:
    """Query-key pairs inside the windows, over batch and heads."""
    pairs = [
        sum(end - start for start, end in _neighborhoods(row.window, extent, axis))
        for axis, extent in enumerate(row.spatial)
    ]
    return row.batch * row.heads * prod(pairs)


def computed_scores(row: Row, queries: int = 16) -> int:
    """Scores that the best tile of ``queries`` queries computes: every query of a tile against the tile's whole
    halo, padded to a multiple of 8 keys, overhanging queries included."""
    return row.batch * row.heads * min(_tiled_scores(row, tile) for tile in _tiles(row.rank, queries))


def _neighborhoods(window: Window, extent: int, axis: int) -> list[tuple[int, int]]:
    arguments = (window.kernel_size, window.stride, window.dilation, window.is_causal)
    return [neighborhood(i, extent, *(a[axis] for a in arguments)) for i in range(extent)]  # type: ignore[arg-type]


def _tiles(rank: int, queries: int) -> list[Axes]:
    powers = [1 << i for i in range(queries.bit_length())]
    return [tile for tile in product(powers, repeat=rank) if prod(tile) == queries]


def _halos(window: Window, extent: int, axis: int, width: int) -> Counter[int]:
    """How many tiles of ``width`` queries along one axis (within dilation groups) see a halo of each size."""
    spans, dilation = _neighborhoods(window, extent, axis), window.dilation[axis]
    counts: Counter[int] = Counter()
    for group in range(dilation):
        members = spans[group::dilation]
        for start in range(0, len(members), width):
            tile = members[start : start + width]
            counts[max(end for _, end in tile) - min(begin for begin, _ in tile)] += 1
    return counts


def _tiled_scores(row: Row, tile: Axes) -> int:
    halos = [_halos(row.window, extent, axis, tile[axis]) for axis, extent in enumerate(row.spatial)]
    total = 0
    for combination in product(*(counts.items() for counts in halos)):
        keys = prod(size for size, _ in combination)
        total += prod(count for _, count in combination) * (-(-keys // 8) * 8)
    return total * prod(tile)


def predicted_ms(row: Row, dtype: str, bandwidth: float, rate: float, direction: Direction = "forward") -> float:
    """One direction by max(bytes / bandwidth, computed scores * head_dim / rate), the direction's rate being
    fitted on other rows."""
    return 1e3 * max(direction_bytes(row, dtype, direction) / bandwidth, _work(row) / rate)


def fitted_rate(row: Row, ms: float) -> float:
    """The rate, in scores times head_dim per second, at which ``row`` ran in ``ms``."""
    return _work(row) / (ms / 1e3)


def _work(row: Row) -> float:
    """Computed scores times head_dim (the mean of q's and v's)."""
    return computed_scores(row) * (row.head_dim + (row.head_dim_v or row.head_dim)) / 2


#: NAT's own windows: the four stages of NAT-Tiny, and a segmentation map.
NAT = [
    Row("56x56", "nat", 128, (56, 56), 2, 32, 7),
    Row("28x28", "nat", 128, (28, 28), 4, 32, 7),
    Row("14x14", "nat", 128, (14, 14), 8, 32, 7),
    Row("7x7", "nat", 128, (7, 7), 16, 32, 7),
    Row("128x512", "nat", 8, (128, 512), 2, 32, 7),
]

#: Large windows, bound by arithmetic; no bias, as the peers have none there.
LARGE = [
    Row("2d-k33", "large", 4, (128, 128), 8, 64, 33, rpb=False),
    Row("1d-k1025", "large", 4, (16384,), 16, 64, 1025, rpb=False),
    Row("2d-k80", "large", 1, (256, 256), 24, 128, 80, rpb=False),
    Row("3d-k18x24x24", "large", 1, (30, 48, 80), 24, 128, (18, 24, 24), rpb=False),
]


def _sweep() -> list[Row]:
    def row(name: str, batch: int, spatial: Axes, heads: int, head_dim: int, kernel: int | Axes, **more) -> Row:
        return Row(name, "sweep", batch, spatial, heads, head_dim, kernel, **more)

    base = (32, (56, 56), 4)
    return [
        *(row(f"kernel-{k}", *base, 32, k) for k in (3, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15)),
        *(row(f"head_dim-{d}", *base, d, 7) for d in (16, 24, 32, 48, 64, 80, 96, 128)),
        *(row(f"head_dim-{d}-v{e}", *base, d, 7, head_dim_v=e) for d, e in ((32, 64), (64, 32))),
        *(row(f"dilation-{d}", *base, 32, 7, dilation=d) for d in (2, 4, 8)),
        row("dilation-14x14", 128, (14, 14), 8, 32, 7, dilation=2),
        *(row(f"stride-{s}", *base, 32, 7, stride=s) for s in (2, 3, 7)),
        row("causal", *base, 32, 7, is_causal=True),
        row("causal-rows", *base, 32, 7, is_causal=(True, False)),
        *(row(f"rectangular-{a}x{b}", *base, 32, (a, b)) for a, b in ((3, 13), (13, 3), (5, 9), (1, 7))),
        *(row(f"1d-k{k}", 16, (8192,), 4, 64, k) for k in (7, 31, 63, 127)),
        row("1d-k127-causal", 16, (8192,), 4, 64, 127, is_causal=True),
        *(row(f"3d-{'x'.join(map(str, k))}", 2, (16, 56, 56), 4, 64, k) for k in ((3, 7, 7), (3, 5, 5), (5, 5, 5))),
        row("batch-1", 1, (56, 56), 2, 32, 7),
        row("map-512x512", 1, (512, 512), 4, 32, 7),
        row("map-57x61", 32, (57, 61), 4, 32, 7),
        row("gqa", 32, (56, 56), 8, 32, 7, heads_kv=2),
        row("no-bias", *base, 32, 7, rpb=False),
    ]


SWEEP = _sweep()
ROWS = {row.name: row for row in (*NAT, *LARGE, *SWEEP)}


def select(names: list[str]) -> list[Row]:
    """Rows by name or by group ("nat", "large", "sweep", "all"), each once. ValueError for an unknown name."""
    chosen: dict[str, Row] = {}
    for name in names:
        found = {r.name: r for r in ROWS.values() if name in ("all", r.group, r.name)}
        if not found:
            raise ValueError(f"no row or group {name!r}; groups: all, nat, large, sweep; rows: {', '.join(ROWS)}.")
        chosen |= found
    return list(chosen.values())
