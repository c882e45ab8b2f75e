"""The marching backward kernels against the reference, over the ugly cases and geometries of all shapes.

The geometry tests need no GPU. tests/test_fast_random.py has random problems and repeats of its own, and
tests/test_host_backward.py runs the kernels without a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest

from natcore.planning import Config, marching, plan_for, refusal
from natcore.planning.axis import intervals
from natcore.planning.marching_cost import choose_geometry
from natcore.planning.marching_geometry import Geometry, Pass
from natcore.planning.plan import DeviceFacts
from tests import host, test_fast_forward, test_marching_forward
from tests.cases import PLAIN, WIDE, Case, fitting, problem_for
from tests.test_fast_backward import ABLE, DTYPES, FACTS, MORE, Run, backward, call_for, of_passes

PASSES: tuple[Pass, ...] = ("queries", "keys")
OWN = [
    Case("several_strips", (12, 70), 7, heads=2, heads_kv=2, batch=2, packed=True, **WIDE),
    Case("many_strips", (9, 200), 7, **WIDE),
    Case("last_strip_moves_back", (12, 54), 7, **WIDE),
    Case("ragged_groups", (23, 75), (5, 7), dilation=(2, 4), heads=2, heads_kv=2, **WIDE),
    Case("half_tiles", (12, 28), 7, heads=2, heads_kv=2, **WIDE),
    Case("half_tiles_moved_back", (9, 60), 7, rpb="float32", **PLAIN),
    Case("kernel_is_extent", (9, 11), (9, 11), **WIDE),
    Case("kernel_is_columns", (14, 8), (5, 8), rpb="same", **PLAIN),
    Case("even_kernel", (13, 30), (6, 4), heads=2, heads_kv=2, rpb="same", head_dim=24, head_dim_v=40),
    Case("strides", (20, 43), (5, 6), stride=(2, 3), rpb="float32", **PLAIN),
    Case("blocked", (12, 36), 4, stride=4, **PLAIN),
    Case("causal", (17, 41), 7, is_causal=True, heads=2, heads_kv=2, **WIDE),
    Case("causal_columns", (12, 26), (7, 5), is_causal=(False, True), **WIDE),
    Case("causal_rows_strides", (21, 27), (7, 6), stride=(3, 2), dilation=(1, 2), is_causal=(True, False), **WIDE),
    Case("one_row", (1, 40), (1, 7), **WIDE),
    Case("one_column_kernel", (19, 24), (7, 1), rpb="float32", **PLAIN),
    Case("unequal_head_dims", (15, 22), 5, head_dim=8, head_dim_v=88, rpb="float32"),
    Case("long_head_dims", (15, 22), 7, head_dim=128, head_dim_v=64, rpb="float32"),
    Case("outliers", (16, 22), 5, outliers=True, **WIDE),
    Case("scale_zero", (11, 12), 7, scale=0.0, **WIDE),
    Case("scale_negative", (11, 12), 7, scale=-0.7, **WIDE),
]
UNEVEN = [case for case in OWN if case.name in ("last_strip_moves_back", "ragged_groups", "causal_rows_strides")]
LARGE = [case for case in test_fast_forward.LARGE if case.rank == 2]


def able(case: Case) -> bool:
    return refusal(marching.CANDIDATE, call_for(case), FACTS) is None


_DISTINCT = {case.name: case for case in [*ABLE, *MORE, *test_marching_forward.OWN, *OWN] if case.rank == 2}
CASES = [case for case in _DISTINCT.values() if able(case)]
OPTIONS = {
    "a tile a block": {"heads": 1, "tiles": 1},
    "two tiles of two": {"heads": 1, "tiles": 2, "groups": 2, "band": 2},
    "four tiles": {"heads": 1, "tiles": 4, "groups": 2, "band": 2},
    "two tiles": {"heads": 1, "tiles": 2, "groups": 1},
    "five tiles": {"heads": 1, "tiles": 5, "producers": 2},
    "six tiles": {"heads": 1, "tiles": 6, "producers": 1, "own_ring": 2},
    "one producer": {"heads": 1, "tiles": 3, "groups": 1, "producers": 1, "own_ring": 3},
    "long ring": {"heads": 1, "tiles": 1, "ring": 9},
    "two rows a band": {"band": 2},
    "eight rows a band": {"band": 8, "heads": 1},
    "tall blocks": {"band": 4, "block_rows": 16},
}


def geometry_for(case: Case, of: Pass, options: dict[str, int], facts: DeviceFacts = FACTS) -> Geometry | None:
    return choose_geometry(problem_for(case, "float16"), facts, options, of)


def configured(case: Case, options: dict[str, int], facts: DeviceFacts = FACTS) -> Config:
    """Each pass with the options, where they fit it."""
    return of_passes("marching", options, lambda of: geometry_for(case, of, options, facts) is not None)


PAIRS = [
    (case, name)
    for case in CASES
    for name, options in OPTIONS.items()
    if any(geometry_for(case, of, options) is not None for of in PASSES)
]


def test_cases_are_many() -> None:
    """The kernels take all cases of this file and most two-dimensional others; each option set fits both passes
    of some."""
    assert {case.name for case in OWN} <= {case.name for case in CASES} and len(CASES) >= 30
    for of, (name, options) in product(PASSES, OPTIONS.items()):
        assert any(geometry_for(case, of, options) for case in CASES), (of, name)


# ---- geometry ----


@dataclass(frozen=True)
class Tile:
    """struct Tile of common/strip_tile.cuh, in a strip (struct Run) that starts at column ``start``."""

    x: int
    owned: int
    end: int
    start: int
    kind: int
    block: int  # the first column of its blocks

    @property
    def stored(self) -> range:
        return range(max(self.x, self.owned), self.end)


def tiles_of(g: Geometry, length: int) -> Iterator[Tile]:
    """The tiles that exist in a dilation group of so many columns."""
    axis, reach, width = g.axes[1], g.reach, g.groups * g.group_columns
    regular = ((g.groups - 1) * (g.group_columns // g.block_columns) + reach.blocks) * g.block_columns
    left = axis.kernel - 1 if axis.causal else axis.kernel // 2
    for strip in range(g.strips if g.padded else 1):
        owned = strip * g.strip
        if owned >= length:
            continue
        start = min(owned, max(length - g.strip, 0))
        for number in range(g.tiles):
            x = start + min(number * width, max(min(g.strip, length) - width, 0))
            first = owned if g.padded else number * width
            if first >= length or x + width <= first:
                continue
            if g.own_keys:
                margin = 0 if axis.causal else axis.kernel
                begin = x - reach.left
                clamped = axis.stride > 1 or x < margin or x + width > length - margin
                clamped = clamped or begin < 0 or begin + regular > length
            else:
                clamped = axis.stride > 1 or x < left or x + width - 1 - left + axis.kernel > length
            end, others = x + width, max(first - x, 0) // g.group_columns
            kind = 0 if not clamped else 1 if not any(reach.kinds[2][-1]) or 2 * x + width <= length else 2
            if any(reach.kinds[3][0]) and others == g.groups - 1:
                kind, x = 3, x + others * g.group_columns
            begin = x - reach.left
            if g.own_keys and kind:
                begin = intervals(axis, length)[1][x][0]
                most = max(end for _, end in reach.kinds[kind]) * g.block_columns
                begin = begin if g.padded else min(begin, reach.columns - most)
            elif not g.own_keys and g.groups == 1:
                begin = max(min(begin, length - reach.blocks * g.block_columns), 0)
            yield Tile(x, first, end, start, kind, begin)


def check_columns(g: Geometry) -> None:
    """Every column is stored once, by a tile whose blocks hold all that it sees, in shared memory and in the table."""
    axis, reach, group, width = g.axes[1], g.reach, g.group_columns, g.groups * g.group_columns
    whole = reach.blocks * g.block_columns  # registers and the mask hold so many columns of a group
    plain = 0 if axis.causal else axis.kernel - 1 - axis.kernel // 2 if g.own_keys else axis.kernel // 2
    if axis.causal and not g.own_keys:
        plain = axis.kernel - 1
    for length in axis.lengths:
        seen, stored = intervals(axis, length)[g.own_keys], Counter()
        for tile in tiles_of(g, length):
            stored.update(tile.stored)
            assert tile.x >= 0 and tile.end <= length
            for n in range(g.groups if tile.kind < 3 else 1):
                x = tile.x + n * group
                first, end = (tile.block + i * g.block_columns for i in reach.kinds[tile.kind][n])
                assert g.own_keys or tile.block + n * group <= first < end <= tile.block + n * group + whole
                assert first <= seen[x][0] and seen[x + group - 1][1] <= end, (g, length, tile, n)
                origin = tile.start - reach.pad if g.padded else 0
                assert -reach.margin <= first - origin and end - origin <= reach.columns + reach.margin, (
                    g,
                    length,
                    tile,
                )
                assert reach.least <= first - (x + group - 1) and end - 1 - x <= reach.greatest, (g, length, tile)
            if not tile.kind:
                for x in range(tile.x, tile.x + width):
                    assert seen[x] == (x - plain, x - plain + axis.kernel), (g, length, tile)
        assert stored == Counter(range(length)), (g, length)


def check_rows(g: Geometry) -> None:
    """What a band sees fits into the ring, and into a row of blocks for queries; bands go down without a gap."""
    axis = g.axes[0]
    for length in axis.lengths:
        seen = intervals(axis, length)[g.own_keys]
        before = seen[0]
        for y in range(0, length, g.band):
            start, end = seen[y][0], seen[min(y + g.band, length) - 1][1]
            stages = (end - 1 + g.shift) // g.band - (start + g.shift) // g.band + 1
            assert stages <= g.ring and (g.own_keys or end - start <= g.block_rows), (g, length, y)
            assert before[0] <= start <= before[1] and before[1] <= end
            before = start, end


@pytest.mark.parametrize("of", PASSES)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["chosen", *OPTIONS])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_geometry_covers_every_pair(case: Case, options: dict[str, int], of: Pass) -> None:
    g = geometry_for(case, of, options)
    if g is None:
        pytest.skip("the case does not fit the options")
    assert g.of == of and g.is_legal and g.shared_bytes <= FACTS.shared_bytes_per_block
    assert all(getattr(g, name) == value for name, value in options.items())
    check_columns(g)
    check_rows(g)


@pytest.mark.parametrize("of", PASSES)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "causal"),
    [(7, 1, 1, False), (7, 1, 2, False), (7, 1, 1, True), (4, 1, 1, False), (6, 3, 1, False), (5, 2, 3, True)],
)
def test_geometry_covers_maps_of_every_width(of: Pass, kernel: int, stride: int, dilation: int, causal: bool) -> None:
    """Wherever the last strip ends, which lies over the one before it, tiles reach what they need."""
    legal = 0
    widths = range(8 * dilation, 75 * dilation, dilation)
    for width, tiles, groups, band in product(widths, range(1, 8), (1, 2), (2, 4)):
        case = Case("map", (9, width), (5, kernel), (1, stride), (1, dilation), (False, causal), **PLAIN)
        problem = problem_for(case, "float16")
        g = Geometry(problem, band, 8, groups, tiles, 1, 12, 1, 1, 1, of)
        if (tiles - 1) * g.strip // tiles < g.width and g.is_legal:
            legal += 1
            check_columns(g)
    assert legal >= 100


def test_the_kernels_count_their_shared_memory_alike(tmp_path: Path) -> None:
    """Geometry.shared_bytes is SHARED_BYTES of common/strips.cuh, for one geometry of each kind."""
    if host.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    found: dict[tuple, Geometry] = {}
    for case, options, of in product(CASES, ({}, OPTIONS["two tiles"], OPTIONS["tall blocks"]), PASSES):
        g = geometry_for(case, of, options)
        if g is not None:
            found.setdefault((of, g.padded, g.groups, g.block_rows, g.problem.rpb_dtype is None, g.steps), g)
    assert len(found) >= 20
    for g in list(found.values())[:24]:
        library = host.build("strips.cc", tmp_path, dict(g.defines))
        assert library.shared_bytes() == g.shared_bytes, g


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (Case("axis", (40,), 7), {}, "1-D"),
        (Case("narrow", (40, 7), 7), {}, "7 columns"),
        (Case("narrow_dilated", (40, 30), 7, dilation=(1, 4)), {}, "30 columns with dilation 4"),
        (Case("large", (40, 40), 13), {}, r"\(13, 13\)"),
        (Case("grouped", (40, 40), 7, heads=4, heads_kv=2), {}, "heads 4, heads_kv 2"),
        (Case("more", (40, 40), 7), {"extra": 2}, "additional keys"),
        (Case("wide", (40, 40), 7), {"head_dim": 136}, "head_dim 136"),
        (Case("odd", (40, 40), 7), {"head_dim_v": 12}, "head_dim_v 12"),
        (Case("single", (40, 40), 7), {"dtype": "float32"}, "float32"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_refusals(case: Case, change: dict, reason: str) -> None:
    """What the kernels do not take, they say, with the numbers."""
    call = call_for(fitting(case))
    call = replace(call, problem=replace(call.problem, **change))
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call, FACTS, Config("marching"))


@pytest.mark.parametrize(
    "options",
    [
        {"ring": 2}, {"keys_ring": 2}, {"tiles": 40}, {"keys_block_rows": 4}, {"groups": 5}, {"band": 1}, {"band": 16},
        {"keys_band": 3}, {"own_ring": 0}, {"producers": 0}, {"blocks_per_sm": 0}, {"tiles": 0},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_fit_are_an_error(options: dict[str, int]) -> None:
    of = "keys" if next(iter(options)).startswith("keys_") else "queries"
    with pytest.raises(ValueError, match=f"no geometry of {of}"):
        plan_for(call_for(CASES[0]), FACTS, Config("marching", tuple(options.items())))


def test_workspace_is_small() -> None:
    """At most one tensor of q's size plus 16 MiB: 8 bytes a query and head, and partial sums of drpb."""
    for spatial, heads in (((56, 56), 2), ((28, 28), 4), ((14, 14), 8)):
        case = Case("stage", spatial, 7, heads=heads, heads_kv=heads, batch=128, **WIDE)
        plan = plan_for(call_for(case), FACTS, Config("marching"))
        queries = 128 * spatial[0] * spatial[1] * heads
        assert 8 * queries <= plan.workspace_bytes <= 2 * 32 * queries + (16 << 20)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, dtype: str) -> None:
    backward(case, dtype, Config("marching"), saved_out=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim == c.head_dim_v][::3], ids=lambda case: case.name)
