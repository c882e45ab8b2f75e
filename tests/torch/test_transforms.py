"""What looks on: opcheck, torch.compile, torch.export, vmap, torch.func, autocast, forward mode."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_nat
from natcore.planning import Config
from tests.cases import CASES, Case, inputs
from tests.torch.common import OPTIONAL, tensors_of
from torch_nat import ops

BY_NAME = {case.name: case for case in CASES}


def operands(case: Case, dtype: str = "float32") -> tuple[list, list]:
    """q, k, v, rpb, additional keys and values as leaves, and the window arguments of an operation."""
    tensors = tensors_of(inputs(case, dtype))
    window = list(ops.call_arguments(case.window, None, None, 0.0))
    return [tensors.get(n) for n in ("q", "k", "v", *OPTIONAL, "dropout_seed")], window


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", ["nat_packed", "additional_keys"])
def test_opcheck(name: str, packed: bool):
    tensors, window = operands(BY_NAME[name])
    if packed:
        qkv = torch.stack([t.detach() for t in tensors[:3]], dim=-3).requires_grad_()
        tensors = [qkv, *tensors[3:]]
    suffix = "_packed" if packed else ""
    forward, backward = (getattr(torch.ops.natcore, f"attention{suffix}{end}") for end in ("", "_backward"))
    torch.library.opcheck(forward, (*tensors, *window))
    out, lse = (t.detach() for t in forward(*tensors, *window))
    leading, extras = tensors[: len(tensors) - 4], tensors[-4:]
    detached = [None if t is None else t.detach() for t in (*leading, *extras)]
    saved = (out, lse, torch.randn_like(lse))
    torch.library.opcheck(backward, (torch.randn_like(out), *detached[:-4], *saved, *detached[-4:], *window))


def test_a_plain_call_of_an_operation_goes_straight_to_its_kernel(monkeypatch: pytest.MonkeyPatch):
    """Compiled graphs make such calls; whoever looks on still sees the operation, with or without gradients."""
    again, guard = [], torch._C._AutoDispatchBelowAutograd
    monkeypatch.setattr(torch._C, "_AutoDispatchBelowAutograd", lambda: again.append(True) or guard())
    tensors, window = operands(BY_NAME["nat_packed"])
    plain = [None if t is None else t.detach() for t in tensors]

    def is_straight(*tensors: torch.Tensor | None) -> bool:
        again.clear()
        out, lse = torch.ops.natcore.attention(*tensors, *window)
        torch.testing.assert_close((out.detach(), lse.detach()), expected, rtol=0, atol=0)
        return not again

    expected = torch.ops.natcore.attention(*plain, *window)
    assert is_straight(*plain)
    assert not is_straight(*tensors)
    with torch.no_grad():
        assert is_straight(*tensors)
        assert not is_straight(torch._neg_view(-plain[0]), *plain[1:])
    for given in (plain, tensors):
        with LoggingMode() as mode:
            assert not is_straight(*given)
        assert mode.names.count("natcore::attention") == 1
    seen = []
    torch.func.functionalize(lambda q: seen.append(torch.ops.natcore.attention(q, *plain[1:], *window)) or q)(plain[0])
    assert torch._is_functional_tensor(seen[0][0])


class LoggingMode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_config_survives_the_schema():
    for config in (None, Config("window"), Config("window", (("tile", 8), ("stages", -2)))):
        assert ops.decode_config(ops.encode_config(config)) == config


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_window_survives_the_schema(case: Case):
    assert ops.decode_window(ops.encoded(case.window)) == case.window


def test_windows_that_change_are_compiled_anew():
    """What a compiler takes for a variable is a constant of the operation."""
    torch._dynamo.reset()
    function = lambda x, kernel, dilation, scale: torch_nat.na1d(x, x, x, kernel, dilation=dilation, scale=scale)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for extent, *options in ((9, 3, 1, 0.5), (12, 4, 2, 0.25), (13, 5, 1, 0.125), (14, 3, 3, 1.5)):
        x = torch.randn(1, extent, 2, 8)
        torch.testing.assert_close(compiled(x, *options), function(x, *options), rtol=0, atol=0)


class Block(torch.nn.Module):
    """Both entries, with a window that follows the map."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.rpb = torch.nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, 8))
        out = torch_nat.na2d_qkvpacked(qkv, 3, dilation=(1, 2), rpb=self.rpb)
        q, k, v = qkv.unbind(-3)
        other, lse = torch_nat.na2d(q, k, v, (3, 1), stride=(2, 1), is_causal=(True, False), return_lse=True)
        return (out + other * lse.unsqueeze(-1)).flatten(-2)


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, counter = Block(), torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 7, 8, 16), (3, 9, 11, 16)):
        x = torch.randn(shape, requires_grad=True)
        expected = torch.autograd.grad(block(x).square().sum(), (x, *block.parameters()))
        actual = torch.autograd.grad(compiled(x).square().sum(), (x, *block.parameters()))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, "a new image size must not recompile"


def test_bad_problems_fail_when_traced():
    with pytest.raises(Exception, match=r"kernel_size 9 \* dilation 1 = 9 > extent 7"):
        torch.compile(lambda x: torch_nat.na1d(x, x, x, 9), fullgraph=True, backend="eager")(torch.zeros(1, 7, 1, 8))


