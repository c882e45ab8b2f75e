"""What of the benchmarks runs without a GPU: rows and floors, the peers' arithmetic, the clock, the report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import gpu, latency, model_pages, models, report, shapes  # noqa: E402
from benchmarks.ours import OURS  # noqa: E402
from benchmarks.peers import PEERS, Bound, Implementation, Inputs, block_mask, map_of, missing, windows_of  # noqa: E402
from benchmarks.shapes import Row  # noqa: E402
from benchmarks.timing import HostClock, Timing, copy_time, repetitions  # noqa: E402
from natcore import reference  # noqa: E402
from natcore.problem import Window  # noqa: E402

CPU = torch.device("cpu")
DENSE = Window.of(2, (6, 8))


def tiny(name: str, *arguments, **more) -> Row:
    return Row(name, "tiny", 2, *arguments, **more)


def implementation(name: str) -> Implementation:
    peers = (peer for peers in PEERS.values() for peer in peers)
    return next(entry for entry in (*OURS, *peers) if entry.name.startswith(name))


def check_against_reference(
    row: Row, bound: Bound, inputs: Inputs, window: Window, *, backward: bool = True, atol: float = 1e-5
) -> None:
    """out and every gradient of a bound implementation against the float64 reference."""
    q, k, v, d_out = (x.double().cpu().numpy() for x in inputs[:4])
    rpb = None if inputs.rpb is None else inputs.rpb.double().cpu().numpy()
    out, _ = reference.forward(q, k, v, window, rpb=rpb)
    np.testing.assert_allclose(bound.heads_last(bound.forward()).double().cpu().numpy(), out, atol=atol)
    if backward:
        expected = reference.backward(d_out, q, k, v, window, rpb=rpb)
        for name, got, wanted in zip("qkv", bound.both(), expected, strict=False):
            got = bound.heads_last(got).double().cpu().numpy()
            np.testing.assert_allclose(got, wanted, atol=atol, err_msg=f"d{name}")
        if rpb is not None:
            assert expected.drpb is not None
            drpb = bound.both()[3].double().cpu().numpy()
            drpb = drpb if drpb.shape == rpb.shape else drpb.T.reshape(rpb.shape)  # Swin's table: [entries, heads]
            np.testing.assert_allclose(drpb, expected.drpb, atol=10 * atol, err_msg="drpb")


@pytest.mark.parametrize("heads_kv", [0, 2])
def test_sdpa_is_attention_over_the_whole_map(heads_kv):
    row = tiny("sdpa", (6, 8), 4, 16, 3, heads_kv=heads_kv, rpb=False)
    inputs = Inputs.random(row, "float32", CPU)
    check_against_reference(row, implementation("full self attention").bind(row, inputs), inputs, DENSE)


@pytest.mark.parametrize("name", [entry.name for entry in PEERS["swin"]])
def test_swin_is_blocked_neighborhood_attention(name):
    row = tiny("swin", (6, 8), 2, 16, (3, 4), rpb="bias" in name and "no bias" not in name)
    inputs = Inputs.random(row, "float32", CPU)
    bound = implementation(name).bind(row, inputs)
    blocked = Window.of(2, (3, 4), stride=(3, 4))
    check_against_reference(row, bound, inputs, blocked)


FLEX_ROWS = [
    tiny("flex", (6, 9), 2, 16, 3, rpb=False),
    tiny("flex-ragged", (13, 9), 2, 16, (3, 4), stride=(2, 1), dilation=(3, 2), rpb=False),
    tiny("flex-causal", (150,), 4, 16, 7, stride=2, is_causal=True, heads_kv=2, rpb=False),
    tiny("flex-3d", (3, 5, 6), 1, 16, (2, 3, 3), is_causal=(True, False, False), rpb=False),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("row", FLEX_ROWS, ids=lambda row: row.name)
def test_flex_is_neighborhood_attention(row):
    inputs = Inputs.random(row, "float32", CPU)
    bound = implementation("FlexAttention").bind(row, inputs)
    check_against_reference(row, bound, inputs, row.window, backward=False)  # it has none on the CPU


@pytest.mark.parametrize("row", FLEX_ROWS, ids=lambda row: row.name)
def test_block_mask_covers_the_mask_and_full_blocks_are_full(row):
    block = 16
    mask = reference.window_mask(row.window, row.spatial)
    count = -(-row.tokens // block)
    padded = np.zeros((count * block, count * block), bool)
    padded[: row.tokens, : row.tokens] = mask
    blocks = padded.reshape(count, block, count, block).swapaxes(1, 2)
    kept = block_mask(row, CPU, block)
    any_pair = kept.to_dense()[0, 0].numpy().astype(bool)
    np.testing.assert_array_equal(any_pair, blocks.any((2, 3)))
    assert kept.full_kv_num_blocks is not None
    assert kept.full_kv_num_blocks[0, 0].tolist() == blocks.all((2, 3)).sum(1).tolist()


@pytest.mark.parametrize("name", ["natcore", "natcore, packed qkv", "torch_nat", "torch_nat, packed qkv"])
def test_own_entries_measure_the_row_itself(name):
    row = tiny("own", (9, 8), 2, 16, 3, dilation=(2, 1))
    inputs = Inputs.random(row, "float32", CPU)
    entry = next(entry for entry in OURS if entry.name == name)
    bound = entry.bind(row, inputs)
    check_against_reference(row, bound, inputs, row.window)


@pytest.mark.gpu
@pytest.mark.parametrize("entry", [*OURS, *(peer for peers in PEERS.values() for peer in peers)], ids=lambda e: e.name)
def test_what_is_timed_on_the_gpu_is_right(entry):
    if entry.name.startswith("NATTEN") and missing("natten"):
        pytest.skip(str(missing("natten")))
    biased = any(word in entry.name for word in ("natcore", "torch_nat", "with bias", "bias as"))
    row = tiny("gpu", (14, 14), 2, 32, 7, rpb=biased)
    windows = {"full": Window.of(2, 14), "Swin": Window.of(2, 7, stride=7)}
    inputs = Inputs.random(row, "float16", torch.device("cuda"))
    window = windows.get(entry.name.split(" ")[0], row.window)
    check_against_reference(row, entry.bind(row, inputs), inputs, window, atol=2e-2)


def test_windows_round_trip():
    x = torch.randn(2, 6, 8, 9, 3, 5)
    assert torch.equal(map_of(windows_of(x, (3, 4, 3)), (3, 4, 3), (6, 8, 9)), x)


def test_floor_is_four_and_eleven_tensors():
    row = shapes.ROWS["56x56"]
    tensor = 128 * 56 * 56 * 2 * 32 * 2
    assert shapes.floor_bytes(row, "float16", backward=False) == 4 * tensor
    assert shapes.floor_bytes(row, "bfloat16", backward=True) == 11 * tensor
    assert shapes.floor_bytes(row, "float32", backward=True) == 22 * tensor
    gqa = tiny("gqa", (4, 4), 4, 8, 3, heads_kv=2, head_dim_v=16)
    q, k, v, out = 4 * 8, 2 * 8, 2 * 16, 4 * 16
    assert shapes.floor_bytes(gqa, "float32", backward=True) == 4 * 2 * 16 * (3 * (q + k + v) + 2 * out)


@pytest.mark.parametrize(
    "row", [tiny("a", (9, 7), 2, 8, (4, 3), stride=2, dilation=2), tiny("b", (17,), 2, 8, 5, is_causal=True)]
)
def test_useful_scores_are_the_mask(row):
    mask = reference.window_mask(row.window, row.spatial)
    assert shapes.useful_scores(row) == row.batch * row.heads * mask.sum()
    assert shapes.computed_scores(row) >= shapes.useful_scores(row)


@pytest.mark.parametrize("name, waste", [("56x56", 1.94), ("28x28", 1.78), ("14x14", 1.76), ("7x7", 1.49)])
def test_computed_scores_of_the_best_16_query_tile(name, waste):
    row = shapes.ROWS[name]
    assert shapes.computed_scores(row) / shapes.useful_scores(row) == pytest.approx(waste, abs=0.006)


def test_prediction_is_bytes_or_scores():
    row = shapes.ROWS["56x56"]
    assert shapes.predicted_ms(row, "float16", 4.26e12, 1e30) == pytest.approx(0.0482, abs=1e-4)
    assert shapes.predicted_ms(row, "float16", 1e30, shapes.fitted_rate(row, 0.07)) == pytest.approx(0.07)


def test_every_row_is_a_valid_problem_with_a_name_of_its_own():
    assert len(shapes.ROWS) == len(shapes.NAT) + len(shapes.LARGE) + len(shapes.SWEEP)
    for row in shapes.ROWS.values():
        row.window.check_fits(row.spatial)
        assert row.problem("float16").heads % row.problem("float16").heads_kv == 0


def test_select_knows_groups_and_names():
    assert shapes.select(["nat"]) == shapes.NAT
    assert shapes.select(["gqa", "all"])[0].name == "gqa"
    assert len(shapes.select(["gqa", "all"])) == len(shapes.ROWS)
    with pytest.raises(ValueError, match="no row or group 'natt'"):
        shapes.select(["natt"])


def test_timing_is_the_median_with_quartiles():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 100.0, 0.0, 6.0])
    assert (timing.ms, timing.low, timing.high, timing.repetitions) == (3.5, 2.0, 5.0, 8)
    assert repetitions(10.0, 0.1) == 1
    assert repetitions(0.2, 0.1) == 3
    assert repetitions(0.01, 0.1) == 10


def test_host_clock_orders_work():
    clock = HostClock()
    assert copy_time(clock, 64 << 20).ms > clock.empty().ms


@pytest.fixture
def tiny_rows(monkeypatch):
    row = Row("tiny", "nat", 1, (14, 14), 2, 16, 7)
    monkeypatch.setattr(shapes, "ROWS", {"tiny": row})
    monkeypatch.setattr(report, "ROWS", {"tiny": row})
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda clock: 1e10)
    monkeypatch.setattr(gpu, "matmul_rate", lambda clock: 1e11)


def run(tmp_path: Path, *more: str) -> tuple[report.Report, str, dict]:
    kept = gpu.main(["--device", "cpu", "--rows", "tiny", "--dtype", "float32", "--out", str(tmp_path), *more])
    return kept, (tmp_path / "gpu.md").read_text(), json.loads((tmp_path / "gpu.json").read_text())


def figure_of(kept: report.Report, implementation: str) -> report.Figure:
    figure = kept.find("tiny", "float32", implementation)
    assert figure is not None, implementation
    return figure


def test_report_holds_every_figure(tiny_rows, tmp_path):
    kept, page, data = run(tmp_path, "--peers", "sdpa", "swin", "natten")
    names = [figure["implementation"] for figure in data["figures"]]
    assert names[:2] == [report.FLOOR, report.COPY]
    assert {"natcore", "torch_nat", "full self attention (SDPA)"} < set(names)
    assert data["machine"]["commit"] != ""
    assert "--rows tiny" in data["machine"]["command"]
    natcore, sdpa = figure_of(kept, "natcore"), figure_of(kept, "full self attention (SDPA)")
    assert natcore.forward is not None and natcore.forward.repetitions >= 3
    assert sdpa.forward is not None and sdpa.both is not None
    assert report.figure_cells(kept, sdpa)[4] == f"{sdpa.forward.ms / natcore.forward.ms:.2f}"
    assert "predicted and measured" in page
    assert all(line.count("|") in (0, 8, 13) for line in page.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_a_peer_that_fails_prints_its_error(tiny_rows, tmp_path, monkeypatch):
    def fail(row: Row, inputs: Inputs) -> Bound:
        raise RuntimeError("no kernel | for this\nshape")

    monkeypatch.setitem(PEERS, "sdpa", [Implementation("broken", lambda row: True, fail)])
    kept, page, _ = run(tmp_path, "--peers", "sdpa")
    assert figure_of(kept, "broken").error == "RuntimeError: no kernel / for this"
    assert "RuntimeError: no kernel / for this" in page


def test_a_spent_budget_is_said(tiny_rows, tmp_path):
    kept, page, _ = run(tmp_path, "--peers", "sdpa", "--budget-seconds", "0")
    assert [f.implementation for f in kept.figures] == [report.FLOOR, report.COPY]
    assert "the time budget was spent before full self attention (SDPA) (float32) on tiny" in page


def test_notes_of_one_reason_are_one_line():
    kept = report.Report({})
    for row in ("a", "b"):
        kept.skip("no time for x on", row)
    kept.skip("no time for y on", "a")
    assert kept.notes == ["no time for x on a, b", "no time for y on a"]


def test_command_leaves_out_where_files_went():
    words = ["--rows", "nat", "--out", "/some/folder", "--name=x", "--graph", "--commit", "abc", "--dtype", "float16"]
    assert report.command_of("benchmarks.gpu", words) == "python3 -m benchmarks.gpu --rows nat --graph --dtype float16"


def test_models_are_measured_and_compared(tmp_path, monkeypatch):
    def build(name: str):
        if name == "absent":
            raise RuntimeError("Unknown model (absent)")
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 1000))

    monkeypatch.setattr(models, "build", build)
    arguments = ["--device", "cpu", "--batch", "2", "--image-size", "8", "--out", str(tmp_path)]
    arguments += ["--runs", "inference:eager", "training:eager"]
    kept = models.main([*arguments, "--models", "nat_mini", "absent"])
    assert [(f.model, f.job) for f in kept.figures] == [
        *(("nat_mini", "inference"), ("absent", "inference")),
        *(("nat_mini", "training"), ("absent", "training")),
    ]
    for figure in kept.figures:
        if figure.model == "nat_mini":
            assert figure.images_per_second and figure.images_per_second > 0
        else:
            assert figure.error == "RuntimeError: Unknown model (absent)"
    assert "RuntimeError: Unknown model (absent)" in (tmp_path / "models.md").read_text()


def test_model_page_compares_like_with_like():
    figures = [
        models.ModelFigure("nat_tiny", "inference", "compiled", 12000.0, 1.5, 30.0),
        models.ModelFigure("swin", "inference", "compiled", 8000.0),
        models.ModelFigure("convnext", "inference", "compiled", error="out of memory"),
        models.ModelFigure("swin", "inference", "eager", 4000.0),
        models.ModelFigure("jax:nat_tiny", "inference", "jit", 10000.0),
        models.ModelFigure("nat_tiny", "training", "compiled", 3000.0),
        models.ModelFigure("nat_tiny", "training", "graphs", 5000.0),
        models.ModelFigure("swin", "training", "compiled", 4000.0),
        models.ModelFigure("swin", "training", "graphs", 3200.0),
    ]
    page = models.page(models.ModelReport({"command": "c", "commit": "0", "date": "d"}, figures))
    assert "| nat_tiny | inference | compiled | 12,000 | 1.50 | 30.0 |" in page
    assert "| convnext | inference | compiled | out of memory |" in page
    assert model_pages.ratios(figures) == [
        ["model", "job", "modes", "x swin", "x convnext"],
        ["nat_tiny", "inference", "compiled", "1.50", ""],
        ["nat_tiny", "inference", "best", "1.50", ""],
        ["nat_tiny", "training", "compiled", "0.75", ""],
        ["nat_tiny", "training", "graphs", "1.56", ""],
        ["nat_tiny", "training", "best", "1.25", ""],
        ["nat_tiny", "training", "graphs beside compiled", "1.25", ""],
        ["jax:nat_tiny", "inference", "jit beside compiled", "1.25", ""],
        ["jax:nat_tiny", "inference", "jit beside best", "1.25", ""],
    ]
    assert "| nat_tiny | training | best | 1.25 |" in page
    alone = models.page(models.ModelReport({"command": "c", "commit": "0", "date": "d"}, figures[:1]))
    assert "Beside the peers" not in alone


def test_the_most_wanted_model_figures_come_first():
    figures = models._figures(models._parser().parse_args(["--models", "nat_tiny", "swin", "jax:nat_tiny"]))
    assert [(f.model, f.job, f.mode) for f in figures] == [
        *((name, job, "compiled") for job in ("inference", "training") for name in ("nat_tiny", "swin")),
        ("jax:nat_tiny", "inference", "jit"),
        *((name, "training", "graphs") for name in ("nat_tiny", "swin")),
        *((name, "inference", mode) for mode in ("graphs", "eager") for name in ("nat_tiny", "swin")),
    ]


def test_compiling_ahead_forgets_what_was_tuned(tmp_path, monkeypatch):
    started = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command[command.index("--warm") :][:4])

        def wait(self, timeout: float) -> int:
            return len(started) - 1 if timeout > 0 else 0

    monkeypatch.setattr(models.subprocess, "Popen", Process)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("kernel.best_config", "kernel.py"):
        (tmp_path / "ab" / name).touch()
    options = models._parser().parse_args(["--models", "nat_tiny", "jax:nat_tiny", "--runs", "inference:compiled"])
    assert models.compile_ahead(models._figures(options), options, time.monotonic() + 9) == []
    assert started == [["--warm", "inference:compiled", "--models", "nat_tiny"]]
    assert [path.name for path in (tmp_path / "ab").iterdir()] == ["kernel.py"]
    options.models = ["nat_tiny", "swin"]
    late = models.compile_ahead(models._figures(options), options, time.monotonic() + 9)
    assert late == ["nat_tiny inference compiled", "swin inference compiled"]


def test_latency_counts_one_call():
    assert latency.microseconds(lambda: time.sleep(1e-3), lambda: None, calls=3, blocks=3) > 900
    assert latency.import_seconds("json", "import sys", runs=1) > 0
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        latency.import_seconds("no_such_module", "", runs=1)


def test_repeated_calls_cover_every_door():
    found = latency.repeated_calls(CPU)
    assert {"bare executable", "natcore.na2d", "torch_nat.na2d, no grad"} <= set(found)
    assert min(found.values()) > 0
