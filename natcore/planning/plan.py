"""A plan is a plain value: which kernels, compiled with which defines, launched how, with which parameters.

`natcore.backends.cuda` runs it through cuda-python; jax_nat flattens the same plan for its XLA
handler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from natcore.problem import Call, Direction


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
    """A kernel parameter: the pointer of ``OPERANDS[direction][index]``, 0 where absent.

    ``alignment`` is what the kernel takes for granted of the address, in bytes; 1 = the dtype's own.
    """

    index: int
    alignment: int = 1


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
    #: Its blocks may start before those of the launch before it have ended, for its kernel waits for what it needs from
    #: that one (cuda_src/ptx/grid.cuh). Compute capability 9.0 and later.
    overlaps: bool = False


@dataclass(frozen=True)
class Plan:
    """Launches, in stream order, and the scratch memory that they share."""

    launches: tuple[Launch, ...]
    workspace_bytes: int


@dataclass(frozen=True)
class KernelInfo:
    """What a kernel declares about itself; the compile check holds it to this.

    ``architectures`` lists "sm_90a" (this one alone) or "sm_80+" (this one and all later).
    """

    name: str
    architectures: tuple[str, ...]
    max_registers: int  # a thread
    max_shared_bytes: int  # static, a block
    max_spilled_bytes: int = 0  # stored and loaded

    def runs_on(self, arch: str) -> bool:
        return any(
            capability(arch) >= capability(entry) if entry.endswith("+") else arch == entry
            for entry in self.architectures
        )


@dataclass(frozen=True)
class Candidate:
    """One way to run calls: whether it can, how, and the calls at which its kernels are checked."""

    name: str
    kernels: tuple[KernelInfo, ...]
    options: tuple[str, ...]  # the names that a Config may set
    refusal: Callable[[Call, DeviceFacts], str | None]  # why it cannot run the call; None = it can
    plan: Callable[[Call, DeviceFacts, Mapping[str, int]], Plan]
    listed: Callable[[], tuple[Call, ...]]
    directions: tuple[Direction, ...] = ("forward", "backward")
    dropout: bool = False  # whether it drops attention weights
    #: What a call that it can run costs, in clocks of the busiest multiprocessor, by its cost model.
    clocks: Callable[[Call, DeviceFacts], float] | None = None


def capability(arch: str) -> int:
    """The compute capability times ten: 90 for "sm_90a" or "sm_90+"."""
    return int(arch.removeprefix("sm_").rstrip("+af"))


_ARCHITECTURES = {  # multiprocessors, opt-in shared memory of a block, L2, of a common GPU of each
    "sm_75": (40, 64 << 10, 4 << 20),  # T4
    "sm_80": (108, 163 << 10, 40 << 20),  # A100
    "sm_86": (84, 99 << 10, 6 << 20),  # A40
    "sm_89": (142, 99 << 10, 96 << 20),  # L40
    "sm_90a": (132, 227 << 10, 50 << 20),  # H100, H200
    "sm_100a": (148, 227 << 10, 126 << 20),  # B200
    "sm_120": (188, 99 << 10, 128 << 20),  # RTX PRO 6000
}


def facts_for_arch(arch: str) -> DeviceFacts:
    """The facts of a common GPU of an architecture, to plan and compile for it without having one."""
    if arch not in _ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(_ARCHITECTURES)}.")
    return DeviceFacts(arch, *_ARCHITECTURES[arch])
