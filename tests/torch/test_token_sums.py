"""Gradients of biases and norms in compiled training: in two steps, the second for many layers at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_nat
from tests.torch.test_casting import compiled, stages, step
from tests.torch.test_model_graphs import nodes
from torch_nat.casting import with_cast_weights
from torch_nat.models import NATBlock
from torch_nat.token_sums import apply_linear, apply_norm

OPS = torch.ops.natcore
SUMS, LINEAR, NORM = OPS.column_sums.default, OPS.linear.default, OPS.layer_norm.default


def block_and_map(**changes: object) -> tuple[NATBlock, torch.Tensor]:
    torch.manual_seed(0)
    model = torch_nat.create_model("nat_mini", depths=(1, 1, 1, 1), drop_path_rate=0.0, **changes)
    block = next(m for m in model.modules() if isinstance(m, NATBlock)).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 1.0)
    return block, torch.randn(2, 14, 28, 64)


def compiled_step(block: nn.Module, x: torch.Tensor) -> tuple[list, list[torch.fx.GraphModule]]:
    call, graphs = compiled(lambda x: with_cast_weights(block, x))
    return step(call, block, x), graphs


def errors(actual: list, expected: list) -> list[float]:
    return [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True)]


def test_a_block_sums_once():
    """The output and the gradients of matrices to the bit; of biases and norms, as close to the truth as without."""
    block, x = block_and_map()
    names = [name for name, _ in block.named_parameters()]
    plain = step(block, block, x)
    actual, (forward, backward) = compiled_step(block, x)
    assert [len(node.args[0]) for node in nodes(backward, SUMS)] == [8]  # 4 biases, 2 norms
    assert {tuple(table.meta["val"].shape) for table in nodes(backward, SUMS)[0].args[0]} == {(4, 64), (4, 192)}
    assert not [*nodes(forward, LINEAR), *nodes(forward, NORM), *nodes(backward, LINEAR)]
    assert len(nodes(forward, torch.ops.aten.addmm.default)) == 4
    assert len(nodes(backward, torch.ops.aten.mm.default)) == 8
    truth = [t.double() for t in step(lambda x: exact(block, x), block.double(), x.double())]
    for name, a, b, one, other in zip(
        ("out", *names), actual, plain, errors(actual, truth), errors(plain, truth), strict=True
    ):
        if name.endswith("bias") or ".norm" in name or name.startswith("norm"):
            assert one <= 1.05 * other + 1e-6, name
        else:
            assert torch.equal(a, b), name


def exact(block: NATBlock, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return block(x)


def test_gradients_are_exact_in_float64():
    """Of both operations themselves, in eager mode, with respect to everything."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 3, 5), (6, 5), (6,)))
    gamma, beta = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for groups in (2, 4, 8):
        (table,) = OPS.tables([b], groups)
        tables = OPS.tables([gamma, beta], groups)
        d_out, d_normed = torch.randn(2, 4, 3, 6, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
        pairs = (
            (OPS.linear(x, w, b.detach(), table), F.linear(x, w, b), d_out, (x, w, b)),
            (
                OPS.layer_norm(x, gamma.detach(), beta.detach(), *tables, 1e-5),
                F.layer_norm(x, (5,), gamma, beta),
                d_normed,
                (x, gamma, beta),
            ),
        )
        for actual, expected, gradient, inputs in pairs:
            assert torch.equal(actual, expected)
            found = torch.autograd.grad(actual, inputs, gradient)
            for a, e in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-5)  # tables are float32


def test_what_gets_no_table():
    """Frozen parameters, hooked layers, layers without bias, maps that are padded."""
    block, x = block_and_map()
    block.mlp.fc1.bias.requires_grad_(False)
    seen: list[torch.Size] = []
    block.attn.proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    block.norm2.weight.requires_grad_(False)
    expected = step(block, block, x)
    actual, (_, backward) = compiled_step(block, x)
    assert [len(node.args[0]) for node in nodes(backward, SUMS)] == [4]  # qkv, fc2 and norm1
    assert len(seen) >= 2
    for (name, _), a, e in zip(block.named_parameters(), actual[1:], expected[1:], strict=True):
        assert (a is None) == (e is None), name
        if a is not None and e is not None:
            torch.testing.assert_close(a, e, rtol=0.02, atol=0.02 * float(e.abs().max()))
    block, x = block_and_map(qkv_bias=False)
    _, (_, backward) = compiled_step(block, x)
    assert [len(node.args[0]) for node in nodes(backward, SUMS)] == [7]
    small = torch.randn(1, 6, 45, 64)  # padded to 7 rows, which two groups of tokens cannot share
    expected = step(block, block, small)
    actual, (_, backward) = compiled_step(block, small)
    assert [len(node.args[0]) for node in nodes(backward, SUMS)] == [6]  # not proj
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.02 * float(e.abs().max()))


def test_evaluation_and_eager_calls_have_no_tables():
    block, x = block_and_map()
    call, graphs = compiled(lambda x: with_cast_weights(block, x))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(call(x), block(x))
    assert not [node for graph in graphs for node in graph.graph.nodes if "column_sums" in str(node.target)]
    assert not [key for key, _ in block.named_parameters() if "table" in key]
    assert torch.equal(apply_linear(block.mlp.fc1, x), block.mlp.fc1(x))
    assert torch.equal(apply_norm(block.norm1, x), block.norm1(x))


def test_compiled_code_sets_nothing():
    """What is replaced while the model is read is back before it runs: no module is touched then."""
    block, x = block_and_map()
    names: list[str] = []
    handle = torch._dynamo.convert_frame.register_bytecode_hook(lambda _, code: names.extend(code.co_names))
    try:
        compiled_step(block, x)
    finally:
        handle.remove()
    assert "_parameters" in names
    assert not {"clear", "update", "__setattr__"} & set(names)


@pytest.mark.parametrize("name", ["nat_mini", "vit_rpb_small"])
def test_a_model_sums_once_per_stage(name: str):
    depths = (2,) if name.startswith("vit") else (1, 2, 1, 1)
    model = torch_nat.create_model(name, depths=depths, dilations=None, drop_path_rate=0.1).train()
    call, graphs = compiled(model)
    gradients = step(call, model, torch.randn(2, 3, 224, 224))[1:]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    biases = [sum(type(m) is nn.Linear and m.bias is not None for m in stage.modules()) for stage in stages(model)]
    assert [len(node.args[0]) for node in nodes(graphs[1], SUMS)] == biases[::-1]  # norms are bfloat16 on the CPU


def test_batches_of_any_size():
    """One graph for all, the groups counted when it runs."""
    block, x = block_and_map()
    call = torch.compile(lambda x: with_cast_weights(block, x), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = torch.randn(batch, 14, 28, 64)
        expected, actual = step(block, block, x), step(call, block, x)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0.02, atol=0.02 * float(e.abs().max()))


def test_opcheck():
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 4, 3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.randn(6)
    gamma, beta = torch.randn(8), torch.randn(8)
    tables = [torch.zeros(4, n, requires_grad=True) for n in (6, 8, 8)]
    torch.library.opcheck(OPS.linear, (x, w, b, tables[0]))
    torch.library.opcheck(OPS.layer_norm, (x, gamma, beta, tables[1], tables[2], 1e-5))
    torch.library.opcheck(OPS.column_sums, (tables,), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(OPS.column_sums([t + 1 for t in tables]), torch.full((22,), 4.0))