def test_otherwise_packed_and_without_d_lse(case: Case) -> None:
    """Separate operands where `test_cases` has packed ones, and the other way round."""
    backward(replace(case, packed=not case.packed), "float16", Config("marching"), with_d_lse=False, saved_out=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "name"), PAIRS[::3], ids=lambda value: getattr(value, "name", value))
def test_other_geometries(case: Case, name: str) -> None:
    backward(case, "bfloat16", configured(case, OPTIONS[name]), saved_out=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["several_strips", "ragged_groups", "causal_rows_strides"])
def test_bitwise_equal_over_1000_runs(name: str) -> None:
    Run(next(case for case in CASES if case.name == name), "bfloat16", Config("marching")).repeat(1000)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("extent", "kernel"), [(28, "marching"), (14, "resident"), (14, "tiled_backward"), (7, "whole")]
)
def test_later_passes_wait_for_earlier_ones(extent: int, kernel: str, captured: bool) -> None:
    """What passes leave for later ones, some of which start early, is NaN before each run; in a graph, too."""
    import torch

    case = Case("passes", (extent, extent), 7, heads=4, heads_kv=4, batch=8, **WIDE)
    run = Run(case, "float16", Config(kernel))
    run()
    run.check()
    again = None
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        again = graph.replay
    run.repeat(100, again)
