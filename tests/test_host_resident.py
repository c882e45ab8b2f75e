"""The resident backward's own source, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import host
from tests.cases import Case, check_same_bits
from tests.host.cases import judge_of
from tests.test_host_marching import FACTS, OLDER
from tests.test_resident import ABLE, BY_NAME, OPTIONS

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
STAGE = BY_NAME["stage"]
SMALL = replace(BY_NAME["kernel_is_extent"], heads=1, heads_kv=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_resident")


judge = judge_of("backward", "resident", FACTS)


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_cases(case: Case, folder: Path) -> None:
    few = {"batch": min(case.batch, 3), "heads": min(case.heads, 2), "heads_kv": min(case.heads_kv, 2)}
    judge(replace(case, **few), "float16", folder)


@pytest.mark.parametrize("options", OPTIONS)
def test_other_launches(options: str, folder: Path) -> None:
    judge(BY_NAME["unequal_head_dims"], "bfloat16", folder, OPTIONS[options])


def test_rounds(folder: Path) -> None:
    """Blocks that take several maps, and some that have none left."""
    judge(replace(SMALL, batch=5), "float16", folder, facts=replace(FACTS, multiprocessors=1))


@pytest.mark.parametrize("absent", [("d_lse",), ("dk",), ("dv", "drpb"), ("dq", "drpb"), ("dq", "dk", "dv")])
def test_what_may_be_absent(absent: tuple[str, ...], folder: Path) -> None:
    results = judge(SMALL, "float16", folder, absent=absent)
    assert set(results) == {"dq", "dk", "dv", "drpb"} - set(absent)


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3])
def test_any_order(order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    first, again = judge(STAGE, "float16", folder), judge(STAGE, "float16", folder, order=order)
    check_same_bits(first, again)


def test_older_architecture(folder: Path) -> None:
    judge(SMALL, "bfloat16", folder, facts=OLDER)


# ---- that defects are noticed ----

KERNEL = "kernels/resident_backward.cu"
# In which file what becomes what, and how it shows.
DEFECTS = {
    "nobody waits for a map": (KERNEL, "    cp_async_wait_all();\n", "", "not finite|error"),
    "units are read too soon": (KERNEL, "      __syncthreads();  // all units are there", "", "not finite|error"),
    "rows that a band does not see count": (
        KERNEL,
        "band < BANDS && 0 <= row && row < BLOCK_ROWS ?",
        "band < BANDS ?",
        "d[kv]: error|not finite",
    ),
    "columns are not masked": (KERNEL, "bits |= 1u <<", "bits |= 0u <<", "error"),
    "delta with the wrong sign": ("common/resident_weights.cuh", "[lane] -= delta;", "[lane] += delta;", "dq: error"),
    "half of the bands is left out of drpb": (
        KERNEL,
        "band < BANDS; band += 4",
        "band < BANDS; band += 8",
        "drpb: error",
    ),
    "a group more than there is": (
        "common/resident_keys.cuh",
        "slot + 2 <= count",
        "slot + 1 <= count",
        "d[kv]: error|not finite",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    file, text, replacement, error = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(STAGE, "float16", folder, order=host.Order.LATE, sources=sources)
