"""Weights of linear layers under autocast in compiled graphs: one conversion per stage, and the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import torch_nat
from tests.torch.test_model_graphs import nodes
from torch_nat.casting import with_cast_weights
from torch_nat.models import Mlp

CAST = torch.ops.natcore.cast_flat.default


def step(call: Callable, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """The output and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters())]


def compiled(call: Callable) -> tuple[Callable, list[torch.fx.GraphModule]]:
    """The call in one graph, and the graphs to come: forward, backward."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), graphs


@pytest.mark.parametrize(
    "name, depths", [("nat_mini", (1, 2, 1, 1)), ("dinat_s_tiny", (1, 1, 1, 1)), ("vit_rpb_small", (1,))]
)
def test_a_model_casts_once_per_stage(name: str, depths: tuple[int, ...]):
    torch.manual_seed(0)
    model = torch_nat.create_model(name, depths=depths, dilations=None, drop_path_rate=0.0, num_classes=0).train()
    parameters, images = dict(model.named_parameters()), torch.randn(1, 3, 224, 224)
    call, graphs = compiled(model)
    expected, actual = step(model, model, images), step(call, model, images)
    for name, a, b in zip(("", *parameters), actual, expected, strict=True):
        assert a is not None and b is not None
        if name.endswith(".bias"):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.01 * float(b.abs().max()))
        else:
            assert torch.equal(a, b), name
    layers = [[m for m in stage.modules() if type(m) is nn.Linear] for stage in stages(model)]
    counts = [sum(len(list(layer.parameters())) for layer in stage) for stage in layers]
    forward, backward = graphs
    assert [len(node.args[0]) for node in nodes(forward, CAST)] == counts
    assert [len(node.args[0]) for node in nodes(backward, CAST)] == [len(stage) for stage in layers[::-1]]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def stages(model: torch_nat.NAT) -> list[nn.Module]:
    return [model.get_submodule(model.config.stage_name(i)) for i in range(len(model.config.depths))]


def test_frozen_weights_get_no_gradients():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 24, 0.0).train(), torch.randn(2, 3, 8)
    mlp.fc1.weight.requires_grad_(False)
    call, graphs = compiled(lambda x: with_cast_weights(mlp, x))
    expected, actual = step(mlp, mlp, x), step(call, mlp, x)
    assert actual[1] is None and expected[1] is None
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    forward, backward = graphs
    assert [len(node.args[0]) for node in nodes(forward, CAST)] == [4]
    assert [len(node.args[0]) for node in nodes(backward, CAST)] == [3]
    assert len(nodes(backward, torch.ops.aten.mm.default)) == 2  # to fc1's output and to fc2's weight


def test_what_is_left_alone():
    mlp, x = Mlp(8, 24, 0.0), torch.randn(2, 3, 8)

    def casts(x: torch.Tensor, autocast: bool = True) -> list[int]:
        call, graphs = compiled(lambda x: with_cast_weights(mlp, x))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(call(x), mlp(x))
            with torch.no_grad():
                torch.testing.assert_close(call(x), mlp(x))
        return [len(node.args[0]) for graph in graphs for node in nodes(graph, CAST)]

    assert casts(x) == [4, 4]
    assert casts(x, autocast=False) == []
    mlp.requires_grad_(False)
    assert casts(x) == [4, 4]
    nn.utils.parametrize.register_parametrization(mlp.fc2, "weight", nn.Identity())
    assert casts(x) == [2, 2]
    assert casts(x.bfloat16()) == [2, 2]
    mlp.fc1.bfloat16()
    assert casts(x) == []


def test_eager_calls_and_exported_graphs_have_no_such_operation():
    model, images = torch_nat.create_model("nat_mini", depths=(1, 1, 1, 1)).eval(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with torch.profiler.profile() as profile:
            model(images)
        assert not [event for event in profile.events() if event.name == "natcore::cast"]
        for strict in (False, True):
            assert not nodes(torch.export.export(model, (images,), strict=strict).graph_module, CAST)


def test_opcheck():
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(4, 3).t()]
    torch.library.opcheck(torch.ops.natcore.cast, (tensors, torch.bfloat16))
    for result, tensor in zip(torch.ops.natcore.cast(tensors, torch.float16), tensors, strict=True):
        assert torch.equal(result, tensor.half())
