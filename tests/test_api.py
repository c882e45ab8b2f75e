"""The public door: kinds of arrays in and out, optional arguments, refusals."""

import subprocess
import sys

import numpy as np
import pytest

import natcore
from natcore import arrays
from tests.cases import CASES, Case, check, inputs, numpy_dtype

SOME = [
    c for c in CASES if c.name in ("nat_packed", "gqa", "mqa", "causal_mix", "video", "empty_batch", "single_token")
]
OPTIONAL = ("rpb", "additional_keys", "additional_values")
FORWARD = {1: natcore.na1d, 2: natcore.na2d, 3: natcore.na3d}
BACKWARD = {1: natcore.na1d_backward, 2: natcore.na2d_backward, 3: natcore.na3d_backward}
PACKED = {1: natcore.na1d_qkvpacked, 2: natcore.na2d_qkvpacked, 3: natcore.na3d_qkvpacked}


def to_kind(library: str, x: np.ndarray):
    if library == "numpy":
        return x
    if library == "torch":
        torch = pytest.importorskip("torch")
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)
    jnp = pytest.importorskip("jax.numpy")
    return jnp.asarray(x)


def to_numpy(x) -> np.ndarray:
    if type(x).__module__.startswith("torch"):
        return x.float().numpy() if str(x.dtype) == "torch.bfloat16" else x.numpy()
    return np.asarray(x)


def run(case: Case, arrays: dict) -> dict:
    """Every result of forward and backward through the public functions."""
    optional = {n: arrays[n] for n in OPTIONAL if n in arrays}
    q, k, v = (arrays[n] for n in "qkv")
    out, lse = FORWARD[case.rank](q, k, v, **case.call_arguments, **optional, return_lse=True)
    grads = BACKWARD[case.rank](
        arrays["d_out"], q, k, v, out, lse, **case.call_arguments, **optional, d_lse=arrays["d_lse"]
    )
    return {"out": out, "lse": lse} | {n: g for n, g in grads._asdict().items() if g is not None}


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_every_kind_and_dtype(case: Case, dtype: str, library: str):
    if library == "jax" and dtype == "float64":
        pytest.skip("JAX has float64 only with jax_enable_x64, a process-wide switch")
    arrays = inputs(case, dtype)
    given = {n: to_kind(library, x) for n, x in arrays.items()}
    results = run(case, given)
    assert {type(r) for r in results.values()} == {type(given["q"])}
    assert set(results) == {"out", "lse", "dq", "dk", "dv"} | {
        g for n, g in (("rpb", "drpb"), *((n, "d_" + n) for n in OPTIONAL[1:])) if n in arrays
    }
    check(case, dtype, arrays, {n: to_numpy(r) for n, r in results.items()})


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_packed_is_the_separate_call(rank: int):
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((2, *(6, 5, 4)[:rank], 3, 2, 8)).astype(np.float32)
    q, k, v = np.moveaxis(qkv, -3, 0)
    rpb = rng.standard_normal((2, *[5] * rank)).astype(np.float32)
    options = {"dilation": 1, "stride": 2, "rpb": rpb, "return_lse": True}
    for packed, separate in zip(PACKED[rank](qkv, 3, **options), FORWARD[rank](q, k, v, 3, **options), strict=True):
        np.testing.assert_array_equal(packed, separate)


def small(dtype: str = "float32", **changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((1, 6, 5, 2, 8)).astype(numpy_dtype(dtype)) for n in "qkv"} | changes


def test_out_is_written_in_place():
    x = small()
    expected = natcore.na2d(**x, kernel_size=3)
    memory = np.full((1, 6, 5, 2, 2, 8), np.nan, np.float32)
    out = memory[:, :, :, 1]
    assert natcore.na2d(**x, kernel_size=3, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(memory[:, :, :, 0]).all()


def test_an_lse_that_nobody_asked_for_is_not_made(monkeypatch):
    made = []
    empty = arrays.NumPyKind.empty

    def recording(self, shape, *rest):
        made.append(shape)
        return empty(self, shape, *rest)

    monkeypatch.setattr(arrays.NumPyKind, "empty", recording)
    q = np.random.default_rng(0).standard_normal((1, 6, 2, 8)).astype(np.float32)
    out = natcore.na1d(q, q, q, 3)
    assert made == [q.shape]
    np.testing.assert_array_equal(natcore.na1d(q, q, q, 3, return_lse=True)[0], out)
    assert made == [q.shape, q.shape, q.shape[:-1]]


def test_what_is_remembered_is_still_checked():
    """Equal to what was valid is not valid: types, strides, devices and the like belong to what is looked up."""
    q = np.zeros((1, 6, 2, 8), np.float32)
    natcore.na1d(q, q, q, 3)
    natcore.na1d(q, q, q, 1)
    for kernel_size in (3.0, True):
        with pytest.raises(ValueError, match="kernel_size on axis 0 must be int"):
            natcore.na1d(q, q, q, kernel_size)
    wide = np.zeros((1, 6, 2, 16), np.float32)
    with pytest.raises(ValueError, match="k has stride 2 on its last axis"):
        natcore.na1d(q, wide[..., ::2], q, 3)
    natcore.na1d(q, q, q, 3, out=np.empty_like(q))
    frozen = np.empty_like(q)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        natcore.na1d(q, q, q, 3, out=frozen)


def test_any_strides_and_read_only_inputs():
    x = small()
    expected = natcore.na2d(**x, kernel_size=3)
    flipped = {n: np.ascontiguousarray(a[:, ::-1].swapaxes(1, 3)).swapaxes(1, 3)[:, ::-1] for n, a in x.items()}
    assert any(s < 0 for s in flipped["q"].strides)
    for a in flipped.values():
        a.flags.writeable = False
    np.testing.assert_array_equal(natcore.na2d(**flipped, kernel_size=3), expected)


def test_kinds_may_mix():
    torch = pytest.importorskip("torch")
    x = small()
    out = natcore.na2d(x["q"], torch.from_numpy(x["k"]), x["v"], 3)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, natcore.na2d(**x, kernel_size=3))


