"""Neighbourhood attention for JAX: na1d, na2d, na3d and their packed forms, under jit, grad and vmap.

na2d -> checks (trace time) -> _attend: custom_vjp -> the primitive -> XLA custom call -> natcore
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_nat.primitive import Request, run
from natcore.planning import Config
from natcore.problem import Problem, Window, check_packed, problem_of
from natcore.views import Device, View, contiguous_strides

PerAxis = int | Sequence[int]
PerAxisFlag = bool | Sequence[bool]
Result = jax.Array | tuple[jax.Array, jax.Array]

_OPTIONAL = ("rpb", "additional_keys", "additional_values")


class _Static(NamedTuple):
    """What a traced call does not trace."""

    problem: Problem
    packed: bool
    scale: float
    return_lse: bool
    config: Config | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, arrays: dict[str, jax.Array]) -> Result:
    omitted = frozenset() if static.return_lse else frozenset({"lse"})
    results = run(_request(static, "forward", omitted), arrays)
    return (results["out"], results["lse"]) if static.return_lse else results["out"]


def _attend_fwd(static: _Static, arrays: dict[str, jax.Array]) -> tuple[Result, dict[str, jax.Array]]:
    results = run(_request(static, "forward"), arrays)
    answer = (results["out"], results["lse"]) if static.return_lse else results["out"]
    return answer, arrays | results


def _attend_bwd(static: _Static, saved: dict[str, jax.Array], cotangent: Result) -> tuple[dict[str, jax.Array]]:
    if isinstance(cotangent, jax.Array):
        cotangents, omitted = {"d_out": cotangent}, frozenset({"d_lse"})
    else:
        cotangents, omitted = {"d_out": cotangent[0], "d_lse": cotangent[1]}, frozenset()
    gradients = run(_request(static, "backward", omitted), saved | cotangents)
    packed = {"qkv": "dqkv"} if static.packed else {"q": "dq", "k": "dk", "v": "dv"}
    names = packed | {"rpb": "drpb", "additional_keys": "d_additional_keys", "additional_values": "d_additional_values"}
    answer: dict[str, Any] = {
        name: like(saved[name], gradients[gradient]) for name, gradient in names.items() if name in saved
    }
    if "dropout_seed" in saved:  # an integer: its gradient has no values
        answer["dropout_seed"] = np.zeros(saved["dropout_seed"].shape, jax.dtypes.float0)
    return (answer,)


_attend.defvjp(_attend_fwd, _attend_bwd)
_attend_jit = jax.jit(_attend, static_argnums=0)


def like(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """On a mesh with explicit axes, a gradient is sharded as its array."""
    sharding = jax.typeof(x).sharding
    return gradient if jax.typeof(gradient).sharding == sharding else jax.reshard(gradient, sharding)


def _request(static: _Static, direction: Any, omitted: frozenset[str] = frozenset()) -> Request:
    return Request(direction, static.problem, static.packed, static.scale, static.config, omitted)


def _call(
    rank: int, operands: dict[str, Any], packed: bool, window_arguments: tuple, scale: Any, return_lse: bool,
    config: Config | None, dropout: tuple[float, Any],
) -> Result:  # fmt: skip
    """Every check, then the call. ``operands`` maps q, k, v or qkv, and the optional names, to arrays or None."""
    arrays = {name: jnp.asarray(x) for name, x in operands.items() if x is not None}
    dropout_p = number("dropout_p", dropout[0])
    if dropout_p:
        arrays["dropout_seed"] = _seed(dropout_p, dropout[1])
    views = {name: view_of(x) for name, x in arrays.items()}
    views = _thirds(rank, views.pop("qkv")) | views if packed else views
    problem = problem_of(Window.of(rank, *window_arguments), views, dropout_p)
    scale = problem.default_scale if scale is None else number("scale", scale)
    static = _Static(problem, packed, scale, bool(return_lse), config)
    return _attend_jit(static, varying_alike(arrays))


def _seed(dropout_p: float, seed: Any) -> jax.Array:
    """uint32 [1] from a Python int or any integer array of one element."""
    if isinstance(seed, int) and not 0 <= seed < 1 << 32:
        raise ValueError(f"dropout_seed is {seed}; it must be in [0, 2 ** 32).")
    if seed is None or jnp.size(seed) != 1 or not (isinstance(seed, int) or jnp.issubdtype(seed.dtype, jnp.integer)):
        raise ValueError(f"dropout_p {dropout_p} needs a dropout_seed, an int or an integer array of one element.")
    return jnp.asarray(seed, jnp.uint32).reshape(1)


def view_of(x: jax.Array) -> View:
    return View(0, x.shape, contiguous_strides(x.shape), x.dtype.name, Device("cpu"))


def _thirds(rank: int, qkv: View) -> dict[str, View | None]:
    check_packed(rank, qkv.shape)
    shape, strides = ((*x[:-3], *x[-2:]) for x in (qkv.shape, qkv.strides))
    return {name: qkv._replace(shape=shape, strides=strides) for name in "qkv"}


def number(name: str, value: Any) -> float:
    if isinstance(value, Tracer):
        hint = " To differentiate or vary it, multiply q by it and pass scale=1.0." if name == "scale" else ""
        raise ValueError(f"{name} is a traced value; it must be a Python number.{hint}")
    return float(value)


def varying_alike(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Under shard_map: an operand shared by all shards (a bias table, say) is marked as varying like the others."""
    axes = {name: jax.typeof(x).mat.varying for name, x in arrays.items()}
    union = frozenset().union(*axes.values())
    return {
        name: x if axes[name] == union else jax.lax.pcast(x, tuple(union - axes[name]), to="varying")
        for name, x in arrays.items()
    }


