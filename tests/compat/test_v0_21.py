"""The interface of NATTEN 0.21, called as its users call it, against the float64 reference."""

import inspect
import warnings

import numpy as np
import pytest
import torch

import torch_nat
from tests.cases import CASES, Case, check, inputs
from tests.torch.common import gradient_name, tensors_of, to_numpy
from torch_nat.compat import natten
from torch_nat.compat.natten import _arguments
from torch_nat.compat.natten.v0_21.utils import checks, varlen

PLAIN = [case for case in CASES if case.rpb is None or case.name in ("nat_block", "video", "additional_keys")]
FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
MODULES = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D, 3: natten.NeighborhoodAttention3D}


@pytest.fixture(autouse=True)
def fresh_state():
    _arguments._warn_once.cache_clear()
    yield
    natten.context.NattenContext.reset()


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_positional_order_and_gradients(case: Case, generic: bool):
    arrays = {name: array for name, array in inputs(case, "float32").items() if name != "rpb"}
    case = Case(**{**vars(case), "rpb": None})
    tensors = tensors_of(arrays)
    given = {name: tensors[name] for name in ("q", "k", "v", "additional_keys", "additional_values") if name in tensors}
    window = (case.kernel_size, case.stride, case.dilation, case.is_causal, case.scale)
    function = natten.functional.neighborhood_attention_generic if generic else FUNCTIONS[case.rank]
    extra = [tensors.get("additional_keys"), tensors.get("additional_values")]
    out, lse = function(*(tensors[name] for name in "qkv"), *window, *extra, return_lse=True)
    gradients = torch.autograd.grad((out, lse), tuple(given.values()), (tensors["d_out"], tensors["d_lse"]))
    named = zip(map(gradient_name, given), gradients, strict=True)
    check(case, "float32", arrays, {name: to_numpy(t) for name, t in [("out", out), ("lse", lse), *named]})


def test_the_signature_is_theirs():
    """natten 0.21.6, in order; the order is part of the interface."""
    window = ["query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale"]
    context = ["additional_keys", "additional_values", "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape"]
    backward = ["backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction"]
    rest = ["run_persistent_kernel", "kernel_schedule", "torch_compile", "return_lse"]
    for function in (*FUNCTIONS.values(), natten.functional.neighborhood_attention_generic):
        assert list(inspect.signature(function).parameters) == [*window, *context, *backward, *rest]
    plain = ["query", "key", "value", "is_causal", "scale", "seqlens_Q", "seqlens_KV"]
    plain += ["cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV", "backend"]
    assert list(inspect.signature(natten.attention).parameters)[: len(plain)] == plain
    for module in MODULES.values():
        names = ["embed_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias", "qk_scale"]
        assert list(inspect.signature(module).parameters) == [*names, "proj_drop"]


def test_none_stands_for_defaults_and_strided_last_axes_are_copied():
    q = torch.randn(1, 8, 6, 4, 2).transpose(-1, -2)
    out = natten.na2d(q, q, q, 3, None, None, None)
    torch.testing.assert_close(out, torch_nat.na2d(*[q.contiguous()] * 3, 3))


