"""Model files: what was saved comes back; what was damaged, altered or mistaken is refused with the reason."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import torch_nat
from natcore import checkpoints
from natcore.models import NATConfig

CONFIG = NATConfig(16, (1, 1), (1, 2), mlp_ratio=2, kernel_size=3, layer_scale=0.1, num_classes=5)


def model_of(config: NATConfig = CONFIG) -> torch_nat.NAT:
    torch.manual_seed(0)
    return torch_nat.NAT(config)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch_nat.save(model_of(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"features_only": True}, {"num_classes": 0, "dilations": ((2,), (1,))}])
def test_round_trip(tmp_path: Path, changes: dict, dtype: torch.dtype):
    model, path = model_of(replace(CONFIG, **changes)).to(dtype), tmp_path / "model.safetensors"
    torch_nat.save(model, path)
    loaded = torch_nat.load(path)
    assert loaded.config == model.config and not loaded.training
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor) and actual[name].dtype == dtype, name
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    if dtype == torch.float32:
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)


def test_the_file_says_what_it_is(saved: Path):
    config, metadata, arrays = checkpoints.read(saved)
    assert config == CONFIG
    assert metadata["format"] == "natcore" and NATConfig.from_json(metadata["config"]) == CONFIG
    assert {name: a.shape for name, a in arrays.items()} == {
        n: tuple(t.shape) for n, t in model_of().state_dict().items()
    }


def test_names_and_shapes_follow_from_the_config():
    for changes in ({}, {"features_only": True}, {"num_classes": 0}, {"qkv_bias": False, "rel_pos_bias": False}):
        config = replace(CONFIG, **changes)
        actual = {name: tuple(t.shape) for name, t in model_of(config).state_dict().items()}
        assert checkpoints.parameter_shapes(config) == actual


def test_compiled_and_non_contiguous_models_are_saved(tmp_path: Path):
    model = model_of().to(memory_format=torch.channels_last)
    torch_nat.save(torch.compile(model), tmp_path / "m.safetensors")
    loaded = torch_nat.load(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated(saved: Path, keep: float):
    data = saved.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep if keep >= 0 else len(data) + keep
    saved.write_bytes(data[:size])
    with pytest.raises(ValueError, match=rf"model.safetensors \({size} bytes\) is not a whole safetensors file"):
        torch_nat.load(saved)


def alter(path: Path, change, metadata_change=None) -> None:
    """Rewrite a file with other tensors or metadata, as a valid safetensors file."""
    _, metadata, _ = checkpoints.read(path)
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, metadata | (metadata_change or {}))


def test_every_mismatch_is_listed(saved: Path):
    def change(arrays: dict) -> None:
        arrays["levels.0.blocks.0.attn.RPB"] = arrays.pop("levels.0.blocks.0.attn.rpb")
        arrays["head.weight"] = arrays["head.weight"][:4].copy()
        arrays["norm.bias"] = arrays["norm.bias"].astype(np.int32)

    alter(saved, change)
    with pytest.raises(ValueError, match="4 parameters do not fit") as caught:
        torch_nat.load(saved)
    for text in (
        "missing: levels.0.blocks.0.attn.rpb (1, 5, 5)",
        "unexpected: levels.0.blocks.0.attn.RPB (1, 5, 5)",
        "wrong shape: head.weight is (4, 32), expected (5, 32)",
        "wrong dtype: norm.bias is int32",
        "model.safetensors",
    ):
        assert text in str(caught.value)


def test_altered_values_and_configs_are_refused(saved: Path):
    original = saved.read_bytes()
    data = bytearray(original)
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ValueError, match="was altered after it was written: its sha256"):
        torch_nat.load(saved)
    saved.write_bytes(original)
    alter(saved, lambda arrays: None, {"config": replace(CONFIG, layer_scale=0.2).to_json()})
    with pytest.raises(ValueError, match="was altered"):
        torch_nat.load(saved)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"format": "pt"}, "a natcore model file has format = 'natcore'"),
        ({"config": "{"}, "bad config"),
        ({"config": "[1]"}, "bad config"),
        ({"config": json.dumps({"embed_dim": 7, "depths": [1], "num_heads": [2], "mlp_ratio": 1})}, "not divisible"),
        ({"config": json.dumps({"width": 7})}, "bad config"),
    ],
)
def test_other_files_are_refused(saved: Path, metadata: dict, text: str):
    alter(saved, lambda arrays: None, metadata)
    with pytest.raises(ValueError, match=text):
        torch_nat.load(saved)


def test_files_of_other_tools_need_no_digest(saved: Path):
    arrays = load_file(saved)
    save_file(arrays, saved, {"format": "natcore", "config": CONFIG.to_json()})
    assert torch_nat.load(saved).config == CONFIG


def test_what_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        torch_nat.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        torch_nat.load(tmp_path)


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        torch_nat.save(model_of(replace(CONFIG, num_classes=6)), saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "no temporary file is left"


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "model.safetensors")
    torch_nat.save(model_of(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and torch_nat.load(tmp_path / "model.safetensors").config == CONFIG


def test_only_nat_models_are_saved(tmp_path: Path):
    with pytest.raises(TypeError, match=r"takes a torch_nat.NAT, not Linear"):
        torch_nat.save(torch.nn.Linear(2, 2), tmp_path / "x")
    model = model_of()
    model.head = torch.nn.Linear(32, 6)
    with pytest.raises(ValueError, match=r"wrong shape: head.weight is \(6, 32\), expected \(5, 32\)"):
        torch_nat.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("old", "new"), [(7, 11), (11, 7), (7, 3), (3, 14), (7, 7)])
def test_bias_tables_resize_as_torch_s_bicubic(old: int, new: int):
    table = torch.randn(3, 2 * old - 1, 2 * old - 1, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(table[None], size=(2 * new - 1,) * 2, mode="bicubic")[0]
    actual = checkpoints.resize_rpb(table.numpy(), (2 * new - 1,) * 2)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-12)
    assert checkpoints.resize_rpb(table.float().numpy(), (2 * new - 1,) * 2).dtype == np.float32


def test_bias_tables_of_other_ranks_resize():
    table = np.random.default_rng(0).standard_normal((2, 5, 3, 7))
    assert checkpoints.resize_rpb(table, (9, 3, 5)).shape == (2, 9, 3, 5)
    constant = checkpoints.resize_rpb(np.ones((2, 5), np.float32), (9,))
    np.testing.assert_allclose(constant, np.ones((2, 9)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(9,\) must have one entry per axis of the table \(2, 5, 3, 7\)"):
        checkpoints.resize_rpb(table, (9,))


def test_load_with_changes(saved: Path):
    old = load_file(saved)
    loaded = torch_nat.load(saved, kernel_size=5, dilations=((2,), (1,)), drop_path_rate=0.3)
    assert loaded.config == replace(CONFIG, kernel_size=5, dilations=((2,), (1,)), drop_path_rate=0.3)
    for name, tensor in loaded.state_dict().items():
        expected = checkpoints.resize_rpb(old[name], (9, 9)) if name.endswith("rpb") else old[name]
        np.testing.assert_array_equal(tensor.numpy(), expected)
    with pytest.raises(ValueError, match=r"model.safetensors: 2 parameters do not fit (.|\n)*head.weight is \(5, 32\)"):
        torch_nat.load(saved, num_classes=6)
    with pytest.raises(TypeError, match="kernel"):
        torch_nat.load(saved, kernel=5)
