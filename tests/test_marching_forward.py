"""The marching forward kernel against the reference, over the ugly cases and geometries of all shapes.

The geometry tests need no GPU. tests/test_fast_random.py has random problems and equal repeats.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from natcore.planning import Config, marching, plan_for, refusal
from natcore.planning.marching_cost import choose_geometry
from natcore.planning.marching_geometry import Geometry
from natcore.planning.plan import Launch
from tests.cases import WIDE, Case, fitting
from tests.test_fast_backward import DTYPES
from tests.test_fast_forward import ABLE, FACTS, LARGE, MORE, call_for, forward

OWN = [
    Case("ragged_dilation", (37, 50), (3, 4), dilation=(5, 3), rpb="float32", head_dim=8, head_dim_v=8),
    Case("dilated", (40, 41), 7, dilation=2, heads=2, heads_kv=2, batch=3, **WIDE),
    Case("kernel_3", (20, 19), 3, heads=2, heads_kv=2, head_dim=64, head_dim_v=64, rpb="same"),
    Case("kernel_6", (17, 18), 6, heads=3, heads_kv=3, **WIDE),
    Case("kernel_9", (20, 29), 9, heads=2, heads_kv=2, head_dim=24, head_dim_v=80, rpb="float32"),
    Case("kernel_11", (23, 29), 11, **WIDE),
    Case("kernel_15_by_7", (30, 29), (15, 7), head_dim=16, head_dim_v=16, rpb="float32"),
    Case("causal_strides", (20, 20), (7, 5), stride=(2, 3), is_causal=True, heads=2, heads_kv=2, **WIDE),
    Case("grouped", (18, 33), 7, heads=4, heads_kv=2, batch=2, **WIDE),
    Case("many_heads", (15, 14), 7, heads=8, heads_kv=8, batch=5, **WIDE),
    Case("one_row", (1, 40), (1, 7), **WIDE),
    Case("scale_tiny", (16, 16), 5, scale=1e-6, head_dim=8, head_dim_v=8, rpb="float32"),
]


def able(case: Case) -> bool:
    return bool(case.batch) and refusal(marching.CANDIDATE, call_for(case, "float16"), FACTS) is None


CASES = [case for case in ABLE + MORE + OWN if able(case)]
OPTIONS = {
    "a tile a block": {"heads": 1, "tiles": 1},
    "two tiles of two": {"heads": 1, "tiles": 2, "groups": 2, "band": 2},
    "single groups": {"heads": 1, "tiles": 2, "groups": 1},
    "one producer": {"heads": 1, "tiles": 3, "groups": 1, "producers": 1, "own_ring": 3},
    "long ring": {"heads": 1, "tiles": 1, "ring": 9},
    "two rows a band": {"band": 2},
    "tall blocks": {"band": 4, "block_rows": 16},
}


def configured(options: dict[str, int]) -> Config:
    return Config("marching", tuple(options.items()))


def fits(case: Case, options: dict[str, int]) -> bool:
    return choose_geometry(call_for(case, "float16").problem, FACTS, options) is not None


PAIRS = [(case, name) for case in CASES for name, options in OPTIONS.items() if fits(case, options)]


def launch_of(case: Case, options: dict[str, int]) -> tuple[Geometry, Launch]:
    call = call_for(case, "float16")
    geometry = choose_geometry(call.problem, FACTS, options)
    assert geometry is not None
    return geometry, plan_for(call, FACTS, configured(options)).launches[0]


def test_cases_are_many() -> None:
    """The kernel takes most two-dimensional cases, and each option set fits some."""
    assert len(CASES) >= 18 and {name for _, name in PAIRS} == set(OPTIONS)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["chosen", *OPTIONS])
@pytest.mark.parametrize("case", [*CASES, *(c for c in LARGE if able(c))], ids=lambda case: case.name)
def test_geometry_covers_every_window(case: Case, options: dict[str, int]) -> None:
    """Every query is stored once, by a tile whose blocks and ring of rows hold all of its keys."""
    if not fits(case, options):
        pytest.skip("the case does not fit the options")
    g, launch = launch_of(case, options)
    assert launch.shared_bytes == g.shared_bytes <= FACTS.shared_bytes_per_block
    for length in g.axes[1].lengths:
        stored = [q for number in range(g.strips) for q in stored_columns(g, length, number)]
        assert sorted(stored) == list(range(length))
    rows = g.axes[0]
    for length in rows.lengths:
        for first in range(0, length, g.band):
            start, end = rows.keys(first, length)[0], rows.keys(min(first + g.band, length) - 1, length)[1]
            assert end - start <= g.block_rows
            assert (end - 1 + g.shift) // g.band - (start + g.shift) // g.band + 1 < g.ring


def stored_columns(g: Geometry, length: int, number: int) -> list[int]:
    """The columns that a strip stores, their keys checked to lie in its blocks: struct Tile of the kernel."""
    tile, reach = g.groups * g.group_columns, g.reach
    left, width, columns = reach.left, reach.blocks * g.block_columns, []
    if number * g.strip >= length:
        return []
    start = min(number * g.strip, max(length - g.strip, 0))
    for t in range(g.tiles):
        x = start + min(t * tile, max(min(g.strip, length) - tile, 0))
        owned = number * g.strip if g.padded else t * tile
        columns += range(max(x, owned), min(x + tile, length))
        for first in range(x, x + tile, g.group_columns):
            block = first - left if g.groups > 1 else max(min(first - left, length - width), 0)
            assert not g.padded or 0 <= block - (start - left) <= reach.columns - width
            for q in range(first, min(first + g.group_columns, length)):
                keys = g.axes[1].keys(q, length)
                assert block <= keys[0] and keys[1] <= block + width
    return columns


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (Case("axis", (40,), 7), {}, "1-D"),
        (Case("narrow", (40, 7), 7), {}, "7 columns"),
        (Case("large", (60, 60), 29), {}, "29"),
        (Case("more", (40, 40), 7), {"extra": 2}, "additional keys"),
    ],
)
def test_refusals(case: Case, change: dict[str, int], reason: str) -> None:
    """What the kernel does not take, it says, with the numbers."""
    call = call_for(fitting(case), "float16")
    call = replace(call, problem=replace(call.problem, **change))
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call, FACTS, Config("marching"))


def test_a_ring_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="no geometry"):
        plan_for(call_for(CASES[0], "float16"), FACTS, configured({"tiles": 1, "heads": 1, "ring": 3}))


def test_blocks_take_whole_strips_where_they_can() -> None:
    """A block that starts in the middle of a strip loads the rows above once more."""
    case = Case("stage", (56, 56), 7, heads=2, heads_kv=2, batch=128, **WIDE)
    g, launch = launch_of(case, {"heads": 2, "tiles": 7})
    assert launch.grid == (128, 1, 1) and ceil(g.items / 128) == g.bands


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, dtype: str) -> None:
    forward(case, dtype, Config("marching"))


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_other_geometries(case: Case, name: str) -> None:
    forward(case, "float16", configured(OPTIONS[name]), seed=1)
