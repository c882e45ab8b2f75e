"""What NATTEN's callers reach under other names: kernels, token permutation, nested tensors, checks and skips."""

import inspect
import unittest
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch

from natcore import reference
from natcore.problem import Window
from tests.compat.test_legacy import operands
from torch_nat.compat import natten
from torch_nat.compat.natten import _arguments, v0_15, v0_17, v0_17_5, v0_20, v0_20_0, v0_21_1
from torch_nat.compat.natten.v0_17_5 import flex
from torch_nat.compat.natten.v0_21.backends import reference as reference_kernels
from torch_nat.compat.natten.v0_21.token_permute import token_permute_operation, token_unpermute_operation
from torch_nat.compat.natten.v0_21.utils import checks, device, dtype, environment, log, testing, tuples

#: The arguments of each kernel of 0.21.6 after query, key and value, in order.
WINDOW = "kernel_size stride dilation is_causal scale q_tile_shape kv_tile_shape"
BACKWARD = "backward_q_tile_shape backward_kv_tile_shape"
NEIGHBORHOOD = {
    "cutlass_fna": f"{WINDOW} {BACKWARD} backward_kv_splits backward_use_pt_reduction return_lse",
    "cutlass_hopper_fna": f"{WINDOW} {BACKWARD} kernel_schedule return_lse",
    "cutlass_blackwell_fna": f"{WINDOW} {BACKWARD} run_persistent_kernel return_lse",
    "flex": f"{WINDOW} torch_compile return_lse",
}
SIZES, BACKWARD_SIZES = "is_causal scale q_tile_size kv_tile_size", "backward_q_tile_size backward_kv_tile_size"
PACKED = "return_lse cumulative_seqlen_Q cumulative_seqlen_KV max_seqlen_Q max_seqlen_KV"
DENSE = {
    "cutlass_fmha": f"{SIZES} {BACKWARD_SIZES} backward_kv_splits backward_use_pt_reduction {PACKED}",
    "cutlass_hopper_fmha": f"{SIZES} kernel_schedule {BACKWARD_SIZES} {PACKED}",
    "cutlass_blackwell_fmha": f"{SIZES} run_persistent_kernel {BACKWARD_SIZES} {PACKED}",
    "flex_fmha": f"{SIZES} torch_compile {PACKED}",
}


def after_values(function) -> list[str]:
    """The names of its parameters but for query, key and value."""
    names = list(inspect.signature(function).parameters)
    assert names[:3] == ["query", "key", "value"]
    return names[3:]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kernel", NEIGHBORHOOD)
def test_neighborhood_kernels(kernel: str, rank: int):
    arrays = operands(rank, False, False)
    q, k, v = (torch.from_numpy(arrays[name]) for name in "qkv")
    window = Window.of(rank, 3, 2, 1, True)
    expected, expected_lse = reference.forward(*(arrays[name] for name in "qkv"), window, scale=0.3)
    generic = getattr(natten.backends, "flex_fna_generic" if kernel == "flex" else f"{kernel}_generic")
    for function in (generic, getattr(natten.backends, f"na{rank}d_{kernel}")):
        assert after_values(function) == NEIGHBORHOOD[kernel].split()
        out, lse = function(q, k, v, 3, 2, 1, True, 0.3, return_lse=True)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=0, atol=1e-12)
    _arguments._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="q_tile_shape"):
        tuned = generic(q, k, v, 3, q_tile_shape=(64,) * rank)
    assert torch.equal(tuned, generic(q, k, v, kernel_size=3))
    with pytest.raises(ValueError):
        getattr(natten.backends, f"na{rank % 3 + 1}d_{kernel}")(q, k, v, 3)


