"""Modules, FLOP counters, switches and helpers that NATTEN removed, against the float64 reference."""

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_nat.flops
from natcore import reference
from natcore.problem import Window
from torch_nat.compat.natten import v0_14, v0_15, v0_17, v0_17_5
from torch_nat.compat.natten.v0_14 import flops as flops_0_14
from torch_nat.compat.natten.v0_17 import flops as flops_0_17

f15, f17 = v0_15.functional, v0_17.functional


def expected_module_output(layer, x: Tensor, kernel: tuple, dilation: tuple, causal: object = False) -> np.ndarray:
    """Pad, project, attend by the reference, crop, project: all in float64."""
    spatial = x.shape[1:-1]
    reach = [max(k * d, extent) for k, d, extent in zip(kernel, dilation, spatial, strict=True)]
    padded = np.zeros((x.shape[0], *reach, x.shape[-1]))
    here = tuple(slice(0, extent) for extent in spatial)
    padded[(slice(None), *here)] = x.numpy()
    bias = 0 if layer.qkv.bias is None else layer.qkv.bias.detach().numpy()
    qkv = padded @ layer.qkv.weight.detach().numpy().T + bias
    q, k, v = np.moveaxis(qkv.reshape(*padded.shape[:-1], 3, layer.num_heads, layer.head_dim), -3, 0)
    rpb = None if layer.rpb is None else layer.rpb.detach().numpy()
    out, _ = reference.forward(q, k, v, Window.of(len(kernel), kernel, 1, dilation, causal), scale=layer.scale, rpb=rpb)
    out = out.reshape(padded.shape)[(slice(None), *here)]
    return out @ layer.proj.weight.detach().numpy().T + layer.proj.bias.detach().numpy()


OLD_MODULES = [
    (v0_14.NeighborhoodAttention1D, (7,), (4,)),
    (v0_14.NeighborhoodAttention2D, (9, 7), (4, 6)),
    (v0_15.NeighborhoodAttention1D, (7,), (4,)),
    (v0_15.NeighborhoodAttention2D, (9, 7), (4, 6)),
]


@pytest.mark.parametrize(("module", "large", "small"), OLD_MODULES)
@pytest.mark.parametrize("bias", [True, False])
def test_modules_until_0_15_pad_small_maps(module, large: tuple, small: tuple, bias: bool):
    torch.manual_seed(0)
    layer = module(16, 2, 3, 2, bias, qkv_bias=bias, qk_scale=0.4).double().eval()
    names = {"qkv.weight", "proj.weight", "proj.bias"} | ({"rpb", "qkv.bias"} if bias else set())
    assert set(layer.state_dict()) == names and layer.window_size == 6
    if bias:
        torch.nn.init.normal_(layer.rpb)
    rank = len(large)
    for spatial in (large, small):
        x = torch.randn(2, *spatial, 16, dtype=torch.float64)
        expected = expected_module_output(layer, x, (3,) * rank, (2,) * rank)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    assert module(dim=16, num_heads=2, kernel_size=3, dilation=None).dilation == 1
    with pytest.raises(ValueError):
        layer(x[0])


def test_the_3d_module_of_0_15_has_a_depth_of_its_own():
    torch.manual_seed(0)
    layer = v0_15.NeighborhoodAttention3D(16, 2, 3, 5, 2, 1).double()
    assert layer.rpb.shape == (2, 9, 5, 5) and (layer.window_size, layer.window_size_d) == (6, 5)
    for spatial in ((6, 7, 8), (3, 7, 4)):
        x = torch.randn(1, *spatial, 16, dtype=torch.float64)
        expected = expected_module_output(layer, x, (5, 3, 3), (1, 2, 2))
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    assert v0_15.NeighborhoodAttention3D(16, 2, 3, bias=False).kernel_size_d == 3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_of_0_17(rank: int):
    torch.manual_seed(0)
    module = getattr(v0_17, f"NeighborhoodAttention{rank}D")
    causal = (True, *(False,) * (rank - 1))
    layer = module(16, 2, 3, 2, causal, True, qkv_bias=False, qk_scale=0.4).double()
    assert set(layer.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias", "rpb"}
    assert (layer.kernel_size, layer.dilation, layer.is_causal) == ((3,) * rank, (2,) * rank, causal)
    x = torch.randn(1, *range(6, 6 + rank), 16, dtype=torch.float64)
    expected = expected_module_output(layer, x, (3,) * rank, (2,) * rank, causal)
    for fused in (False, True):
        v0_17.use_fused_na(fused)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    v0_17.context.NattenContext.reset()
    assert module(dim=16, num_heads=2, kernel_size=3).rpb is None
    with pytest.raises(ValueError, match="6"):
        layer(x[:, :5])  # no padding any more
    with pytest.raises(TypeError):
        module(16, 2, 3, bias=True)


@pytest.mark.parametrize("module", [v0_14.NeighborhoodAttention2D, v0_17.NeighborhoodAttention2D])
def test_attention_dropout(module):
    """Of the weights, in training alone, reproducible from the seed."""
    torch.manual_seed(0)
    layer, plain = (module(16, 2, 3, attn_drop=rate) for rate in (0.5, 0.0))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 8, 16)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    layer.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    torch.manual_seed(0)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - plain(x)).abs().max() < 0.25 * (outs[0] - plain(x)).abs().max()


