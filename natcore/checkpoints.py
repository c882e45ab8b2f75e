"""Model files that every front-end reads and writes, NumPy only.

A file is safetensors: the published names and torch's layouts (`parameter_shapes`), and the metadata
``{"format": "natcore", "config": NATConfig.to_json(), "sha256": digest}``. The digest covers the config
and every tensor, so a file that was altered after it was written is refused; it is optional, so that
other tools can write files too.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from natcore.models import NATConfig

FORMAT = "natcore"
_DTYPES = ("float64", "float32", "float16", "bfloat16")

FilePath = str | os.PathLike[str]


def parameter_shapes(config: NATConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, as published, in the model's order."""
    shapes = _patch_embed_shapes(config)
    width = config.embed_dim
    for stage, depth in enumerate(config.depths):
        width = config.width(stage)
        for block in range(depth):
            entries = _block_shapes(config, stage)
            shapes |= {f"{config.block_name(stage, block)}.{name}": shape for name, shape in entries.items()}
        if stage < len(config.depths) - 1:
            shapes |= _downsample_shapes(config, stage)
    if config.features_only:
        for stage in range(len(config.depths)):
            shapes |= _norm(f"norm{stage}", config.width(stage))
        return shapes
    shapes |= _norm("norm", width)
    return shapes | (_linear("head", width, config.num_classes) if config.num_classes else {})