def test_export():
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(2, 7, 8, 16)
    dims = {1: torch.export.Dim("height", min=3, max=64), 2: torch.export.Dim("width", min=6, max=64)}
    program = torch.export.export(block, (x,), dynamic_shapes=({**dims},))
    larger = torch.randn(2, 12, 9, 16)
    torch.testing.assert_close(program.module()(larger), block(larger), rtol=1e-5, atol=1e-5)


def stack_of(results: list) -> tuple:
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None), (1, None, -1, None), (0, None, None, 2), (None, 0, 2, 0)])
def test_vmap(in_dims: tuple):
    """Every argument mapped or shared, along any axis; a mapped bias folds into the heads."""
    torch.manual_seed(0)
    shapes = ((2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 5), (4, 5))
    given = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        mapped = list(shape)
        if dim is not None:
            mapped.insert(dim if dim >= 0 else len(shape) + 1 + dim, 3)
        given.append(torch.randn(mapped, dtype=torch.float64))

    def function(q, k, v, rpb):
        return torch_nat.na1d(q, k, v, 3, rpb=rpb, return_lse=True)

    def slice_of(i: int) -> list:
        return [t if dim is None else t.select(dim, i).contiguous() for t, dim in zip(given, in_dims, strict=True)]

    actual = torch.vmap(function, in_dims=in_dims)(*given)
    torch.testing.assert_close(actual, stack_of([function(*slice_of(i)) for i in range(3)]))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_gradients_per_sample(packed: bool):
    """vmap over grad with everything else shared: each sample gets its own bias gradient."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 6, 3, 2, 8, dtype=torch.float64)
    extras = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (2, 3, 2, 8), (2, 3, 2, 8))]

    def loss(qkv, rpb, keys, values):
        options = {"rpb": rpb, "additional_keys": keys, "additional_values": values, "return_lse": True}
        if packed:
            out, lse = torch_nat.na1d_qkvpacked(qkv, 3, **options)
        else:
            out, lse = torch_nat.na1d(*qkv.unbind(-3), 3, **options)
        return out.square().sum() + lse.sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    actual = torch.vmap(gradient, in_dims=(0, None, None, None))(qkv, *extras)
    torch.testing.assert_close(actual, stack_of([gradient(x, *extras) for x in qkv]))


def test_functorch_gradient_is_autograd_s():
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    leaf = q.clone().requires_grad_()
    torch_nat.na1d(leaf, q, q, 3).square().sum().backward()
    actual = torch.func.grad(lambda x: torch_nat.na1d(x, q, q, 3).square().sum())(q)
    torch.testing.assert_close(actual, leaf.grad)


def test_forward_mode_is_refused():
    q = torch.randn(1, 6, 2, 8)
    with pytest.raises(NotImplementedError, match="q carries a tangent"):
        torch.func.jvp(lambda x: torch_nat.na1d(x, q, q, 3), (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="k carries a tangent"):
        torch_nat.na1d(q, torch.autograd.forward_ad.make_dual(q, q), q, 3)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_autocast(packed: bool):
    """q, k and v become the autocast dtype; a float32 bias stays exact; gradients come back in float32."""
    torch.manual_seed(0)
    qkv, rpb = torch.randn(1, 6, 3, 2, 8, requires_grad=True), torch.randn(2, 5, requires_grad=True)

    def function(qkv):
        if packed:
            return torch_nat.na1d_qkvpacked(qkv, 3, rpb=rpb, return_lse=True)
        return torch_nat.na1d(*qkv.unbind(-3), 3, rpb=rpb, return_lse=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = function(qkv)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close((out, lse), function(qkv.bfloat16()), rtol=0, atol=0)
    out.float().sum().backward()
    assert qkv.grad is not None and rpb.grad is not None
    assert (qkv.grad.dtype, rpb.grad.dtype) == (torch.float32, torch.float32)


def test_autocast_leaves_float64_alone():
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_nat.na1d(q, q, q, 3).dtype == torch.float64


def test_autocast_of_mixed_dtypes():
    """What a bias in float16 and keys in bfloat16 need to go together at all."""
    q = torch.randn(1, 6, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch_nat.na1d(q, q.bfloat16(), q.half(), 3, rpb=torch.zeros(2, 5, dtype=torch.float16))
    assert out.dtype == torch.bfloat16


def test_double_backward_is_refused_under_torch_func():
    q = torch.randn(1, 6, 2, 8)
    gradient = torch.func.grad(lambda x: torch_nat.na1d(x, q, q, 3).square().sum())
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.grad(lambda x: gradient(x).sum())(q)


def test_grad_of_vmap_under_autocast():
    """Three onlookers at once; the casts take part in the gradient."""
    torch.manual_seed(0)
    qkv, rpb = torch.randn(3, 2, 6, 3, 2, 8), torch.randn(2, 5)

    def loss(qkv, rpb):
        return torch.vmap(lambda x: torch_nat.na1d_qkvpacked(x, 3, rpb=rpb))(qkv).float().square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.func.grad(loss, argnums=(0, 1))(qkv, rpb)
    expected = torch.func.grad(loss, argnums=(0, 1))(qkv, rpb)
    assert [t.dtype for t in actual] == [torch.float32] * 2
    for x, y in zip(actual, expected, strict=True):
        assert not torch.equal(x, y)
        torch.testing.assert_close(x, y, rtol=0, atol=0.03 * y.abs().max().item())
