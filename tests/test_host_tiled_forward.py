"""The tiled forward's own sources, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from natcore.planning import Config, DeviceFacts
from tests import host
from tests.cases import Case, check_same_bits
from tests.host.cases import Arrays, run_and_check
from tests.test_fast_forward import ABLE, CONFIGS
from tests.test_host_marching import FACTS, OLDER

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
DTYPES = ("float16", "float32")
MAP = Case("map", (13, 17), 7, heads=2, heads_kv=2, batch=3, rpb="float32", head_dim=32, head_dim_v=32)
#: Head dimensions whose rows are chunks of every kind, and n8 tiles in groups of every kind.
ROWS = [Case(f"rows_{d}_{v}", (9, 10), 5, head_dim=d, head_dim_v=v) for d, v in ((24, 56), (40, 16), (64, 8), (16, 96))]
OWN = [MAP, *ROWS, Case("large", (18, 19), 13, heads=2, heads_kv=1, rpb="same", head_dim=16, head_dim_v=24)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_tiled_forward")


def judge(
    case: Case, dtype: str, folder: Path, config: Config | None = None, facts: DeviceFacts = FACTS, **how
) -> Arrays:
    """See `run_and_check`."""
    return run_and_check("forward", case, dtype, folder, config or Config("tiled"), facts, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*OWN, *(c for c in ABLE if c.batch)], ids=lambda case: case.name)
def test_cases(case: Case, dtype: str, folder: Path) -> None:
    judge(case, dtype, folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_other_geometries(name: str, dtype: str, folder: Path) -> None:
    judge(MAP, dtype, folder, CONFIGS[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [host.Order.EAGER, 2])
def test_any_order(order: int, dtype: str, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    first, again = (judge(MAP, dtype, folder, CONFIGS["rounds"], order=o) for o in (host.Order.LATE, order))
    check_same_bits(first, again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_older_architecture(dtype: str, folder: Path) -> None:
    judge(MAP, dtype, folder, facts=OLDER)


# ---- that defects are noticed ----

# Of which dtype, in which file what becomes what, and how it shows.
DEFECTS = {
    "two products of three": (
        "common/split.cuh",
        "a.high, b.low[0], b.low[1], small);",
        "a.high, 0u, 0u, small);",
        "out: error",
    ),
    "one sum of four lanes": (
        "common/tile_products_float32.cuh",
        "sum += __shfl_xor_sync(~0u, sum, 1);",
        ";",
        "error",
    ),
    "two keys changed for each other": (
        "common/tile_products_float32.cuh",
        "row[1] = row[0] + V_PITCH;",
        "row[1] = row[0];",
        "out: error",
    ),
    "nobody waits for copies": (
        "kernels/tiled_forward.cu",
        "      cp_async_wait<0>();\n    }",
        "    }",
        "error|finite",
    ),
    "a copy of nothing names a row of keys below the map": (
        "common/tile_copies.cuh",
        "base + (inside ? s.offset(x0, x1, 0) : 0);",
        "base + s.offset(x0, x1, 0);",
        "outside of all arrays",
    ),
    "a copy of nothing names a key beyond its row": (
        "common/tile_copies.cuh",
        "static_cast<long long>(x2 < rest ? x2 : 0) * s.step[2],",
        "static_cast<long long>(x2) * s.step[2],",
        "outside of all arrays",
    ),
    "a copy of nothing names a query below the map": (
        "common/tile_copies.cuh",
        "base + (present ? share.offset(s, i) : 0), present);",
        "base + share.offset(s, i), present);",
        "outside of all arrays",
    ),
}


EDGES = {  # maps whose last region or tile is not whole
    "a copy of nothing names a row of keys below the map": Case("axial", (9, 8), (1, 5)),
    "a copy of nothing names a key beyond its row": Case("line", (40,), 7, head_dim=16),
    "a copy of nothing names a query below the map": Case("few_columns", (5, 9), (5, 3)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    file, text, replacement, error = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(EDGES.get(defect, replace(MAP, batch=1)), "float32", folder, sources=sources)
