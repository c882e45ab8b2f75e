"""An MLP's GELU in training: not kept for the backward pass, and everything else as without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torch_nat
from torch_nat.models import Mlp
from torch_nat.recomputation import recomputing


def plain(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def mlp_and_input(drop: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Mlp, Tensor]:
    torch.manual_seed(0)
    mlp = Mlp(8, 24, drop).to(dtype).train()
    return mlp, torch.randn(2, 5, 3, 8, dtype=dtype, requires_grad=True)


class Gelu(nn.GELU):
    """Notes its calls, and whether its last input and output are still there."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        self.input, self.output = (StorageWeakRef(t.untyped_storage()) for t in (x, y))
        return y


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("drop, kept", [(0.0, False), (0.1, True)])
def test_eager_training_keeps_no_gelu(autocast: bool, drop: float, kept: bool):
    mlp, x = mlp_and_input(drop)
    mlp.act = Gelu()
    mlp.drop.eval()  # of rate 0.1, but out of the way, so that GELU's output itself is what fc2 gets
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mlp(x)
    assert mlp.act.output.expired() != kept
    assert not mlp.act.input.expired()
    y.sum().backward()
    assert mlp.act.calls == 2 - kept
    assert mlp.act.input.expired() and mlp.act.output.expired()  # though y, and with it its graph, is still there


def test_evaluation_is_left_alone():
    mlp, x = mlp_and_input()
    mlp.act = Gelu()
    mlp.eval()(x).sum().backward()
    assert mlp.act.calls == 1
    with torch.no_grad():
        mlp.train()(x)
    assert mlp.act.calls == 2


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_compiled_training_keeps_no_gelu(layer_scale: float | None):
    """Nor is anything but GELU computed twice: as many multiplications of matrices as without."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    model = torch_nat.create_model("nat_mini", depths=(1, 1, 1, 1), layer_scale=layer_scale).train()
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(1, 3, 64, 64)).float().sum().backward()
    forward, backward = graphs

    def count(graph: torch.fx.GraphModule, *names: str) -> int:
        return sum(str(node.target) in names for node in graph.graph.nodes if node.op == "call_function")

    assert count(forward, "aten.gelu.default") == count(backward, "aten.gelu.default") == 4
    (outputs,) = forward.graph.output_node().args
    derived = {node for node in outputs if isinstance(node, torch.fx.Node)}
    for node in reversed(forward.graph.nodes):  # through views
        if node in derived and "view" in str(node.target):
            derived.add(node.args[0])
    assert not [node for node in derived if "gelu" in str(node.target)]
    linear = count(forward, "aten.mm.default", "aten.addmm.default")
    assert count(backward, "aten.mm.default", "aten.addmm.default") == 2 * linear


def test_compiled_training_keeps_no_factors_of_dropped_paths():
    """But the random numbers that all of a stage's come from."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    model = torch_nat.create_model("nat_mini", depths=(1, 2, 1, 1), drop_path_rate=0.5).train()
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 3, 64, 64)).sum().backward()
    forward, backward = graphs
    assert sum(node.target is torch.ops.aten.rand.default for node in forward.graph.nodes) == 3  # the first keeps all
    (outputs,) = forward.graph.output_node().args
    kept = [n.meta["val"] for n in outputs if isinstance(n, torch.fx.Node)]
    assert not [
        value for value in kept if value.dtype == torch.bool or (value.shape[:1] == (2,) and value.numel() == 2)
    ]
    assert sum(node.target is torch.ops.aten.lt.Scalar for node in backward.graph.nodes) == 4


@pytest.mark.parametrize("autocast", [False, True])
def test_bits_are_those_of_the_plain_call(autocast: bool):
    mlp, x = mlp_and_input()
    d_out = torch.randn(2, 5, 3, 8)
    found = []
    for function in (mlp, lambda x: plain(mlp, x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        found.append((y, *torch.autograd.grad(y, (x, *mlp.parameters()), d_out.to(y.dtype))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives():
    mlp, x = mlp_and_input(dtype=torch.float64)
    x = x.detach()[:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(mlp, (x,))
    assert torch.autograd.gradgradcheck(mlp, (x,))


def test_any_function_and_layer():
    """A function that changes the layout or returns a part of something, a layer that keeps more of its input."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    functions = (torch.Tensor.t, lambda x: x.exp()[1:], nn.Identity(), lambda x: torch.cat([x, x])[:4])
    for function in functions:
        for layer in (torch.square, torch.softmax, lambda y: (y[1:] * y[:-1]).t().matmul(y[1:]).sin()):
            call = (lambda y: torch.softmax(y, -1) * y) if layer is torch.softmax else layer
            (actual,) = torch.autograd.grad(recomputing(function, call, x).sum(), x)
            (expected,) = torch.autograd.grad(call(function(x)).sum(), x)
            assert torch.equal(actual, expected)


def test_changed_weights_are_noticed():
    mlp, x = mlp_and_input()
    y = mlp(x).sum()
    with torch.no_grad():
        mlp.fc2.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"tensor of shape \(24, 8\) .* modified in place"):
        y.backward()


def test_other_hooks_come_first():
    mlp, x = mlp_and_input()
    mlp.act = Gelu()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x)
    assert any(mlp.act.output == StorageWeakRef(t.untyped_storage()) for t in saved)
    y = checkpoint(mlp, x, use_reentrant=False)
    assert mlp.act.output.expired() and mlp.act.calls == 2
    y.sum().backward()
    assert mlp.act.calls == 3
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        mlp(x).sum().backward()


def test_functorch_jit_and_export():
    mlp, x = mlp_and_input()
    x = x.detach()
    expected = torch.autograd.grad(plain(mlp, x).sum(), tuple(mlp.parameters()))
    parameters = dict(mlp.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(mlp, p, (x,)).sum())(parameters)
    for a, b in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.vmap(mlp)(x), plain(mlp, x))
    exported = (torch.export.export(mlp, (x,), strict=strict).module() for strict in (False, True))
    for call in (torch.jit.trace(mlp, (x,)), *exported):
        y = call(x)
        torch.testing.assert_close(y, plain(mlp, x))
        for a, b in zip(torch.autograd.grad(y.sum(), tuple(call.parameters())), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "in a checkpoint"])
def test_compiled_gradients(outer: bool):
    mlp, x = mlp_and_input()
    torch.compiler.reset()
    call = (lambda x: checkpoint(mlp, x, use_reentrant=False)) if outer else mlp
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    actual = torch.autograd.grad(y.sum(), (x, *mlp.parameters()))
    expected = torch.autograd.grad(plain(mlp, x).sum(), (x, *mlp.parameters()))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
