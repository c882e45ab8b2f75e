"""The rolling backward's own source, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from natcore.planning import Config
from tests import host
from tests.cases import WIDE, Case, check_same_bits
from tests.host.cases import check_images_apart, judge_of
from tests.test_host_marching import FACTS, OLDER
from tests.test_rolling import ABLE, BY_NAME, OPTIONS

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
BLOCK = Case("block", (11, 17), 7, batch=3, **WIDE)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_rolling")


judge = judge_of("backward", "rolling", FACTS)


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_cases(case: Case, folder: Path) -> None:
    few = {"batch": min(case.batch, 3), "heads": min(case.heads, 2), "heads_kv": min(case.heads_kv, 2)}
    judge(replace(case, **few), "float16", folder)


@pytest.mark.parametrize("options", OPTIONS)
def test_other_launches(options: str, folder: Path) -> None:
    judge(BY_NAME["unequal_head_dims"], "bfloat16", folder, OPTIONS[options])


@pytest.mark.parametrize("rows", [7, 8, 9, 10, 13])
def test_rounds(rows: int, folder: Path) -> None:
    """Blocks that take several maps: rows of the next one have the slots of this one's, from wherever it ends on."""
    judge(replace(BLOCK, spatial=(rows, 18), batch=5), "float16", folder, facts=replace(FACTS, multiprocessors=1))


@pytest.mark.parametrize("absent", [("d_lse",), ("dk",), ("dv", "drpb"), ("dq", "drpb"), ("dq", "dk", "dv")])
def test_what_may_be_absent(absent: tuple[str, ...], folder: Path) -> None:
    results = judge(BLOCK, "float16", folder, absent=absent)
    assert set(results) == {"dq", "dk", "dv", "drpb"} - set(absent)


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3, 4])
def test_any_order(order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    first, again = judge(BLOCK, "float16", folder), judge(BLOCK, "float16", folder, order=order)
    check_same_bits(first, again)


def test_older_architecture(folder: Path) -> None:
    judge(replace(BLOCK, batch=2), "bfloat16", folder, facts=OLDER)


@pytest.mark.parametrize("name", ["nine_rows", "eight_rows", "ragged_groups"])
def test_what_is_not_a_number_stays_in_its_image(name: str, folder: Path) -> None:
    """Blocks take one image after the other."""
    case = replace(BY_NAME[name], batch=4, heads=1, heads_kv=1)
    check_images_apart("backward", case, folder, Config("rolling"), replace(FACTS, multiprocessors=1))


# ---- that defects are noticed ----

KERNEL, HEADER, KEYS = "kernels/rolling_backward.cu", "common/rolling.cuh", "common/rolling_keys.cuh"
COPIES, SCALARS = "common/rolling_copies.cuh", "common/rolling_scalars.cuh"
# In which file what becomes what, and how it shows.
DEFECTS = {
    "nobody waits for the first copies": (
        COPIES,
        "  cp_async_wait<AHEAD - 2>();\n  step",
        "  step",
        "not finite|error",
    ),
    "nobody waits for copies": (COPIES, "    cp_async_wait<AHEAD - 2>();\n    step", "    step", "not finite|error"),
    "dS is read too soon": (KERNEL, "        step.wait(number + 2);\n", "", "not finite|error"),
    "dS is not announced": (KEYS, "    if (is_last) step.arrive(lane);", "", "deadlock"),
    "copies do not wait": (COPIES, "    step.wait(number + 1);\n", "", "deadlock|not finite|error"),
    "a short ring of queries": (HEADER, "OWN_RING = AHEAD + 2", "OWN_RING = AHEAD", "not finite|error"),
    "rows that a band does not see count": (KERNEL, "(sees ? its : ", "(true ? its : ", "error|not finite"),
    "columns are not masked": (KERNEL, "&& seen.start <= column && column < seen.end) {", ") {", "error|not finite"),
    "slots are not cleared": (KEYS, "dv[c][2 * h] = dv[c][2 * h + 1] =", "", "dv: error"),
    "sums of drpb stay where they are": (KEYS, "sum = __shfl_sync(~0u, sum, lane - 8);", "", "drpb: error"),
    "rare differences are left out": (KEYS, "differences.rare != nullptr &&", "false &&", "drpb: error"),
    "delta with the wrong sign": (SCALARS, "its_d_lse - delta", "its_d_lse + delta", "dq: error"),
    "two pairs of rows too few": (
        COPIES,
        "for (int i = 0; i < LEAD; ++i)",
        "for (int i = 2; i < LEAD; ++i)",
        "error|not",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    file, text, replacement, error = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=error):
        for order in (host.Order.LATE, 2, 3):
            judge(BLOCK, "float16", folder, facts=replace(FACTS, multiprocessors=1), order=order, sources=sources)