def test_tuning_is_ignored_with_one_warning():
    q = torch.randn(1, 9, 1, 8)
    plain = natten.na1d(q, q, q, 3)
    tuning = dict(backend="hopper-fna", q_tile_shape=(64,), kv_tile_shape=(64,), kernel_schedule="pp")
    with pytest.warns(
        UserWarning, match=r"backend, q_tile_shape, kv_tile_shape, kernel_schedule accepted and ign"
    ) as w:
        tuned = [natten.na1d(q, q, q, 3, **tuning) for _ in range(3)]
    assert len(w) == 1 and w[0].filename == __file__
    for out in tuned:
        assert torch.equal(out, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        natten.na1d(q, q, q, 3, backend=None, torch_compile=False, run_persistent_kernel=True, attention_kwargs={})
    with pytest.warns(UserWarning, match="attention_kwargs"):
        natten.na1d(q, q, q, 3, attention_kwargs={"backend": "blackwell-fmha"})


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (NotImplementedError, {"backend": "cudnn"}),
        (ValueError, {"kernel_schedule": "fast"}),
        (TypeError, {"attention_kwargs": {"is_causal": True}}),
        (TypeError, {"rpb": None}),
        (ValueError, {"kernel_size": 10}),
        (ValueError, {"stride": 4}),
        (ValueError, {"is_causal": (True, False)}),
        (ValueError, {"additional_keys": torch.zeros(1, 2, 1, 8)}),
        (ValueError, {"key": torch.zeros(1, 9, 1, 8, dtype=torch.float64)}),
        (ValueError, {"query": torch.zeros(1, 3, 3, 1, 8)}),
        (NotImplementedError, {"key": torch.zeros(1, 9, 1, 8).to_sparse()}),
    ],
)
def test_what_is_not_honoured_raises(error: type[Exception], change: dict):
    q = torch.zeros(1, 9, 1, 8)
    with pytest.raises(error):
        natten.na1d(**{"query": q, "key": q, "value": q, "kernel_size": 3, **change})


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float) -> tuple:
    """Attention in float64, by definition: out and LSE."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    scores = scale * torch.einsum("bqhd,bkhd->bqhk", q, k)
    if is_causal:
        seen = torch.arange(k.shape[1])[None] <= torch.arange(q.shape[1])[:, None]
        scores = scores.masked_fill(~seen[None, :, None], -torch.inf)
    return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (6, 11), (11, 6), (1, 4)])
def test_attention(queries: int, keys: int, is_causal: bool, return_lse: bool):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 5))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    out = natten.attention(q, k, v, is_causal, 0.3, return_lse=return_lse)
    out, lse = out if return_lse else (out, None)
    expected, expected_lse = dense(q, k, v, is_causal, 0.3)
    torch.testing.assert_close(out, expected)
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    loss, reference = (out * d_out).sum(), (expected * d_out).sum()
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse)
        loss, reference = loss + lse.sin().sum(), reference + expected_lse.sin().sum()
    actual = torch.autograd.grad(loss, (q, k, v))
    torch.testing.assert_close(actual, torch.autograd.grad(reference, (q, k, v)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_attention_over_packed_sequences(is_causal: bool, return_lse: bool):
    lengths = [(3, 5), (1, 1), (4, 4), (0, 2), (6, 3)]
    lengths_q, lengths_kv = (torch.tensor(x, dtype=torch.int32) for x in zip(*lengths, strict=True))
    q, k, v = torch.randn(1, 14, 4, 8), torch.randn(1, 15, 2, 8), torch.randn(1, 15, 2, 8)
    k.requires_grad_()
    first = natten.attention(q, k, v, is_causal, seqlens_Q=lengths_q, seqlens_KV=lengths_kv, return_lse=return_lse)
    parameters = varlen.generate_varlen_parameters(q, k, v, lengths_q, lengths_kv)
    assert parameters[0].tolist() == [0, 3, 4, 8, 8, 14] and parameters[2:] == (6, 5)
    names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
    packed = dict(zip(names, parameters, strict=True))
    second = natten.attention(q, k, v, is_causal, **packed, return_lse=return_lse)
    parts = [
        (q.split(lengths_q.tolist(), 1)[i], *(x.split(lengths_kv.tolist(), 1)[i] for x in (k, v))) for i in range(5)
    ]
    expected = [dense(*part, is_causal, 8**-0.5) for part in parts]
    for answer in (first, second):
        out, lse = answer if return_lse else (answer, None)
        torch.testing.assert_close(out, torch.cat([out for out, _ in expected], 1).float())
        if lse is not None:
            torch.testing.assert_close(lse, torch.cat([lse for _, lse in expected], 1).float())
    for change in ({"max_seqlen_Q": 5}, {"max_seqlen_KV": None}, {"cumulative_seqlen_Q": parameters[0].long()}):
        with pytest.raises(ValueError):
            natten.attention(q, k, v, **{**packed, **change})
    with pytest.raises(ValueError):
        natten.attention(q, k[:, :-1], v[:, :-1], **packed)
    with pytest.raises(ValueError):
        natten.attention(q, k, v, seqlens_Q=lengths_q)


def test_attention_without_keys_or_queries():
    q, k = torch.randn(1, 2, 1, 4, requires_grad=True), torch.randn(1, 0, 1, 4)
    out, lse = natten.attention(q, k, k, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q)) and torch.isneginf(lse).all()
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))
    assert natten.attention(k, q, q).shape == k.shape


def test_attention_refuses_the_old_position_of_scale():
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(TypeError, match=r"scale=0\.5"):
        natten.attention(q, q, q, 0.5)  # 0.20 to 0.21.1
    with pytest.warns(UserWarning, match="q_tile_size"):
        natten.attention(q, q, q, q_tile_size=64)
    for change in ({"backend": "cutlass-fna"}, {"kernel_schedule": "fast"}):
        with pytest.raises((NotImplementedError, ValueError)):
            natten.attention(q, q, q, **change)
    with pytest.raises(ValueError):
        natten.attention(q, q, q[:, :3])


@pytest.mark.parametrize("use_autograd_fix", [True, False])
def test_merge_attentions(use_autograd_fix: bool):
    """Attention over keys in three pieces, merged, is attention over all of them; so are its gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 2, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    pieces = [natten.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 2), (2, 3), (3, 7))]
    outputs, lses = ([piece[i] for piece in pieces] for i in (0, 1))
    before = [x.detach().clone() for x in (*outputs, *lses)]
    out, lse = natten.merge_attentions(outputs, lses, torch_compile=False, use_autograd_fix=use_autograd_fix)
    expected, expected_lse = dense(q, k, v, False, 8**-0.5)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    actual = torch.autograd.grad((out * d_out).sum() + lse.square().sum(), (q, k, v))
    reference = (expected * d_out).sum() + expected_lse.square().sum()
    torch.testing.assert_close(actual, torch.autograd.grad(reference, (q, k, v)))
    for x, y in zip((*outputs, *lses), before, strict=True):
        assert torch.equal(x, y)
    for bad in ((outputs[:1], lses[:1]), (outputs, lses[:2]), (outputs, [x[..., None] for x in lses])):
        with pytest.raises(ValueError):
            natten.merge_attentions(*bad)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules(rank: int):
    torch.manual_seed(0)
    theirs = MODULES[rank](16, 2, 3, 2, 1, True, qkv_bias=False, qk_scale=0.7)
    assert set(theirs.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}
    ours = getattr(torch_nat, f"NeighborhoodAttention{rank}D")(16, 2, 3, 2, 1, True, qkv_bias=False, qk_scale=0.7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *range(5, 5 + rank), 16)
    torch.testing.assert_close(theirs(x), ours(x))
    attributes = (theirs.head_dim, theirs.scale, theirs.kernel_size, theirs.stride, theirs.is_causal, theirs.na_dim)
    assert attributes == (8, 0.7, (3,) * rank, (2,) * rank, (True,) * rank, rank)
    assert "kernel_size" in repr(theirs)
    with pytest.raises(ValueError):
        theirs(x[..., :8])
    with pytest.raises(ValueError):
        MODULES[rank](15, 2, 3)
    with pytest.raises(TypeError):
        MODULES[rank](16, 2, 3, rel_pos_bias=True)  # until 0.17
    with pytest.raises(TypeError):
        MODULES[rank](dim=16, num_heads=2, kernel_size=3)  # until 0.20