@pytest.mark.parametrize("kernel", DENSE)
def test_dense_kernels(kernel: str):
    function = getattr(natten.backends, kernel)
    assert after_values(function) == DENSE[kernel].split()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 12, 2, 8)))
    expected, expected_lse = reference.forward(*[x.numpy()] * 3, Window.of(1, 12, is_causal=True), scale=0.3)
    out, lse = function(x, x, x, True, 0.3, return_lse=True)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=0, atol=1e-12)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = function(
        x, x, x, False, 0.3, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends, max_seqlen_Q=7, max_seqlen_KV=7
    )
    first, _ = reference.forward(*[x[:, :5].numpy()] * 3, Window.of(1, 5), scale=0.3)
    np.testing.assert_allclose(packed[:, :5].numpy(), first, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="max_seqlen_Q is 13"):
        function(x, x, x, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends, max_seqlen_Q=13, max_seqlen_KV=7)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reference_and_flex_kernels(rank: int):
    arrays = operands(rank, False, True)
    q, k, v, k_add, v_add = (torch.from_numpy(x) for name, x in arrays.items() if name != "d_out")
    extra = {name: arrays[name] for name in ("additional_keys", "additional_values")}
    window = Window.of(rank, 2, 1, 2)
    expected, _ = reference.forward(*(arrays[name] for name in "qkv"), window, scale=0.3, **extra)
    for function in (getattr(reference_kernels, f"na{rank}d_reference"), reference_kernels.reference_fna_generic):
        out = function(q, k, v, 2, 1, 2, False, 0.3, k_add, v_add)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
        assert function(q, k, v, 2, return_lse=True)[1].shape == q.shape[:-1]
    out = getattr(flex, f"flex_na{rank}d")(q, k, v, 2, 2, False, k_add, v_add)  # 0.17.5
    expected, _ = reference.forward(*(arrays[name] for name in "qkv"), window, **extra)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tuning", ["q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size"])
def test_tile_sizes_of_attention_change_nothing(tuning: str):
    x = torch.randn(1, 9, 1, 8)
    _arguments._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f": {tuning} accepted and ignored"):
        assert torch.equal(natten.attention(x, x, x, **{tuning: 64}), natten.attention(x, x, x))


@pytest.mark.parametrize(
    "tuning",
    [
        {"backend": "cutlass-fna"},
        {"q_tile_shape": (8, 8)},
        {"kv_tile_shape": (8, 8)},
        {"backward_q_tile_shape": (8, 8)},
        {"backward_kv_tile_shape": (8, 8)},
        {"backward_kv_splits": (2, 2)},
        {"backward_use_pt_reduction": True},
        {"run_persistent_kernel": False},
        {"kernel_schedule": natten.types.KernelSchedule.NonPersistent},
        {"torch_compile": True},
        {"attention_kwargs": {"backend": "cutlass-fmha", "q_tile_size": 64}},
    ],
    ids=lambda tuning: next(iter(tuning)),
)
def test_every_tuning_argument_warns_and_changes_nothing(tuning: dict):
    x = torch.randn(1, 6, 6, 1, 8, requires_grad=True)
    _arguments._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f": {next(iter(tuning))} accepted and ignored"):
        tuned = natten.na2d(x, x, x, 3, **tuning)
    plain = natten.na2d(x, x, x, 3)
    assert torch.equal(tuned, plain)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (tuned, plain)]
    assert torch.equal(*gradients)


