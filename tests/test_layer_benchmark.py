"""The pairs of layers that are compared compute the same, and what is measured is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from benchmarks import layers  # noqa: E402
from benchmarks.timing import Timing  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", [7, 21])
def test_swin_as_it_is_written_is_swin_through_natcore(side: int):
    written, blocked = (layers.pair(name, 64, side).double() for name in (layers.SWIN, layers.BLOCKED))
    with torch.no_grad():
        for one, other in zip(written, blocked, strict=True):
            other.rpb.normal_()
            other.load_state_dict(
                {name: value for name, value in one.state_dict().items() if name in other.state_dict()}
            )
    x = torch.randn(2, side, side, 64, dtype=torch.float64)
    # Swin's -100 leaves weights of up to e**-90 or so; the strips leave none.
    torch.testing.assert_close(written(x), blocked(x), rtol=0, atol=1e-10)
    if side > 7:
        unshifted = layers.pair(layers.NA, 64, side).double()
        unshifted.load_state_dict(blocked.state_dict())
        assert (unshifted(x) - blocked(x)).abs().max() > 1e-3


def test_peak_is_what_is_held_at_once():
    mib = 1 << 20

    def work() -> None:
        first = torch.empty(8 * mib, dtype=torch.uint8)
        del first
        kept = [torch.empty(4 * mib, dtype=torch.uint8) for _ in range(3)]
        del kept

    assert layers.peak_bytes(work, CPU) == pytest.approx(12 * mib, rel=0.01)


def test_every_pair_is_measured_and_compared(tmp_path: Path):
    options = ["--device", "cpu", "--sides", "7", "14", "--tokens", "196", "--out", str(tmp_path)]
    report = layers.main(options)
    assert [(f.side, f.batch) for f in report.figures] == 3 * [(7, 4)] + 3 * [(14, 1)]
    assert all(f.error is None and f.forward and f.both and f.peak_mib for f in report.figures)
    text = (tmp_path / "layers.md").read_text()
    assert len(json.loads((tmp_path / "layers.json").read_text())["figures"]) == 6
    assert "40 % faster" in text and text.count("NA + NA") == 2
    with pytest.raises(SystemExit, match="side 8"):
        layers.main(["--sides", "8"])


def test_ratios_are_to_swin_and_errors_are_shown():
    def timing(ms: float) -> Timing:
        return Timing.of([ms])

    figures = [
        layers.LayerFigure(56, 1, layers.SWIN, timing(3), timing(10), 100.0),
        layers.LayerFigure(56, 1, layers.NA, timing(2), timing(8), 75.0),
        layers.LayerFigure(56, 1, layers.BLOCKED, error="RuntimeError: out of memory"),
    ]
    machine = {"command": "c", "commit": "0", "date": "d"}
    text = layers.page(layers.LayerReport(machine, "float32", 64, figures))
    assert "| 56 x 56 | 1 | NA + NA | 2 | 1.50 | 8 | 1.25 | 75 | 0.75 |" in text
    assert "RuntimeError: out of memory" in text
