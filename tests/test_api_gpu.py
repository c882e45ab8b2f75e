"""The public door on CUDA: kinds, streams, and what must not happen silently."""

import os
import subprocess
import sys

import numpy as np
import pytest

import natcore
from tests.cases import Case, check, inputs
from tests.test_api import SOME, run, to_kind, to_numpy

pytestmark = pytest.mark.gpu


def on_gpu(library: str, x: np.ndarray):
    if library == "cupy":
        cupy = pytest.importorskip("cupy")
        return cupy.asarray(x)
    if library == "torch":
        return to_kind("torch", x).cuda()
    jax = pytest.importorskip("jax")
    return jax.device_put(x, jax.devices("gpu")[0])


def from_gpu(x) -> np.ndarray:
    if hasattr(x, "get"):  # CuPy
        return x.get()
    return to_numpy(x.cpu() if hasattr(x, "cpu") else x)


@pytest.mark.parametrize("library", ["torch", "cupy", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_every_kind_and_dtype(case: Case, dtype: str, library: str):
    arrays = inputs(case, dtype)
    given = {n: on_gpu(library, x) for n, x in arrays.items()}
    results = run(case, given)
    assert {type(r) for r in results.values()} == {type(given["q"])}
    check(case, dtype, arrays, {n: from_gpu(r) for n, r in results.items()})


def test_work_goes_to_torchs_current_stream():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = {n: torch.from_numpy(rng.standard_normal((1, 32, 32, 2, 32)).astype(np.float32)).cuda() for n in "qkv"}
    expected = natcore.na2d(**x, kernel_size=7).cpu()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = {n: torch.zeros_like(a) for n, a in x.items()}
        torch.cuda._sleep(100_000_000)  # the inputs arrive after this
        for n, a in x.items():
            late[n].copy_(a)
        out = natcore.na2d(**late, kernel_size=7)
    stream.synchronize()
    assert torch.equal(out.cpu(), expected)


def test_a_given_stream_waits_for_torchs_current_one():
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 32, 32, 2, 32, device="cuda")
    y = torch.randn_like(x)
    expected = natcore.na2d(y, y, y, 7).cpu()
    stream = torch.cuda.Stream()
    torch.cuda._sleep(100_000_000)
    x.copy_(y)
    out = natcore.na2d(x, x, x, 7, stream=stream)
    stream.synchronize()
    assert torch.equal(out.cpu(), expected)


def test_devices_must_agree():
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 8, 8, 2, 32)
    with pytest.raises(ValueError, match=r"k is on cpu, but q is on cuda:0"):
        natcore.na2d(x.cuda(), x, x.cuda(), 3)


def test_head_dim_beyond_the_limit_names_the_limit():
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 4, 4, 1, 264, device="cuda")
    with pytest.raises(NotImplementedError, match="256"):
        natcore.na2d(x, x, x, 3)


def test_a_fresh_process_finds_its_kernels_in_the_cache(tmp_path):
    pytest.importorskip("torch")
    code = (
        "import torch, natcore; x = torch.randn(1, 9, 9, 2, 32, device='cuda');"
        "print(natcore.na2d(x, x, x, 7).sum().isfinite().item())"
    )

    env = os.environ | {"NATCORE_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert result.stdout.strip() == "True", result.stderr
    assert any(tmp_path.rglob("*"))
