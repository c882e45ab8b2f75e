"""benchmarks.plans without a GPU: kernels are compiled, and the CPU is timed in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import configs, plan_pages, plans, shapes
from benchmarks.shapes import Row
from benchmarks.timing import Timing
from natcore.planning import Config, facts_for_arch, plan_for
from natcore.planning.listed import contiguous_call

FACTS = facts_for_arch("sm_90a")
ROWS = {
    row.name: row
    for row in (
        Row("7x7", "nat", 2, (7, 7), 2, 16, 7),
        Row("small", "sweep", 1, (9, 11), 2, 16, 3, heads_kv=1),
        Row("line", "sweep", 1, (60,), 1, 16, 9, is_causal=True),
    )
}


@pytest.mark.parametrize(
    "name", ["28x28", "14x14", "7x7", "head_dim-48", "1d-k31", "stride-3", "causal-rows", "dilation-4"]
)
@pytest.mark.parametrize("direction", plans.DIRECTIONS)
def test_configs_are_distinct_and_legal(name: str, direction: str) -> None:
    call = contiguous_call(direction, shapes.ROWS[name].problem("float16"))
    own = configs.spelled_out(call, FACTS)
    assert plan_for(call, FACTS, own) == plan_for(call, FACTS)
    others = configs.alternatives(call, FACTS, cheapest=3, drawn=2)
    assert len(set(others)) == len(others) >= 2 and own not in others
    for config in others:
        assert plan_for(call, FACTS, config).launches
    assert others == configs.alternatives(call, FACTS, cheapest=3, drawn=2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plans.executable_on
    monkeypatch.setattr(shapes, "ROWS", ROWS)
    monkeypatch.setattr(plans, "copy_bandwidth", lambda clock: 1e10)
    monkeypatch.setattr(plans, "executable_on", lambda call, arrays, config: real(call, arrays))


def run(tmp_path: Path, *more: str) -> tuple[plans.Sweep, str]:
    arguments = ["--device", "cpu", "--compilers", "2", "--cheapest", "1", "--drawn", "1", "--out", str(tmp_path)]
    sweep = plans.main([*arguments, *more])
    return sweep, (tmp_path / "plans.md").read_text()


@pytest.mark.usefixtures("small")
def test_choices_stand_beside_others_and_the_prediction(tmp_path: Path) -> None:
    sweep, page = run(tmp_path, "--rows", "nat", "sweep")
    assert [(m.row, m.direction) for m in sweep.measured] == [(n, d) for n in ROWS for d in plans.DIRECTIONS]
    for m in sweep.measured:
        assert m.chosen is not None and not m.error
        assert m.kernel == "general" or len(m.others) >= 2, (m.row, m.direction, m.others)
    grouped = next(m for m in sweep.measured if (m.row, m.direction) == ("small", "backward"))
    assert grouped.kernel != "general" or "grouped heads" in grouped.why
    assert "Within 10 % of the best: " in page and "Within 1.6x of the prediction: " in page
    assert all(line.count("|") in (0, 8, 9) for line in page.splitlines())


@pytest.mark.usefixtures("small")
def test_a_spent_budget_is_said(tmp_path: Path) -> None:
    sweep, _ = run(tmp_path, "--rows", "nat", "--budget-seconds", "0")
    assert not sweep.measured and any("not all was compiled" in note for note in sweep.notes)


def test_the_best_is_the_fastest_even_if_chosen() -> None:
    def at(ms: float) -> Timing:
        return Timing(ms, ms, ms, 3)

    measured = plan_pages.Measured("7x7", "float16", "forward", "tiled", "tiled a=1", "", chosen=at(1.0))
    measured.others["b"] = at(0.5)
    assert "| 7x7 | 1000.0 | 500.0 | 2.00 | 1 | tiled a=1 | b |" in plan_pages.choices([measured])
    measured.others["b"] = at(1.5)
    assert "Within 10 % of the best: 1 of 1; the median is 1.000." in plan_pages.choices([measured])


def test_what_the_choice_moves() -> None:
    row = shapes.ROWS["56x56"]
    for direction, tensors in (("forward", 4), ("backward", 12)):  # q, k, v, d_out twice: a pass for dq, one for dk, dv
        call = contiguous_call(direction, row.problem("float16"))
        assert plans.moved_bytes(call, FACTS) == tensors * 2 * 128 * 56 * 56 * 2 * 32


def test_a_figure_far_from_its_prediction_is_explained() -> None:
    slow = Timing(1.0, 1.0, 1.0, 3)
    sweep = plan_pages.Sweep({}, {"copy TB/s": 4.0, "empty kernel us": 4.0})
    nat = plan_pages.Measured("56x56", "float16", "backward", "marching", "", "", chosen=Timing(0.2, 0.2, 0.2, 3))
    far = plan_pages.Measured("kernel-3", "float16", "backward", "marching", "", "", 2.0, 3000.0, slow)
    (line,) = [line for line in plan_pages.predictions(sweep, [nat, far]) if "| kernel-3 |" in line]
    assert "| 2.00 | its passes take 90 us to move what they move; its cost model counts 3000 clocks |" in line


def test_compilation_stops_at_the_deadline() -> None:
    call = contiguous_call("forward", ROWS["line"].problem("float16"))
    assert configs.compiled(call, FACTS, [None, Config("no such")], deadline=0.0) == []
    assert configs.compiled(call, FACTS, [None, Config("no such")]) == [None]
