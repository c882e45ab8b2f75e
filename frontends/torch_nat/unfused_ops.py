"""Unfused attention as torch's dispatcher knows it: torch.ops.natcore.{qk, qk_backward, av, av_backward}.

The four are closed under differentiation (each is linear in each of its tensors), so gradients may be
differentiated again, any number of times:

    qk           ->  qk_backward  ->  qk, qk_backward
    av           ->  av_backward  ->  av, av_backward

Under torch.func the same formulas run through autograd Functions (`Functions`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from natcore import backends
from natcore.planning import Config
from natcore.problem import OPERANDS, RESULTS, Direction, call_of, check_operand
from natcore.unfused import unfused_problem_of
from natcore.views import View, contiguous_strides
from natcore.window import Window
from torch_nat import launch
from torch_nat.ops import LIBRARY, decode_config, decode_window
from torch_nat.transforms import MAP, RPB, cast_operands, fold, unfold

_QK, _AV = "str window, float scale, str? config", "str window, str? config"
_KEYS, _VALUES = "Tensor? rpb, Tensor? additional_keys", "Tensor? additional_values"
#: An absent optional gradient comes back as an empty tensor, since a schema cannot return Tensor?.
SCHEMAS: dict[Direction, str] = {
    "qk": f"(Tensor q, Tensor k, {_KEYS}, {_QK}) -> Tensor scores",
    "qk_backward": (
        f"(Tensor d_scores, Tensor q, Tensor k, {_KEYS}, {_QK}) "
        "-> (Tensor dq, Tensor dk, Tensor drpb, Tensor d_additional_keys)"
    ),
    "av": f"(Tensor weights, Tensor v, {_VALUES}, {_AV}) -> Tensor out",
    "av_backward": (
        f"(Tensor d_out, Tensor weights, Tensor v, {_VALUES}, {_AV}) "
        "-> (Tensor d_weights, Tensor dv, Tensor d_additional_values)"
    ),
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def inputs_of(direction: Direction) -> tuple[str, ...]:
    return tuple(name for name in OPERANDS[direction] if name not in RESULTS[direction])


#: How many arguments of an operation are tensors.
_TENSORS = {direction: len(inputs_of(direction)) for direction in SCHEMAS}


# CPU and CUDA kernels.


@lru_cache(maxsize=4096)
def _prepare(
    direction: Direction, window: Window, config: Config | None, *descriptions: launch.Description | None
) -> launch.Prepared:
    given = zip(inputs_of(direction), descriptions, strict=True)
    views = {name: None if d is None else launch.view_of(name, d) for name, d in given}
    problem = unfused_problem_of(direction, window, views)
    device = next(view.device for view in views.values() if view is not None)
    for name, view in views.items():
        if view is not None:
            check_operand(problem, name, view, device)
    shapes = {name: problem.shapes[name] for name in RESULTS[direction] if problem.has(name)}
    results = {n: View(0, s, contiguous_strides(s), problem.dtype_of(n), device) for n, s in shapes.items()}
    executable = backends.prepare(call_of(direction, problem, views | results), device, config)
    return launch.prepared_of(executable, 1.0, device, map(results.get, RESULTS[direction]))


def _kernel(direction: Direction) -> Callable:
    count, scaled = _TENSORS[direction], direction.startswith("qk")

    def kernel(*args: Any) -> Any:
        tensors, window, rest = args[:count], args[count], args[count + 1 :]
        if direction.endswith("backward"):
            tensors = (launch.readable(tensors[0]), *tensors[1:])
        described = [None if t is None else launch.describe(t) for t in tensors]
        prepared = _prepare(direction, decode_window(window), decode_config(rest[-1]), *described)
        results = launch.run(prepared, rest[0] if scaled else 1.0, tensors)
        results = [tensors[0].new_empty(0) if r is None else r for r in results]
        return results[0] if len(results) == 1 else tuple(results)

    return kernel


def _fake(direction: Direction) -> Callable:
    """Shapes alone, with the checks of the kernels."""
    count, names = _TENSORS[direction], inputs_of(direction)

    def fake(*args: Any) -> Any:
        given = dict(zip(names, args[:count], strict=True))
        window = decode_window(args[count])
        views = {name: None if t is None else launch.view_of(name, launch.describe(t)) for name, t in given.items()}
        problem, like = unfused_problem_of(direction, window, views), args[0]
        results = [
            like.new_empty(problem.shapes[name], dtype=launch.dtype_of(problem.dtype_of(name)))
            if problem.has(name)
            else like.new_empty(0)
            for name in RESULTS[direction]
        ]
        return results[0] if len(results) == 1 else tuple(results)

    return fake


# Gradients. ``of`` holds the four operations, or the four Functions.


def _setup(direction: Direction) -> Callable:
    count = _TENSORS[direction]

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.rest = inputs[count:]
        ctx.save_for_backward(*inputs[:count])

    return setup_context


def _qk_gradient(of: Any) -> Callable:
    def backward(ctx: Any, d_scores: Tensor | None) -> tuple:
        q, k, rpb, keys = ctx.saved_tensors
        if d_scores is None:
            return (None,) * (4 + len(ctx.rest))
        dq, dk, drpb, d_keys = of.qk_backward(d_scores, q, k, rpb, keys, *ctx.rest)
        return dq, dk, _if(rpb, drpb), _if(keys, d_keys), *(None for _ in ctx.rest)

    return backward


def _av_gradient(of: Any) -> Callable:
    def backward(ctx: Any, d_out: Tensor | None) -> tuple:
        weights, v, values = ctx.saved_tensors
        if d_out is None:
            return (None,) * (3 + len(ctx.rest))
        d_weights, dv, d_values = of.av_backward(d_out, weights, v, values, *ctx.rest)
        return d_weights, dv, _if(values, d_values), *(None for _ in ctx.rest)

    return backward


def _qk_second_gradient(of: Any) -> Callable:
    """Of dq = s ds k, dk = s ds^T q, drpb = sum ds, d_keys = s ds^T q, with cotangents a, b, c, e:

    d(ds) = s a k + s q b + c + ...,  d(q) = s ds b,  d(k) = s ds^T a,  all of them qk or qk_backward.
    """

    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, e: Tensor | None) -> tuple:
        ds, q, k, rpb, keys = ctx.saved_tensors
        a, b, c, e = _cotangent(a, q), _cotangent(b, k), _cotangent(c, rpb), _cotangent(e, keys)
        scores = of.qk(a, k, None, keys, *ctx.rest) + of.qk(q, b, c, e, *ctx.rest)
        d_ds = scores.masked_fill(scores.detach() == -torch.inf, 0)  # a query has no gradient where it has no key
        dq = of.qk_backward(ds, q, b, None, e, *ctx.rest)[0]
        _, dk, _, d_keys = of.qk_backward(ds, a, k, None, keys, *ctx.rest)
        return d_ds, dq, dk, None, _if(keys, d_keys), *(None for _ in ctx.rest)

    return backward


def _av_second_gradient(of: Any) -> Callable:
    """Of d_weights = d_out v^T and dv = weights^T d_out, with cotangents a, b and e of the additional values."""

    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, e: Tensor | None) -> tuple:
        d_out, weights, v, values = ctx.saved_tensors
        a, b, e = _cotangent(a, weights), _cotangent(b, v), _cotangent(e, values)
        d_d_out = of.av(a, v, values, *ctx.rest) + of.av(weights, b, e, *ctx.rest)
        d_weights = of.av_backward(d_out, weights, b, e, *ctx.rest)[0]
        _, dv, d_values = of.av_backward(d_out, a, v, values, *ctx.rest)
        return d_d_out, d_weights, dv, _if(values, d_values), *(None for _ in ctx.rest)

    return backward


def _if(given: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if given is None else gradient


def _cotangent(given: Tensor | None, like: Any) -> Any:
    """What autograd hands over for ``like``: zeros where nothing is, and readable for the kernels."""
    if like is None:
        return None
    return torch.zeros_like(like) if given is None else launch.readable(given)


_GRADIENTS = {
    "qk": _qk_gradient,
    "qk_backward": _qk_second_gradient,
    "av": _av_gradient,
    "av_backward": _av_second_gradient,
}


#: The operations for torch.func, which asks for a Function where register_autograd's does not serve.
Functions = SimpleNamespace()


def _function(direction: Direction) -> Callable:
    operation = getattr(torch.ops.natcore, direction)
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *args: operation(*args)),
        "setup_context": staticmethod(lambda ctx, inputs, output: _setup(direction)(ctx, inputs, output)),
        "backward": staticmethod(_GRADIENTS[direction](Functions)),
    }
    return type(direction, (torch.autograd.Function,), members).apply


# vmap and autocast.


def _axes(names: tuple[str, ...]) -> tuple:
    return tuple(RPB if name.endswith("rpb") else MAP for name in names)


def _vmap(direction: Direction) -> Callable:
    """As for fused attention (`torch_nat.transforms`): the mapped axis joins the batch, or the heads where
    biases, or their gradients, differ along it."""
    operation, names, results = getattr(torch.ops.natcore, direction), inputs_of(direction), RESULTS[direction]
    axes, result_axes = _axes(names), _axes(results)

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        given = dict(zip(names, zip(args, in_dims, strict=False), strict=False))
        rpb, rpb_dim = given.get("rpb", (None, None))
        by_heads = rpb is not None and (rpb_dim is not None or direction.endswith("backward"))
        folded = [
            None if x is None else fold(x, dim, axis[by_heads], info.batch_size)
            for x, dim, axis in zip(args, in_dims, axes, strict=False)
        ]
        outputs = operation(*folded, *args[len(names) :])
        if isinstance(outputs, Tensor):
            return unfold(outputs, result_axes[0][by_heads], info.batch_size), 0
        present = [x.dim() > 1 for x in outputs]  # what is absent is an empty vector
        return (
            tuple(
                unfold(x, axis[by_heads], info.batch_size) if here else x
                for x, axis, here in zip(outputs, result_axes, present, strict=True)
            ),
            tuple(0 if here else None for here in present),
        )

    return rule


def cast(direction: Direction, args: tuple, device_type: str) -> tuple:
    """The arguments in the autocast dtype; a float32 table of biases stays what it is."""
    names = inputs_of(direction)
    return cast_operands(args, names.index("rpb") if "rpb" in names else -1, device_type)


def _autocast(direction: Direction, device_type: str) -> Callable:
    operation = getattr(torch.ops.natcore, direction)
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operation(*cast(direction, args, device_type))

    return kernel


def _register() -> None:
    for direction in SCHEMAS:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(direction, _kernel(direction), key)
        name = f"natcore::{direction}"
        torch.library.register_fake(name, _fake(direction), lib=LIBRARY)
        gradient = _GRADIENTS[direction](torch.ops.natcore)
        torch.library.register_autograd(name, gradient, setup_context=_setup(direction), lib=LIBRARY)
        torch.library.register_vmap(name, _vmap(direction), lib=LIBRARY)
        if not direction.endswith("backward"):
            for device_type in ("cpu", "cuda"):
                LIBRARY.impl(direction, _autocast(direction, device_type), f"Autocast{device_type.upper()}")
        setattr(Functions, direction, _function(direction))


_register()