def place(index: tuple, spatial: tuple, tile: tuple, dilation: tuple, flip: bool) -> tuple[int, int]:
    """Where a token goes, by definition: its dilation group and its place among the group's tokens."""
    groups = [i % d for i, d in zip(index, dilation, strict=True)]
    inside = [i // d for i, d in zip(index, dilation, strict=True)]
    tiles = [-(-x // (t * d)) for x, t, d in zip(spatial, tile, dilation, strict=True)]
    digits = [
        *zip([i // t for i, t in zip(inside, tile, strict=True)], tiles, strict=True),
        *zip([i % t for i, t in zip(inside, tile, strict=True)], tile, strict=True),
    ]
    rank = len(index)
    order = [r for part in range(2) for r in (range(rank)[::-1] if flip else range(rank)) for r in [part * rank + r]]
    token = 0
    for at in order:
        token = token * digits[at][1] + digits[at][0]
    group = 0
    for at in range(rank)[::-1] if flip else range(rank):
        group = group * dilation[at] + groups[at]
    return group, token


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    ("spatial", "tile", "dilation"),
    [((11,), (4,), (2,)), ((8,), (4,), None), ((5, 9), (2, 3), (1, 2)), ((4, 3, 5), (2, 2, 2), (2, 1, 3))],
)
def test_token_permutation(spatial: tuple, tile: tuple, dilation: tuple | None, flip: bool):
    x = torch.randn(2, *spatial, 3, 4, dtype=torch.float64, requires_grad=True)
    tokens, layout, padded = token_permute_operation(x, tile, dilation, flip_tiled_dims=flip, use_torch=True)
    dilation_ = dilation or (1,) * len(spatial)
    groups = int(np.prod(dilation_))
    assert tokens.shape == (2 * groups, np.prod(padded), 3, 4) and layout == spatial and tokens.is_contiguous()
    seen = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for index in product(*map(range, spatial)):
        group, token = place(index, spatial, tile, dilation_, flip)
        for batch in range(2):
            assert torch.equal(tokens[batch * groups + group, token], x[(batch, *index)])
            seen[batch * groups + group, token] = True
    assert not tokens[~seen].any()
    back = token_unpermute_operation(tokens, layout, tile, dilation, flip_tiled_dims=flip)
    assert torch.equal(back, x)
    assert torch.equal(torch.autograd.grad(back.sum(), x)[0], torch.ones_like(x))


def test_token_permutation_refuses_what_does_not_fit():
    x = torch.zeros(1, 4, 4, 1, 2)
    for tile, dilation in (((2,), None), ((2, 2), (1,)), ((2, 0), None)):
        with pytest.raises(ValueError, match="expected 2 integers"):
            token_permute_operation(x, tile, dilation)
    with pytest.raises(ValueError, match="expected 4, 5 or 6 axes"):
        token_permute_operation(x[0, 0], (2,))
    with pytest.raises(ValueError, match="multiple of 4, 4, heads"):
        token_unpermute_operation(torch.zeros(4, 5, 1, 2), (4, 4), (2, 2), (2, 2))


@pytest.mark.parametrize("library", [v0_15, v0_17, v0_17_5], ids=["0.15", "0.17", "0.17.5"])
def test_nested_tensors(library: ModuleType):
    """As NATTEN's own tests wrote it: entries of any batch, heads and map; with gradients, which NATTEN refused."""
    f = library.functional
    shapes = [(1, 2, 7, 8, 4), (2, 3, 9, 7, 8)]
    q, k, v = (torch.nested.nested_tensor([torch.randn(s) for s in shapes], requires_grad=True) for _ in range(3))
    extra = torch.nested.nested_tensor([torch.randn(*s[:2], 5, s[-1]) for s in shapes])
    for k_add in (None, extra):
        attn = f.na2d_qk(q, k, kernel_size=3, dilation=2, additional_keys=k_add)
        out = f.na2d_av(attn.softmax(dim=-1), v, kernel_size=3, dilation=2, additional_values=k_add)
        assert attn.is_nested and out.is_nested
        each = zip(q.unbind(), k.unbind(), v.unbind(), (None, None) if k_add is None else k_add.unbind(), strict=True)
        for found, (q_, k_, v_, add) in zip(out.unbind(), each, strict=True):
            weights = f.na2d_qk(q_, k_, 3, 2, additional_keys=add).softmax(dim=-1)
            torch.testing.assert_close(found, f.na2d_av(weights, v_, 3, 2, additional_values=add))
    gradient = torch.autograd.grad(sum(x.sum() for x in out.unbind()), v)[0]
    assert all(x.abs().sum() > 0 for x in gradient.unbind())
    dense = torch.randn(1, 2, 5, 4)
    for operands_ in ((q, k, dense), (q, torch.nested.nested_tensor([torch.randn(shapes[0])]), None)):
        with pytest.raises(ValueError, match="all must be nested"):
            f.na2d_qk(*operands_[:2], 3, 1, additional_keys=operands_[2])
    if hasattr(f, "na2d"):  # fused attention raised, and raises
        with pytest.raises(NotImplementedError, match="nested"):
            f.na2d(q, k, v, 3)


@pytest.mark.parametrize("check", [checks.na_tensor_checks, checks.fmha_tensor_checks])
def test_tensor_checks_honour_every_argument(check):
    q, k, v = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 5)
    assert check(q, k, v) and check(q, k, k, True, True)
    assert not check(q, k, v, True, True, False) and not check(q, k, k, False, False, False)
    with pytest.raises(ValueError, match=r"hopper: .*query and value differ in head_dim"):
        check(q, k, v, must_match_head_dims=True, backend_name="hopper")
    with pytest.raises(ValueError, match="must be those of query"):
        check(q, k, k, supports_gqa_mqa=False)
    nested = torch.nested.nested_tensor([q[0]])
    with pytest.raises(NotImplementedError, match="nested"):
        check(nested, nested, nested)


def test_tensor_checks_until_0_21_1():
    """raise_error came right after must_match_head_dims."""
    q, k, v = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 5)
    for library in (v0_20, v0_20_0, v0_21_1):
        for check in (library.utils.checks.na_tensor_checks, library.utils.checks.fmha_tensor_checks):
            assert check(q, k, v) and not check(q, k, v, True, False)
            with pytest.raises(ValueError, match=r"flex: .*head_dim"):
                check(q, k, v, True, True, "flex")
        library.utils.checks.additional_kv_tensor_checks(q, k, k, k, k, True)
        with pytest.raises(ValueError, match="query and value differ"):
            library.utils.checks.additional_kv_tensor_checks(q, k, v, k, v, True)
        assert library.utils.checks.is_self_attention(q, (6,), (True,))


def test_checks_of_additional_keys_and_packed_sequences():
    q, k = torch.zeros(1, 6, 6, 4, 8), torch.zeros(1, 6, 6, 2, 8)
    good = torch.zeros(1, 3, 2, 8)
    checks.additional_kv_tensor_checks(q, k, k)
    checks.additional_kv_tensor_checks(q, k, k, good, good)
    for pair in ((good, None), (good, good[:, :2]), (good[..., :1, :], good[..., :1, :]), (good[0], good[0])):
        with pytest.raises(ValueError):
            checks.additional_kv_tensor_checks(q, k, k, *pair)
    x = q.flatten(1, 2)
    assert checks.varlen_tensor_checks(x, x, x) == (None, None, 0, 0)
    ends = torch.tensor([0, 30, 36], dtype=torch.int32)
    assert checks.varlen_tensor_checks(x, x, x, None, None, ends, ends, 30, 30)[2:] == (30, 30)
    for packed in ((ends, None, 30, 30), (ends, ends[:2], 30, 30), (ends, ends, 30, 37), (ends, ends.long(), 30, 30)):
        with pytest.raises(ValueError):
            checks.varlen_tensor_checks(x, x, x, None, None, *packed)
    assert checks.check_tile_shape([8, 8]) == (8, 8)
    with pytest.raises(ValueError):
        checks.check_tile_shape((8, 8.0))


def test_what_compiles():
    """All but packed sequences, whose lengths are read on the host: there the graph breaks, or says so."""
    q = torch.randn(1, 8, 8, 2, 8)
    x, h = q.flatten(1, 2), q.movedim(-2, 1)
    calls = {
        "na2d": lambda: natten.na2d(q, q, q, 3, backend="cutlass-fna", q_tile_shape=(8, 8)),
        "attention": lambda: natten.attention(x, x, x, True, return_lse=True),
        "merge": lambda: natten.merge_attentions([x, -x], [x.sum(-1), x[..., 0]]),
        "kernel": lambda: natten.backends.na2d_flex(q, q, q, 3),
        "0.17 fused": lambda: v0_17.functional.na2d(q, q, q, 3),
        "0.15 unfused": lambda: v0_15.functional.natten2dqk(h, h, 3, 1),
    }
    for name, call in calls.items():
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), call(), msg=lambda text, name=name: f"{name}: {text}")
    ends = torch.tensor([0, 30, 64], dtype=torch.int32)
    packed = dict(cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends, max_seqlen_Q=34, max_seqlen_KV=34)

    def call(x: torch.Tensor) -> torch.Tensor:
        return natten.attention(2 * x, x, x, **packed) + 1

    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), call(x))
    torch.compiler.reset()  # what is compiled already would be used
    with pytest.raises(Exception, match="lengths on the host"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(x)


def test_small_utilities(monkeypatch):
    cpu = torch.device("cpu")
    assert device.is_cpu(cpu) and not device.is_cuda(cpu) and not device.is_rocm(cpu) and device.get_device_cc(cpu) == 0
    assert dtype.is_full(torch.float32) and dtype.is_half(torch.bfloat16) and dtype.is_fp8(torch.float8_e4m3fn)
    assert tuples.sub_tuple((3, 2), (1, 1)) == (2, 1) and tuples.create_causal_arg_from_bool(2, True) == (True, True)
    assert tuples.create_dim_from_int(3, 4) == (4, 4, 4)
    monkeypatch.setenv("NATTEN_LOG_LEVEL", "debug")
    assert log.get_logger("natten.test").level == 10
    assert environment.parse_env_str("NATTEN_LOG_LEVEL", "info") == "debug" and not environment.is_torch_compiling()
    assert environment.parse_env_int("NATTEN_LOG_LEVEL", 3) == 3 and environment.parse_env_flag("NATTEN_NONE", True)
    assert testing.supports_float16(cpu) and testing.supports_bfloat16(cpu)
    assert v0_17.utils.testing.fna_supports_additional_kv() and v0_17.utils.testing.fna_supports_additional_kv(64, 0)


@pytest.mark.parametrize("library", [testing, v0_15.utils.testing, v0_17.utils.testing], ids=["0.21", "0.15", "0.17"])
def test_skips(library: ModuleType):
    """Each is a decorator of unittest methods that runs the test or skips it, saying why."""
    names = [name for name in vars(library) if name.startswith("skip_if_")]
    assert len(names) >= 4

    class Test(unittest.TestCase):
        def runTest(self):
            pass

    for name in names:
        method = getattr(library, name)()(lambda self, x: x)
        try:
            assert method(Test(), 3) == 3
        except unittest.SkipTest as skipped:
            assert str(skipped), name