def _patch_embed_shapes(config: NATConfig) -> dict[str, tuple[int, ...]]:
    width, side = config.embed_dim, config.patch_size
    if config.layout == "nat":
        shapes = _conv("patch_embed.proj.0", config.in_chans, width // 2, 3)
        shapes |= _conv("patch_embed.proj.1", width // 2, width, 3)
    else:
        shapes = _conv("patch_embed.proj", config.in_chans, width, side)
    return shapes | _norm("patch_embed.norm", width)


def _downsample_shapes(config: NATConfig, stage: int) -> dict[str, tuple[int, ...]]:
    name, width = f"{config.stage_name(stage)}.downsample", config.width(stage)
    if config.layout == "nat":
        return {f"{name}.reduction.weight": (2 * width, width, 3, 3)} | _norm(f"{name}.norm", 2 * width)
    return _linear(f"{name}.reduction", 4 * width, 2 * width, bias=False) | _norm(f"{name}.norm", 4 * width)


def _block_shapes(config: NATConfig, stage: int) -> dict[str, tuple[int, ...]]:
    width, side = config.width(stage), 2 * config.kernel_size - 1
    hidden = int(width * config.mlp_ratio)
    gammas = {"gamma1": (width,), "gamma2": (width,)} if config.layer_scale is not None else {}
    rpb = {"attn.rpb": (config.num_heads[stage], side, side)} if config.rel_pos_bias else {}
    return {
        **gammas,
        **_norm("norm1", width),
        **rpb,
        **_linear("attn.qkv", width, 3 * width, bias=config.qkv_bias),
        **_linear("attn.proj", width, width),
        **_norm("norm2", width),
        **_linear("mlp.fc1", width, hidden),
        **_linear("mlp.fc2", hidden, width),
    }


def _conv(name: str, inputs: int, outputs: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def check(config: NATConfig, arrays: Mapping[str, np.ndarray], source: object = "these arrays") -> None:
    """Raises ValueError listing every name, shape and dtype that does not fit the config."""
    expected = parameter_shapes(config)
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in arrays]
    faults += [f"unexpected: {name} {arrays[name].shape}" for name in arrays if name not in expected]
    for name, array in arrays.items():
        if name in expected and tuple(array.shape) != expected[name]:
            faults.append(f"wrong shape: {name} is {tuple(array.shape)}, expected {expected[name]}")
        if str(array.dtype) not in _DTYPES:
            faults.append(f"wrong dtype: {name} is {array.dtype}, expected one of {', '.join(_DTYPES)}")
    if faults:
        raise ValueError(
            f"{source}: {len(faults)} parameters do not fit the config {config.to_json()}:\n  " + "\n  ".join(faults)
        )


def write(path: FilePath, config: NATConfig, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a model file atomically: after a failure or a kill the old file is still there.

    Raises ValueError where the arrays do not fit the config.
    """
    check(config, arrays)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"format": FORMAT, "config": config.to_json()}
    metadata["sha256"] = _digest(metadata["config"], contiguous)
    with replacing(path) as temporary:
        _safetensors().numpy.save_file(contiguous, temporary, metadata)


def read(path: FilePath, **changes: object) -> tuple[NATConfig, dict[str, str], dict[str, np.ndarray]]:
    """The config, the metadata and the arrays of a model file, with fields of the config changed (`changed`).

    Raises ValueError for a file that is truncated, altered, of another kind, or whose names, shapes
    or dtypes do not fit its config; OSError where it cannot be opened.
    """
    metadata, arrays = _read_safetensors(path)
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ValueError(
            f"{path} has the metadata {metadata!r}; a natcore model file has format = {FORMAT!r} and a config. "
            "For a bare state_dict, create the model by name and call its load_state_dict."
        )
    try:
        config = NATConfig.from_json(metadata["config"])
    except ValueError as error:
        raise ValueError(f"{path} has a bad config: {error}") from error
    check(config, arrays, path)
    stored, actual = metadata.get("sha256"), _digest(metadata["config"], arrays)
    if stored not in (None, actual):
        raise ValueError(f"{path} was altered after it was written: its sha256 is {actual}, but it states {stored}.")
    config, arrays = changed(config, arrays, path, **changes)
    return config, metadata, arrays


def changed(
    config: NATConfig, arrays: Mapping[str, np.ndarray], source: object = "these arrays", **changes: object
) -> tuple[NATConfig, dict[str, np.ndarray]]:
    """A model with some fields of its config changed; a new kernel_size resizes its bias tables.

    Raises ValueError where other parameters do not fit the new config.
    """
    new = replace(config, **changes)  # type: ignore[arg-type]
    resized = dict(arrays)
    if new.kernel_size != config.kernel_size:
        side = 2 * new.kernel_size - 1
        resized |= {n: resize_rpb(a, (side,) * (a.ndim - 1)) for n, a in arrays.items() if n.endswith(".rpb")}
    check(new, resized, source)
    return new, resized


def resize_rpb(table: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A bias table ``[heads, *axes]`` for another kernel size, ``[heads, *shape]``, in its own dtype.

    Bicubic as published for 7 -> 11 and as in Swin: half-pixel centres, edges repeated (the figures of
    torch's ``interpolate(..., mode="bicubic", align_corners=False)``).
    """
    if len(shape) != table.ndim - 1:
        raise ValueError(f"shape {tuple(shape)} must have one entry per axis of the table {table.shape} but the first.")
    resized = table.astype(np.float64)
    for axis, size in enumerate(shape, start=1):
        resized = np.moveaxis(np.moveaxis(resized, axis, -1) @ _bicubic(table.shape[axis], size).T, -1, axis)
    return np.ascontiguousarray(resized.astype(table.dtype))


def _bicubic(old: int, new: int) -> np.ndarray:
    """``[new, old]``: the weights of Keys' cubic convolution (1981) with a = -3/4."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(centres - (left + tap))
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        weights[np.arange(new), np.clip(left + tap, 0, old - 1)] += np.where(d <= 1, near, far)
    return weights


def _read_safetensors(path: FilePath) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    safetensors = _safetensors()
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a model file.")
    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError) as error:  # the latter two: a dtype unknown to NumPy
        size = Path(path).stat().st_size
        raise ValueError(f"{path} ({size} bytes) is not a whole safetensors file: {error}") from error


def _digest(config: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the config and of every tensor's name, dtype, shape and bytes, in the order of names."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextmanager
def replacing(path: FilePath) -> Iterator[str]:
    """A temporary path beside ``path``; what is written there takes its place on success only."""
    final = os.path.realpath(path)
    temporary = f"{final}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content before the name: a crash must not leave a short file
        os.replace(temporary, final)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("model files need safetensors: pip install 'natcore[torch]' or 'natcore[jax]'") from error
    return safetensors
