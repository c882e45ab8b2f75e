"""Choosing how to run a call: pure functions from (call, device facts) to a plan. No GPU needed.

A `Plan` is a plain value: which kernels, compiled with which defines, launched how, with which
parameters. `natcore.backends.cuda` runs it through cuda-python; jax_nat flattens the same plan for
its XLA handler.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """An explicit choice of kernel and its parameters, in place of the planner's own.

    ``kernel`` names a candidate of this module; ``options`` are its (name, value) pairs.
    """

    kernel: str
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class DeviceFacts:
    """What planning needs to know about a GPU; for compute capability 9.0, ``arch`` is "sm_90a"."""

    arch: str
    multiprocessors: int
    shared_bytes_per_block: int  # the opt-in limit
    l2_bytes: int


@dataclass(frozen=True)
class KernelSpec:
    """One cubin: a file under cuda_src/kernels (its extern "C" function has the file's name) and its defines."""

    name: str
    defines: tuple[tuple[str, str], ...]
    arch: str


@dataclass(frozen=True)
class Operand:
    """A kernel parameter: the pointer of ``OPERANDS[direction][index]``, 0 where absent."""

    index: int


@dataclass(frozen=True)
class Workspace:
    """A kernel parameter: the workspace's address plus an offset in bytes."""

    offset: int


@dataclass(frozen=True)
class Scale:
    """A kernel parameter: the call's scale times ``factor``, as float32 or float64."""

    dtype: str
    factor: float = 1.0


@dataclass(frozen=True)
class Constant:
    """A kernel parameter passed by value: a scalar or a struct (sizes, strides), as its bytes."""

    data: bytes


Param = Operand | Workspace | Scale | Constant


@dataclass(frozen=True)
class Launch:
    kernel: KernelSpec
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int  # dynamic shared memory
    params: tuple[Param, ...]


@dataclass(frozen=True)
class Plan:
    """Launches, in stream order, and the scratch memory that they share."""

    launches: tuple[Launch, ...]
    workspace_bytes: int
