"""A CUDA plan as a block of 64-bit words, and the table in which native code finds it.

    block:   key | device | workspace bytes | workspace result | launches | launch...
    launch:  kernel | CUlaunchConfig: 7 words | parameters | (kind, value, offset)...

A parameter is an address of its bytes (constants, scale, absent operands), or an argument or result
buffer, or the workspace, each plus an offset. The last three are resolved on every call.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from jax_nat.spec import Spec
from natcore.planning import Constant, Launch, Operand, Param, Plan, Scale, Workspace


class Block(NamedTuple):
    """The offset in bytes of each field of a block."""

    key: int = 0
    device: int = 8
    workspace_bytes: int = 16
    workspace_result: int = 24
    launches: int = 32
    first_launch: int = 40


class LaunchBlock(NamedTuple):
    """The offset in bytes of each field of a launch."""

    kernel: int = 0
    config: int = 8
    parameters: int = 64
    first_parameter: int = 72


BLOCK, LAUNCH = Block(), LaunchBlock()
CONFIG_WORDS = 7
CONFIG_STREAM = 4  # the word of CUlaunchConfig that holds the stream
# Kinds of parameters.
VALUE, ARGUMENT, RESULT, WORKSPACE = range(4)
PARAMETER_WORDS = 3
MAX_PARAMETERS = 120

ALIGNMENT = 256  # of the workspace; XLA promises less for its buffers
MESSAGES = 1000  # CUresult ends at 999

#: A CUlaunchAttribute of 72 bytes: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6, its value, true, at 8.
_OVERLAPS = struct.pack("=i4xi60x", 6, 1)
_SCALES = {"float32": "f", "float64": "d"}


class FlatPlan:
    """One plan in native memory, with all that it points to. Never freed once in a table."""

    def __init__(self, plan: Plan, kernels: Sequence[int], spec: Spec, device: int) -> None:
        self.key, self.device = spec.key, device
        self._held: list[ctypes.Array] = []
        words = [spec.key, device, plan.workspace_bytes, spec.results, len(plan.launches)]
        for launch, kernel in zip(plan.launches, kernels, strict=True):
            words += self._launch(launch, kernel, spec)
        self.words = array("q", words)
        self.address, _ = self.words.buffer_info()

    def _launch(self, launch: Launch, kernel: int, spec: Spec) -> list[int]:
        if len(launch.params) > MAX_PARAMETERS:
            raise NotImplementedError(
                f"{launch.kernel.name} takes {len(launch.params)} parameters; at most {MAX_PARAMETERS} are supported."
            )
        # CUlaunchConfig: grid x y z, block x y z, dynamic shared memory, stream, attributes, their number
        attributes = (self._hold(_OVERLAPS), 1) if launch.overlaps else (0, 0)
        config = struct.pack("=7I4x3q", *launch.grid, *launch.block, launch.shared_bytes, 0, *attributes)
        words = [kernel, *struct.unpack(f"={CONFIG_WORDS}q", config), len(launch.params)]
        for param in launch.params:
            words += self._param(param, spec)
        return words

    def _param(self, param: Param, spec: Spec) -> tuple[int, int, int]:
        match param:
            case Operand(index, alignment):
                source = spec.sources[index]
                if source is None:
                    return VALUE, self._hold(bytes(8)), 0
                if source.offset % alignment:
                    operand = spec.call.operands[index]
                    raise NotImplementedError(
                        f"{operand} starts {source.offset} bytes into the packed array, but this kernel needs it "
                        f"aligned to {alignment}. Pass q, k and v apart."
                    )
                return (RESULT if source.is_result else ARGUMENT), source.buffer, source.offset
            case Workspace(offset):
                return WORKSPACE, 0, offset
            case Scale(dtype, factor):
                return VALUE, self._hold(struct.pack(_SCALES[dtype], spec.scale * factor)), 0
            case Constant(data):
                return VALUE, self._hold(data), 0
        raise NotImplementedError(f"natcore's JAX handler does not know the parameter {param!r}.")

    def _hold(self, data: bytes) -> int:
        """The address of a copy, aligned for every scalar."""
        copy = (ctypes.c_double * (-(-len(data) // 8) or 1))()
        ctypes.memmove(copy, data, len(data))
        self._held.append(copy)
        return ctypes.addressof(copy)


class PlanTable:
    """(key, device) -> block, for readers without the GIL or a lock.

    Open addressing over block addresses. A reader loads the table's address and size from ``cell``, then
    walks from ``key + device``, and takes a block whose first two words agree; a block is complete before its
    address is stored. Growth publishes a new table; old ones stay, for a reader may be in them.
    """

    def __init__(self, size: int = 1024) -> None:
        self._lock = threading.Lock()
        self._plans: dict[tuple[int, int], FlatPlan] = {}
        self._tables = [self._table(size)]
        self._cell = array("q", [self._tables[0].buffer_info()[0]])
        self.cell = self._cell.buffer_info()[0]

    @staticmethod
    def _table(size: int) -> array:
        """mask | entry..., with ``size`` entries, a power of two."""
        return array("q", [size - 1, *[0] * size])

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._plans

    def add(self, plan: FlatPlan) -> None:
        """Keeps the first plan where two threads bring the same."""
        with self._lock:
            place = plan.key, plan.device
            if place in self._plans:
                return
            self._plans[place] = plan
            table = self._tables[-1]
            if 2 * len(self._plans) < len(table):
                self._insert(table, plan)
                return
            table = self._table(2 * (len(table) - 1))
            for each in self._plans.values():
                self._insert(table, each)
            self._tables.append(table)
            self._cell[0] = table.buffer_info()[0]

    @staticmethod
    def _insert(table: array, plan: FlatPlan) -> None:
        mask = table[0]
        entry = (plan.key + plan.device) & mask
        while table[1 + entry]:
            entry = (entry + 1) & mask
        table[1 + entry] = plan.address
