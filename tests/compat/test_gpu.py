"""NATTEN's interfaces on a GPU: what the CPU tests compare with the reference, compared with the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.compat.test_legacy import SCALE, UNFUSED, heads_first, operands
from torch_nat.compat import natten
from torch_nat.compat.natten import v0_14_4, v0_15, v0_17, v0_20
from torch_nat.compat.natten.v0_21.token_permute import token_permute_operation

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def assert_same(function, *tensors: Tensor | None, tolerance: float = 1e-10) -> None:
    """Equal outputs and gradients of ``function`` on the CPU and on the GPU."""
    results = []
    for device in ("cpu", DEVICE):
        given = [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(output.device.type == device for output in outputs)
        generator = torch.Generator().manual_seed(0)
        loss = sum(
            (output * torch.randn(output.shape, generator=generator, dtype=output.dtype).to(device)).sum()
            for output in outputs
        )
        gradients = torch.autograd.grad(loss, [t for t in given if t is not None])
        results.append([t.cpu() for t in (*outputs, *gradients)])
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused_attention(name: str):
    rank, options, attend = UNFUSED[name]
    arrays = operands(rank, options.get("bias", False), options.get("extra", False))
    names = ("q", "k", "v", "rpb", "additional_keys", "additional_values")
    given = [None if n not in arrays else torch.from_numpy(arrays[n]) for n in names]
    given = [t if t is None or n == "rpb" else heads_first(arrays[n]) for n, t in zip(names, given, strict=True)]
    assert_same(lambda q, *rest: attend(q * SCALE, *rest), *given)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused_attention(rank: int):
    arrays = {name: torch.from_numpy(x) for name, x in operands(rank, True, True).items()}
    q, k, v, rpb = (arrays[name] for name in ("q", "k", "v", "rpb"))
    extra = (arrays["additional_keys"], arrays["additional_values"])
    old, middle, new = (getattr(library, f"na{rank}d") for library in (v0_17.functional, v0_20, natten))
    dilation = (1, 2, 1)[:rank]
    assert_same(lambda *t: old(*t[:3], 3, dilation, False, t[3], 0.3, *t[4:]), q, k, v, rpb, *extra)
    assert_same(lambda *t: middle(*t[:3], 3, 2, dilation, True, 0.3, *t[3:]), q, k, v, *extra)
    assert_same(lambda *t: new(*t[:3], 3, 2, dilation, True, 0.3, *t[3:], return_lse=True), q, k, v, *extra)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (6, 11)])
def test_attention_and_merging(queries: int, keys: int, is_causal: bool):
    shapes = ((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    assert_same(lambda *t: natten.attention(*t, is_causal, 0.3, return_lse=True), q, k, v)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [natten.attention(q, k[:, p], v[:, p], return_lse=True) for p in (slice(2), slice(2, keys))]
        return natten.merge_attentions(*(list(pair) for pair in zip(*parts, strict=True)))

    assert_same(merged, q, k, v)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lengths = [torch.tensor([2, n - 2], dtype=torch.int32, device=q.device) for n in (queries, keys)]
        return natten.attention(q, k, v, is_causal, seqlens_Q=lengths[0], seqlens_KV=lengths[1], return_lse=True)  # type: ignore

    assert_same(packed, q[:1], k[:1], v[:1])


@pytest.mark.parametrize(
    "layer",
    [
        lambda: v0_14_4.NeighborhoodAttention2D(16, 3, 2, dilation="auto"),
        lambda: v0_15.NeighborhoodAttention2D(16, 2, 3, 2),
        lambda: v0_17.NeighborhoodAttention2D(16, 2, 3, 2, True, True),
        lambda: natten.NeighborhoodAttention2D(16, 2, 3, 2, 2, True),
    ],
    ids=["0.14.4", "0.15", "0.17", "0.21"],
)
def test_modules(layer):
    torch.manual_seed(0)
    module = layer().double()
    modules = {"cpu": module, DEVICE: copy.deepcopy(module).to(DEVICE)}
    assert_same(lambda x: modules[x.device.type](x), torch.randn(2, 7, 9, 16, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype):
    q, k, v = (torch.randn(1, 16, 16, 2, 32, device=DEVICE, dtype=dtype) for _ in range(3))
    expected = natten.na2d(*(x.double() for x in (q, k, v)), 7)
    torch.testing.assert_close(natten.na2d(q, k, v, 7), expected.to(dtype), rtol=0, atol=0.02)
    heads_first_ = [x.movedim(-2, 1) for x in (q * 32**-0.5, k, v)]
    attn = v0_17.functional.na2d_qk(*heads_first_[:2], 7)
    out = v0_17.functional.na2d_av(attn.softmax(dim=-1), heads_first_[2], 7)
    torch.testing.assert_close(out.movedim(1, -2), expected.to(dtype), rtol=0, atol=0.03)


def test_what_the_gpu_is_asked_about():
    assert v0_15.has_cuda() and v0_17.has_cuda() and natten.HAS_LIBNATTEN
    q = torch.randn(1, 6, 6, 2, 32, device=DEVICE, dtype=torch.float16)
    major, minor = torch.cuda.get_device_capability()
    assert natten.utils.device.get_device_cc(q.device) == 10 * major + minor
    assert natten.backends.can_run_cutlass_hopper_fna(q, q, q) == ((major, minor) == (9, 0))
    for name in natten.backends.get_compatible_backends(q, q, q, torch_compile=False):
        with pytest.warns(UserWarning, match="backend accepted"):
            natten.functional.arguments._warn_once.cache_clear()
            torch.testing.assert_close(natten.na2d(q, q, q, 3, backend=name), natten.na2d(q, q, q, 3))
    assert_same(lambda x: token_permute_operation(x, (2, 4), (2, 1))[0], torch.randn(1, 5, 7, 2, 3))