def _make(rank: int) -> Any:
    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float | None = None, rpb: jax.Array | None = None,
        additional_keys: jax.Array | None = None, additional_values: jax.Array | None = None,
        return_lse: bool = False, dropout_p: float = 0.0, dropout_seed: int | jax.Array | None = None,
        config: Config | None = None,
    ) -> Result:  # fmt: skip
        operands = {"q": q, "k": k, "v": v} | dict(
            zip(_OPTIONAL, (rpb, additional_keys, additional_values), strict=True)
        )
        window, dropout = (kernel_size, stride, dilation, is_causal), (dropout_p, dropout_seed)
        return _call(rank, operands, False, window, scale, return_lse, config, dropout)

    return documented(attend, f"na{rank}d", _DOC, rank)


def _make_packed(rank: int) -> Any:
    def attend(
        qkv: jax.Array, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float | None = None, rpb: jax.Array | None = None,
        additional_keys: jax.Array | None = None, additional_values: jax.Array | None = None,
        return_lse: bool = False, dropout_p: float = 0.0, dropout_seed: int | jax.Array | None = None,
        config: Config | None = None,
    ) -> Result:  # fmt: skip
        operands = {"qkv": qkv} | dict(zip(_OPTIONAL, (rpb, additional_keys, additional_values), strict=True))
        window, dropout = (kernel_size, stride, dilation, is_causal), (dropout_p, dropout_seed)
        return _call(rank, operands, True, window, scale, return_lse, config, dropout)

    return documented(attend, f"na{rank}d_qkvpacked", _PACKED_DOC, rank)


def documented(function: Any, name: str, text: str, rank: int) -> Any:
    axes = ", ".join(("depth", "height", "width")[-rank:]) if rank > 1 else "length"
    tables = ", ".join(f"2 * kernel{a} - 1" for a in range(rank))
    function.__name__ = function.__qualname__ = name
    function.__module__ = "jax_nat"
    function.__doc__ = text.format(rank=rank, axes=axes, tables=tables)
    return function


_COMMON = """
    kernel_size, stride, dilation: int or one int per spatial axis, with kernel_size * dilation <=
        extent and 1 <= stride <= kernel_size.
    is_causal: bool or one bool per spatial axis.
    scale: a Python number, the factor on q . k before the softmax; default head_dim ** -0.5.
    rpb: relative positional bias [heads, {tables}], float32 or q's dtype, added unscaled
        (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, eq. 2).
    additional_keys, additional_values: [batch, extra, heads_kv, head_dim], seen by every query.
    dropout_p: a Python number in [0, 1), the probability with which an attention weight becomes 0 (the
        others are divided by 1 - dropout_p; the log-sum-exp is that of all).
    dropout_seed: an int or an integer array of one element, which may be traced: another seed compiles
        nothing. ``jax.random.bits(key, dtype="uint32")`` makes one of a key. The same seed drops the same
        weights on every device; under vmap and shard_map every part numbers its own weights, so give
        each a seed of its own.
    config: an explicit `natcore.Config` in place of the planner's choice.

float64 (where JAX has it enabled), float32, float16 or bfloat16; sums are in float32 or better. Runs
on the CPU and on CUDA, under jit, vmap and reverse-mode differentiation, with gradients for every
array, also through the log-sum-exp. `jax.export` needs
``DisabledSafetyCheck.custom_call(jax_nat.TARGET)``.

Returns out [batch, {axes}, heads, head_dim of v]; with return_lse also the log-sum-exp of the scores
[batch, {axes}, heads], natural log, float32 (float64 for float64 inputs).

Raises ValueError (naming argument, axis and numbers) for an invalid problem, when the call is traced;
NotImplementedError (naming the nearest supported case), when it is lowered, for one that the backend
cannot run.
"""
_DOC = (
    """{rank}-D neighborhood attention: every query attends to its nearest kernel_size keys.

    q: [batch, {axes}, heads, head_dim].
    k, v: [batch, {axes}, heads_kv, head_dim]; heads % heads_kv == 0; v may have its own head_dim."""
    + _COMMON
)
_PACKED_DOC = (
    """{rank}-D neighborhood attention on one array that holds q, k and v; its gradient is one array too.

    qkv: [batch, {axes}, 3, heads, head_dim]."""
    + _COMMON
)

na1d, na2d, na3d = (_make(rank) for rank in (1, 2, 3))
na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked = (_make_packed(rank) for rank in (1, 2, 3))