def test_switches():
    assert not natten.are_deterministic_algorithms_enabled() and natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_kv_parallelism_in_fused_na(False)
    natten.use_deterministic_algorithms()
    assert natten.are_deterministic_algorithms_enabled() and not natten.is_kv_parallelism_in_fused_na_enabled()
    with pytest.raises(RuntimeError):
        natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("strict")
    assert natten.is_memory_usage_strict() and not natten.is_memory_usage_default()
    assert not natten.is_memory_usage_unrestricted()
    assert natten.get_memory_usage_preference() is natten.context.MemoryUsagePreference.Strict
    with pytest.raises(ValueError):
        natten.set_memory_usage_preference("none")
    natten.allow_flex_compile(True, backprop=True)
    assert natten.is_flex_compile_allowed() and natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile_backprop()
    assert natten.is_flex_compile_allowed() and not natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()


def test_backends():
    q = torch.randn(1, 6, 6, 2, 8)
    names = natten.backends.get_compatible_backends(q, q, q, torch_compile=False)
    assert names == ["cutlass-fna", "flex-fna"] and natten.backends.choose_backend(q, q, q, False) == names[0]
    for name in names:
        natten.na2d(q, q, q, 3, backend=name)
    assert natten.get_configs_for_cutlass_fna(q, q, q) == natten.get_bwd_configs_for_cutlass_hopper_fna(q, q, q) == []
    x = q.flatten(1, 2)
    arguments = dict(is_causal=True, is_varlen=False, torch_compile=False)
    assert natten.backends.choose_fmha_backend(x, x, x, **arguments) == "cutlass-fmha"
    assert not natten.backends.can_run_cutlass_hopper_fna(q, q, q)
    with pytest.raises(RuntimeError):
        natten.backends.can_run_cutlass_hopper_fna(q, q, q, raise_error=True)
    with pytest.raises(NotImplementedError):
        natten.backends.choose_backend(q.int(), q.int(), q.int(), False)
    assert natten.HAS_LIBNATTEN is True


def test_utils():
    assert checks.check_all_args(2, 3, None, (1, 2), True) == ((3, 3), (1, 1), (1, 2), (True, True))
    for bad in ((2, (3, 3, 3), 1, 1, False), (2, 1, 1, 1, False), (2, 3, 0, 1, False), (2, 3, 1, 1, 1)):
        with pytest.raises(ValueError):
            checks.check_all_args(*bad)
    q = torch.zeros(1, 6, 6, 1, 8)
    assert checks.is_self_attention(q, (6, 6), (False, False)) and not checks.is_self_attention(q, (6, 5), (False,) * 2)
    for kernel, stride in (((7, 3), (1, 1)), ((3, 3), (4, 1))):
        with pytest.raises(ValueError):
            checks.check_args_against_input(q, kernel, stride, (1, 1), (False, False))
    assert not checks.na_tensor_checks(q, q[:, 1:], q, raise_error=False)
    with pytest.raises(ValueError):
        checks.fmha_tensor_checks(q, q, q)
    assert np.prod(natten.utils.tuples.mul_tuple((2, 3), (4, 5))) == 120
    assert natten.utils.tuples.ceil_div_tuple((5, 4), (2, 2)) == (3, 2)