class Counter:
    """What fvcore's FlopCountAnalysis does with handles: called on every operation of a trace."""

    def __init__(self, model: torch.nn.Module, x: Tensor):
        self.graph = torch.jit.trace(model, x, check_trace=False).inlined_graph

    def set_op_handle(self, **handles: Callable) -> "Counter":
        self.handles = handles
        return self

    def total(self) -> int:
        nodes = [node for node in self.graph.nodes() if node.kind() in self.handles]
        assert nodes, f"nothing to count in {self.graph}"
        return sum(self.handles[node.kind()](list(node.inputs()), list(node.outputs())) for node in nodes)


class Unfused(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return f15.natten2dav(f15.natten2dqk(q, q, 3, 2).softmax(-1), q, 3, 2)


class Fused(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return f17.na1d(q, q, q, 5, additional_keys=q[:, :2], additional_values=q[:, :2])


@pytest.mark.parametrize(("flops", "bias"), [(flops_0_14, 1), (flops_0_17, 0)])
def test_multiply_accumulates(flops, bias: int):
    layer = v0_17.NeighborhoodAttention2D(16, 2, 3)
    queries = 2 * 8 * 9 * 2  # batch, map, heads
    counted = flops.add_natten_handle(Counter(layer, torch.randn(2, 8, 9, 16))).total()
    assert counted == queries * 9 * (8 + 8 + bias)
    counted = flops.add_natten_handle(Counter(Unfused(), torch.randn(2, 2, 8, 9, 8))).total()
    assert counted == queries * 9 * (8 + 8 + bias)
    counted = flops.add_natten_handle(Counter(Fused(), torch.randn(2, 7, 2, 8))).total()
    assert counted == 2 * 7 * 2 * (5 + 2) * (8 + 8 + bias)


@pytest.mark.parametrize("flops", [flops_0_14, flops_0_17], ids=["0.14", "0.17"])
def test_fvcore_itself_counts_the_published_figure(flops):
    """It leaves out the final mean, and 0.17 the biases."""
    pytest.importorskip("fvcore", reason="pip install fvcore (0.1.5.post20221221 passes)")
    model = torch_nat.create_model("nat_mini").eval()
    counted = flops.get_flops(model, torch.randn(1, 3, 224, 224), disable_warnings=True)
    counts = torch_nat.flops.count_named("nat_mini")
    left_out = counts["pool"] + (counts["rpb"] if flops is flops_0_17 else 0)
    assert counted == sum(counts.values()) - left_out


def test_counts_by_hand():
    shape, window = (2, 8, 9, 2, 16), ((3, 5), (1, 1), (False, False))
    macs = flops_0_17.fna_flop_count(shape, shape, shape, *window, is_heads_last=True, return_macs=True)
    assert macs == 2 * prod(shape) * 15
    assert flops_0_17.na_qk_flop_count(shape, shape, *window, True) == flops_0_17.na_av_flop_count(
        shape, shape, *window, True
    )
    with pytest.raises(ValueError):
        flops_0_17.na_qk_flop_count(shape, (1, *shape[1:]), *window, True)


def test_switches_of_0_15_and_0_17():
    cuda = torch.cuda.is_available()
    assert v0_15.has_cuda() == v0_17.has_cuda() == cuda
    if not cuda:
        answers = (v0_15.has_half(), v0_15.has_bfloat(), v0_15.has_gemm(), v0_17.has_fna(), v0_17.has_fp64_gemm())
        assert not any(answers)
    assert v0_15.enable_tf32() and not v0_15.disable_tf32()
    v0_17.use_gemm_na(False)
    assert not v0_17.is_gemm_na_enabled() and v0_17.enable_gemm_na()
    assert not v0_17.is_fused_na_enabled()
    v0_17.use_fused_na()
    assert v0_17.is_fna_enabled() and v0_17.is_kv_parallelism_in_fused_na_enabled()
    v0_17.use_autotuner(forward_pass=True, warmup_steps_forward=3)
    assert v0_17.is_autotuner_enabled_for_forward() and not v0_17.is_autotuner_enabled_for_backward()
    with pytest.raises(ValueError):
        v0_17.use_autotuner(steps_forward="many")
    v0_17.disable_autotuner()
    assert not v0_17.is_autotuner_enabled()
    v0_17_5.use_flex_attention()
    assert v0_17_5.context.should_use_flex_attention() and not v0_17_5.context.should_force_flex_attention()
    v0_17.use_deterministic_algorithms()
    with pytest.raises(RuntimeError):
        v0_17.use_fused_na()
    with pytest.raises(RuntimeError):
        v0_17.use_autotuner(forward_pass=True)
    for context in (v0_17_5.context.NattenContext, v0_17.context.AutotunerContext):
        context.reset()
    assert not v0_17.is_fused_na_enabled() and not v0_17.are_deterministic_algorithms_enabled()


def test_utils_of_old_releases():
    from torch_nat.compat.natten.v0_17 import utils

    assert utils.check_all_args(2, 3, None, None) == ((3, 3), (1, 1), (False, False))
    assert utils.get_num_na_weights((3, 5)) == 15
    q = torch.zeros(2, 3, 5, 5, 8, requires_grad=True)
    attn = utils.make_attn_tensor_from_input(q, 9)
    assert attn.shape == (2, 3, 5, 5, 9) and attn.requires_grad
    extra = torch.zeros(2, 3, 4, 8)
    assert utils.check_additional_keys(q, extra) == 4 and utils.check_additional_keys(q, None) == 0
    assert utils.check_additional_values(torch.zeros(2, 3, 5, 5, 13), extra, q, 9) == 4
    for bad in ((q, extra[:1]), (q, extra[..., :4])):
        with pytest.raises(ValueError):
            utils.check_additional_keys(*bad)
    with pytest.raises(ValueError):
        utils.check_additional_values(attn, extra, q, 9)
