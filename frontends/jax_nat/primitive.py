"""The one JAX primitive: neighbourhood attention, either direction, as an XLA custom call.

It is not differentiable by itself (`jax_nat.functional` puts a custom_vjp around it). Under vmap the
mapped axis becomes part of the batch, or of the heads where each element needs its own bias table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_nat import handler
from jax_nat.spec import Source, Spec
from natcore.planning import Config
from natcore.problem import OPERANDS, RESULTS, Direction, Problem, call_of
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides

_PACKED = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "dq": ("dqkv", 0), "dk": ("dqkv", 1), "dv": ("dqkv", 2)}


@dataclass(frozen=True)
class Request:
    """All that is static about one call. ``omitted`` names optional operands that it does without.

    With ``packed``, q, k and v (dq, dk and dv) are slices of one buffer [batch, *spatial, 3, heads, head_dim].
    """

    direction: Direction
    problem: Problem
    packed: bool
    scale: float
    config: Config | None
    omitted: frozenset[str] = frozenset()

    def buffer_of(self, operand: str) -> tuple[str, int]:
        """The array that holds an operand, and which third of it."""
        return _PACKED.get(operand, (operand, 0)) if self.packed else (operand, 0)

    @cached_property
    def present(self) -> tuple[str, ...]:
        names = OPERANDS[self.direction]
        return tuple(name for name in names if self.problem.has(name) and name not in self.omitted)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The arrays that go in, in order."""
        results = RESULTS[self.direction]
        return tuple(dict.fromkeys(self.buffer_of(name)[0] for name in self.present if name not in results))

    @cached_property
    def results(self) -> tuple[str, ...]:
        """The arrays that come out, in order."""
        results = RESULTS[self.direction]
        return tuple(dict.fromkeys(self.buffer_of(name)[0] for name in self.present if name in results))

    def shape_of(self, array: str) -> tuple[int, ...]:
        if array in ("qkv", "dqkv"):
            *lead, heads, head_dim = self.problem.shapes["q"]
            return (*lead, 3, heads, head_dim)
        return self.problem.shapes[array]

    def dtype_of(self, array: str) -> np.dtype:
        return jnp.dtype(self.problem.dtype_of(array))

    def view_of(self, operand: str) -> View:
        array, _ = self.buffer_of(operand)
        shape, dtype = self.shape_of(array), self.problem.dtype_of(operand)
        strides = contiguous_strides(shape)
        if array != operand:
            shape, strides = (*shape[:-3], *shape[-2:]), (*strides[:-3], *strides[-2:])
        return View(0, shape, strides, dtype, Device("cpu"))

    @cached_property
    def spec(self) -> Spec:
        call = call_of(self.direction, self.problem, {name: self.view_of(name) for name in self.present})
        return Spec(call, self.scale, self.config, tuple(map(self._source, call.operands)), len(self.results))

    def _source(self, operand: str) -> Source | None:
        if operand not in self.present:
            return None
        array, part = self.buffer_of(operand)
        arrays = self.results if operand in RESULTS[self.direction] else self.arguments
        third = self.problem.heads * self.problem.head_dim * ITEM_SIZES[self.problem.dtype]
        return Source(arrays is self.results, arrays.index(array), part * third)


neighborhood_attention_p = Primitive("neighborhood_attention")
neighborhood_attention_p.multiple_results = True


def run(request: Request, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The results of a request, by name; ``arrays`` may hold more than it needs."""
    results = neighborhood_attention_p.bind(*(arrays[name] for name in request.arguments), request=request)
    return dict(zip(request.results, results, strict=True))


@lru_cache(maxsize=4096)
def _compiled(request: Request) -> Any:
    return jax.jit(partial(neighborhood_attention_p.bind, request=request))


@neighborhood_attention_p.def_impl
def _run_eagerly(*arrays: jax.Array, request: Request) -> Sequence[jax.Array]:
    return _compiled(request)(*arrays)


@neighborhood_attention_p.def_abstract_eval
def _abstract(*avals: Any, request: Request) -> list[Any]:
    """Results vary over the mesh axes that the inputs vary over (shard_map), and are not sharded otherwise."""

    def result(name: str) -> Any:
        shape = request.shape_of(name)
        sharding = NamedSharding(avals[0].sharding.mesh, PartitionSpec(*(None for _ in shape)))
        return avals[0].update(shape=shape, dtype=request.dtype_of(name), weak_type=False, sharding=sharding)

    return [result(name) for name in request.results]


def _lower(platform: str, ctx: Any, *operands: Any, request: Request) -> Any:
    handler.register(platform)
    workspace = handler.workspace_bytes(platform, request.spec)

    def call(*arrays: jax.Array) -> Sequence[jax.Array]:
        shapes = [(request.shape_of(name), request.dtype_of(name)) for name in request.results]
        shapes += [((workspace,), jnp.dtype("uint8"))] if workspace else []
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        attributes = {"key": np.int64(request.spec.key), "spec": request.spec.text}
        return jax.ffi.ffi_call(handler.TARGET, results)(*arrays, **attributes)[: len(request.results)]

    return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


for _platform in handler.PLATFORMS:
    mlir.register_lowering(neighborhood_attention_p, partial(_lower, _platform), platform=_platform)


def _batch(arrays: Sequence[Any], axes: Sequence[Any], *, request: Request) -> tuple[list[Any], list[int]]:
    """vmap: n calls become one with n times the batch, or n times the heads.

    A bias table belongs to a head, and its gradient sums over the batch; so where every element has its
    own table, or needs its own gradient of it, the mapped axis joins the heads (kv head groups stay
    together, for the element is the outer index on both sides). With dropout the elements are computed one
    after the other, since what a seed drops depends on the shape.
    """
    if request.problem.dropout_p > 0:
        return _one_by_one(arrays, axes, request)
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    names = request.arguments
    table_mapped = "rpb" in names and axes[names.index("rpb")] is not None
    by_head = table_mapped or ("rpb" in names and request.direction.endswith("backward"))
    problem = request.problem
    if by_head:
        wide = replace(problem, heads=size * problem.heads, heads_kv=size * problem.heads_kv)
    else:
        wide = replace(problem, batch=size * problem.batch)
    wide_request = replace(request, problem=wide)
    folded = []
    for name, x, axis in zip(names, arrays, axes, strict=True):
        if name == "rpb" and not by_head:
            folded.append(x)
            continue
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        place = _head_axis(name, x.ndim - 1) if by_head else 0
        folded.append(jnp.moveaxis(x, 0, place).reshape(wide_request.shape_of(name)))
    results = neighborhood_attention_p.bind(*folded, request=wide_request)
    unfolded, places = [], []
    for name, x in zip(request.results, results, strict=True):
        shape = request.shape_of(name)
        place = _head_axis(name, len(shape)) if by_head else 0
        unfolded.append(x.reshape((*shape[:place], size, *shape[place:])))
        places.append(place)
    return unfolded, places


def _one_by_one(arrays: Sequence[Any], axes: Sequence[Any], request: Request) -> tuple[list[Any], list[int]]:
    mapped = [jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True) if axis is not None]

    def one(slices: Sequence[Any]) -> list[Any]:
        parts = iter(slices)
        given = [x if axis is None else next(parts) for x, axis in zip(arrays, axes, strict=True)]
        return neighborhood_attention_p.bind(*given, request=request)

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


def _head_axis(array: str, rank: int) -> int:
    """The axis of the heads in an array of this rank."""
    if array in ("rpb", "drpb"):
        return 0
    return rank - 1 if array in ("lse", "d_lse") else rank - 2


batching.primitive_batchers[neighborhood_attention_p] = _batch
