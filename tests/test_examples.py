"""Every example runs, at a small size, as its docstring says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(script: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_raw_arrays():
    printed = _run("raw_arrays.py", "--size", 12)
    assert "NumPy: out (1, 12, 12, 2, 32) float32, dq (1, 12, 12, 2, 32), drpb (2, 9, 9)" in printed
    difference = re.search(r"definition: (\S+)", printed)
    assert difference and float(difference[1]) < 1e-5


def test_training_in_torch_then_inference_in_jax(tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    small = ["--epochs", 1, "--train", 100, "--validation", 40]
    trained = _run("train_torch.py", "--out", tmp_path, *small)
    inferred = _run("infer_jax.py", tmp_path / "model.safetensors", "--validation", 40)
    accuracy = re.search(r"model.safetensors: validation accuracy (\S+)", trained)
    assert accuracy and f"accuracy {accuracy[1]}" in inferred
    assert "depends most on pixel" in inferred


def test_ablations_then_saliency(tmp_path: Path):
    pytest.importorskip("torch")
    printed = _run("ablations.py", "--quick", "--out", tmp_path)
    assert "Attention, kernel 7 x 7" in printed and "Kernel size, NA" in printed
    results = json.loads((tmp_path / "results.json").read_text())["accuracies"]
    assert set(results) == {"na-3", "na-5", "na-7", "na-9", "sasa-7", "swsa-7"}
    assert all(len(found) == 2 for found in results.values())
    mean = sum(results["sasa-7"]) / 2
    assert re.search(rf"^SASA +{mean:.2%} ", printed, re.MULTILINE)
    for name in ("ablations.png", "saliency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    again = _run("ablations.py", "--quick", "--out", tmp_path)  # all is there: nothing is trained again
    assert "epoch" not in again and "SASA" in again


def test_dense_prediction(tmp_path: Path):
    pytest.importorskip("torch")
    small = ["--steps", 2, "--batch", 2, "--validation", 2, "--out", tmp_path]
    printed = _run("dense.py", *small)
    assert re.search(r"upernet: mean IoU 0\.\d+ on 2 scenes of unseen digits", printed)
    assert (tmp_path / "dense.png").read_bytes().startswith(b"\x89PNG")
    try:
        from torch_nat.dense import detection  # noqa: F401
    except ImportError as error:
        assert "torchvision" in str(error) and "Cascade Mask R-CNN is left out" in printed
        return
    assert "cascade_mask_rcnn: F1 of masks" in printed
    assert "mask_rcnn: F1 of masks" in _run("dense.py", "--task", "mask_rcnn", *small)


def test_saliency_of_a_model_file(tmp_path: Path):
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(EXAMPLES))
    import digits

    import torch_nat

    torch.manual_seed(0)
    torch_nat.save(torch_nat.NAT(digits.CONFIG), tmp_path / "model.safetensors")
    printed = _run("draw_saliency.py", tmp_path / "model.safetensors", "--count", 2, "--samples", 2)
    assert "saliency.png" in printed and (tmp_path / "saliency.png").read_bytes().startswith(b"\x89PNG")


def test_every_example_is_tested_and_says_how_to_run_it():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for script in EXAMPLES.glob("*.py"):
        if script.name == "digits.py":  # a module that the others share
            continue
        assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")
        assert f'"{script.name}"' in tests
