"""The resident forward's own source, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import host
from tests.cases import Case, check_same_bits
from tests.host.cases import judge_of
from tests.test_host_marching import FACTS, OLDER
from tests.test_resident_forward import ABLE, BY_NAME, OPTIONS

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
STAGE = BY_NAME["stage"]
SMALL = replace(BY_NAME["kernel_is_extent"], heads=1, heads_kv=1)
ONE = replace(FACTS, multiprocessors=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_resident_forward")


judge = judge_of("forward", "resident_forward", FACTS)


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_cases(case: Case, folder: Path) -> None:
    few = {"batch": min(case.batch, 3)}
    if case.heads == case.heads_kv:
        few |= {"heads": min(case.heads, 2), "heads_kv": min(case.heads, 2)}
    judge(replace(case, **few), "float16", folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd_extents", "two maps"),
        ("unequal_head_dims", "no warps that only copy"),
        ("unequal_head_dims", "warps that only copy"),
        ("unequal_head_dims", "five maps"),
        ("kernel_is_extent", "two blocks"),
    ],
)
def test_other_launches(name: str, options: str, folder: Path) -> None:
    """Of several rounds."""
    judge(replace(BY_NAME[name], batch=7), "bfloat16", folder, OPTIONS[options], ONE)


@pytest.mark.parametrize("name", ["kernel_is_extent", "full_block"])
def test_rounds(name: str, folder: Path) -> None:
    """Blocks that take more maps than they have room for, with warps that copy and without."""
    judge(replace(BY_NAME[name], batch=7), "float16", folder, facts=ONE)


def test_without_lse(folder: Path) -> None:
    assert set(judge(SMALL, "float16", folder, absent=("lse",))) == {"out"}


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3])
@pytest.mark.parametrize("name", ["stage", "full_block"])
def test_any_order(name: str, order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    case = replace(BY_NAME[name], batch=6)
    first, again = judge(case, "float16", folder, facts=ONE), judge(case, "float16", folder, facts=ONE, order=order)
    check_same_bits(first, again)


def test_older_architecture(folder: Path) -> None:
    judge(SMALL, "bfloat16", folder, facts=OLDER)


# ---- that defects are noticed ----

KERNEL = "kernels/resident_forward.cu"
# Of which case, in which file, what becomes what, and in which order it shows.
DEFECTS = {
    "nobody waits for queries and keys": (
        "stage",
        KERNEL,
        "    mbarrier_wait(barriers.keys(turn.slot), turn.phase);\n",
        "",
        host.Order.LATE,
    ),
    "nobody waits for values": (
        "stage",
        KERNEL,
        "    mbarrier_wait(barriers.values(turn.slot), turn.phase);\n",
        "",
        host.Order.LATE,
    ),
    "maps are overwritten too soon": (
        "stage",
        KERNEL,
        "      if (SEPARATE && n >= STAGES) mbarrier_wait(barriers.free(turn.slot), turn.phase ^ 1);\n",
        "",
        host.Order.EAGER,
    ),
    "maps are overwritten too soon where all copy": (
        "full_block",
        KERNEL,
        "      mbarrier_wait(barriers.free(last.slot), last.phase);\n",
        "",
        2,
    ),
    "columns that the map lacks are not cleared": (
        "odd_extents",
        KERNEL,
        "  clear_missing(shared, share);\n",
        "",
        host.Order.LATE,
    ),
    "rows that a query does not see count": (
        "stage",
        "common/resident_band.cuh",
        "sees_row && columns.start",
        "columns.start",
        host.Order.LATE,
    ),
    "columns that a query does not see count": (
        "stage",
        "common/resident_band.cuh",
        "sees_row && columns.start <= column && column < columns.end",
        "sees_row",
        host.Order.LATE,
    ),
    "nobody waits for the first queries and keys": (
        "stage",
        KERNEL,
        "    if (entry == share.slice) mbarrier_wait(barriers.first_keys(), 0);\n",
        "",
        host.Order.LATE,
    ),
    "the last column of keys has no weight": (
        "odd_extents",
        KERNEL,
        "m16n8k8(o[c], p[0], p[1], value[c][0], o[c])",
        "m16n8k8(o[c], p[0], p[1], 0, o[c])",
        host.Order.LATE,
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    name, file, text, replacement, order = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=r"not finite|error|deadlock"):
        judge(replace(BY_NAME[name], batch=8), "float16", folder, facts=ONE, order=order, sources=sources)