class Producer:
    """The least that the array API standard asks of a producer."""

    def __init__(self, array: np.ndarray):
        self.array, self.device = array, "cpu"

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return np


def test_any_array_api_producer():
    x = small()
    out = natcore.na2d(*(Producer(x[n]) for n in "qkv"), 3)
    np.testing.assert_array_equal(out, natcore.na2d(**x, kernel_size=3))


def test_scale_zero_is_the_mean():
    x = small(dtype="float64")
    whole = natcore.na2d(**x, kernel_size=(6, 5), scale=0.0)
    np.testing.assert_allclose(whole, np.broadcast_to(x["v"].mean((1, 2), keepdims=True), whole.shape), atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": [1.0, 2.0]}, TypeError, ["q is a builtins.list", "NumPy"]),
        ({"k": np.zeros((1, 6, 5, 2, 8), np.int64)}, ValueError, ["k", "int64", "float32"]),
        ({"q": np.zeros((1, 6, 5, 2, 16), np.float32)[..., ::2]}, ValueError, ["q", "last axis", "contiguous"]),
        ({"q": np.zeros((1, 6, 5, 2, 8), ">f4")}, ValueError, ["q", "byte order"]),
        ({"kernel_size": 7}, ValueError, ["kernel_size 7", "extent 6", "axis 0"]),
        ({"stream": 1}, ValueError, ["stream", "CPU"]),
        ({"out": np.zeros((1, 6, 5, 2, 4), np.float32)}, ValueError, ["out", "axis 4"]),
        ({"out": np.broadcast_to(np.float32(0), (1, 6, 5, 2, 8))}, ValueError, ["out", "read-only"]),
    ],
)
def test_refusals(changes, error, words):
    with pytest.raises(error) as caught:
        natcore.na2d(**(small() | {"kernel_size": 3} | changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_repeated_call_takes_no_tensor_for_another():
    """Calls with tensors are looked up by torch's own test; each of these differs in something from the one before."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, 6, 6, 6, 2, 8, generator=generator) for _ in range(4))
    table, other = torch.randn(2, 5, 5, 5, generator=generator), torch.randn(1, 6, 6, 2, 6, 8).transpose(3, 4)

    def check(*tensors, **options) -> None:
        arrays = [x.numpy().copy() for x in tensors]
        plain = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        out, lse = natcore.na3d(*arrays, 3, **plain, return_lse=True)
        gradients = natcore.na3d_backward(d_out.numpy(), *arrays, out, lse, 3, **plain)
        for _ in range(2):
            found = natcore.na3d(*tensors, 3, **options, return_lse=True)
            differentiated = natcore.na3d_backward(d_out, *tensors, *found, 3, **options)
            for x, y in zip((out, lse, *gradients), (*found, *differentiated), strict=True):
                assert x is None is y or np.array_equal(x, y.numpy())

    check(q, k, v)
    check(q, k, v, rpb=table)
    with pytest.raises(ValueError, match="go together"):
        natcore.na3d(q, k, v, 3, additional_keys=table, return_lse=True)
    check(q, other, v)
    check(q, k, v, stride=(2, 1, 1))
    check(q, k, v, scale=0.5)
    check(q, q, q)
    with pytest.raises(ValueError, match="v is a negative view"):
        natcore.na3d(q, k, torch._neg_view(v), 3)
    out = torch.empty_like(q)
    for _ in range(2):
        assert natcore.na3d(q, k, v, [3, 3, 3], out=out.zero_()) is out and torch.equal(out, natcore.na3d(q, k, v, 3))
    with pytest.raises(ValueError, match="must be int"):
        natcore.na3d(q, k, v, 3, stride=True)
    with pytest.raises(ValueError, match="k is None"):
        natcore.na3d(q, None, v, 3)
    with pytest.raises(ValueError, match="v requires grad"):
        natcore.na3d(q, k, v.requires_grad_(), 3)


def test_tensors_that_require_grad_are_sent_to_torch_nat():
    torch = pytest.importorskip("torch")
    x = {n: torch.from_numpy(a) for n, a in small().items()}
    x["k"].requires_grad_()
    with pytest.raises(ValueError, match=r"k requires grad.*torch_nat"):
        natcore.na2d(**x, kernel_size=3)


def test_traced_arrays_are_sent_to_jax_nat():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"q is traced.*jax_nat"):
        jax.jit(lambda q: natcore.na2d(q, q, q, 3))(small()["q"])


def test_jax_arrays_cannot_be_out():
    jnp = pytest.importorskip("jax.numpy")
    x = {n: jnp.asarray(a) for n, a in small().items()}
    with pytest.raises(ValueError, match="out is read-only"):
        natcore.na2d(**x, kernel_size=3, out=jnp.zeros_like(x["q"]))


def test_import_needs_no_framework_and_no_compiler():
    heavy = "{'torch', 'jax', 'cupy', 'numba', 'cuda'}"
    code = f"import sys, natcore; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
