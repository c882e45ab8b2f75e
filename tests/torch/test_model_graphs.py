"""NAT under torch.compile: one graph, in which no map is turned around between convolutions, norms and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import torch_nat


def graphs_of(train: bool) -> list[torch.fx.GraphModule]:
    """The graphs, forward first, of a small NAT on contiguous images, under autocast in training."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        found.append(graph)
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    model = torch_nat.create_model("nat_mini", depths=(1, 1, 1, 1), drop_path_rate=0.2).train(train)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    images = torch.randn(2, 3, 224, 224)
    if train:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled(images).float().sum().backward()
    else:
        with torch.inference_mode():
            compiled(images)
    return found


def nodes(graph: torch.fx.GraphModule, target: object) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.target is target]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_maps_stay_as_they_lie(train: bool) -> None:
    forward, *backward = graphs_of(train)
    assert len(backward) == train
    convolutions = nodes(forward, torch.ops.aten.convolution.default)
    assert len(convolutions) == 5
    for node in convolutions:
        for value in (node.args[0].meta["val"], node.meta["val"]):
            assert value.is_contiguous(memory_format=torch.channels_last), (node, value.stride())
    attentions = nodes(forward, torch.ops.natcore.attention_packed.default)
    assert len(attentions) == 4
    assert all(node.args[0].meta["val"].is_contiguous() for node in attentions)
    assert all(node.args[1].meta["val"].dtype == torch.float32 for node in attentions)  # rpb, never cast
    assert all(node.args[1].op == "placeholder" for node in attentions)
    for graph in backward:
        gradients = nodes(graph, torch.ops.natcore.attention_packed_backward.default)
        assert len(gradients) == 4
        assert all(node.args[0].meta["val"].is_contiguous() for node in gradients)
        assert not nodes(graph, torch.ops.aten.clone.default)
