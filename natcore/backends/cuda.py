"""CUDA: plans run through the driver.

A prepared call is a `CudaExecutable`: kernel handles, grids and a packing of all parameters into one block
of memory. Running it again packs the pointers and launches; nothing is hashed or looked up.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from natcore.device import (
    check,
    current,
    device_count,
    driver,
    facts,
    prepare_launch,
    primary_context,
    while_capturing,
)
from natcore.errors import CudaError
from natcore.planning import Config, Constant, Launch, Operand, Param, Plan, Scale, Workspace, facts_for_arch, plan_for
from natcore.problem import Call
from natcore.views import Device

__all__ = ["BACKEND", "LoadedPlan", "device_count", "facts", "facts_for_arch", "load_plan", "plan_for"]


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and, for each of its launches, the address of its loaded CUkernel.

    Every launch has been checked against the GPU's limits and granted its shared memory. Operands
    must be aligned as their parameters say (`Operand.alignment`).
    """

    plan: Plan
    kernels: tuple[int, ...]


_GRAPHS_OVERLAP = 12030  # the driver version from which launches that overlap may be captured


@lru_cache(maxsize=4096)
def load_plan(call: Call, device_index: int, config: Config | None) -> LoadedPlan:
    """The plan of a call with its kernels compiled and loaded.

    Raises NotImplementedError where no kernel can run the call, CompileError, or CudaError.
    """
    plan = plan_for(call, facts(device_index), config)
    if check(driver().cuDriverGetVersion(), "cuDriverGetVersion") < _GRAPHS_OVERLAP:
        plan = replace(plan, launches=tuple(replace(launch, overlaps=False) for launch in plan.launches))
    with ThreadPoolExecutor(max(len(plan.launches), 1)) as pool:  # what is compiled, is compiled at once
        kernels = pool.map(lambda launch: int(prepare_launch(launch, device_index)), plan.launches)
        return LoadedPlan(plan, tuple(kernels))


#: For operands that are not aligned to the width of vector loads.
_UNALIGNED = Config("general", (("vector", 1),))

_SCALES = {"float32": ctypes.c_float, "float64": ctypes.c_double}


class _Block:
    """One thread's parameters of a prepared call, and all arguments of its launches."""

    __slots__ = ("address", "launches", "scale", "scales", "slots", "stream", "tables")

    def __init__(self, slots: int) -> None:
        self.slots = (ctypes.c_uint64 * max(slots, 1))()
        self.address = ctypes.addressof(self.slots)
        self.scale: float | None = None  # as it lies in the slots
        self.scales: list[tuple[Any, float]] = []  # where it lies, and times what
        self.stream: int | None = None  # of the configurations
        self.launches: list[tuple[Any, Any, int]] = []  # configuration, kernel, address of its table of parameters
        self.tables: list[Any] = []  # kept alive

    def add(self, configuration: Any, kernel: Any, starts: list[int]) -> None:
        """One more launch, whose parameters start at these bytes."""
        self.tables.append((ctypes.c_void_p * len(starts))(*(self.address + start for start in starts)))
        self.launches.append((configuration, kernel, ctypes.addressof(self.tables[-1])))

    def set_scale(self, scale: float) -> None:
        for place, factor in self.scales:
            place.value = scale * factor
        self.scale = scale

    def set_stream(self, stream: int, handle: Any) -> None:
        for configuration, *_ in self.launches:
            configuration.hStream = handle
        self.stream = stream


class CudaExecutable:
    """One prepared call on one GPU. Safe to run from many threads at once.

    One block of memory holds every distinct parameter in 8-byte slots: first all operands, then
    workspace addresses, scales and constants. Each launch has an array of pointers into it, which is
    what cuLaunchKernelEx takes. Launches drop the GIL, so each thread has a block of its own.
    """

    def __init__(self, call: Call, device_index: int, config: Config | None) -> None:
        self._call, self._device_index, self._config = call, device_index, config
        with while_capturing():
            loaded = load_plan(call, device_index, config)
            self._context = int(primary_context(device_index))
        self._local = threading.local()
        self._lay_out(loaded.plan, len(call.operands))
        module = driver()
        # What every launch needs, looked up once.
        self._launch_kernel, self._stream_handle = module.cuLaunchKernelEx, module.CUstream
        self._current_context = module.cuCtxGetCurrent
        self._kernels = [module.CUfunction(kernel) for kernel in loaded.kernels]
        self._launches = loaded.plan.launches
        self.workspace_bytes = loaded.plan.workspace_bytes
        if self._alignments and config is None:
            # The kernels for unaligned pointers share the workspace that is asked for before pointers are known.
            unaligned = plan_for(call, facts(device_index), _UNALIGNED)
            self.workspace_bytes = max(self.workspace_bytes, unaligned.workspace_bytes)

    def _lay_out(self, plan: Plan, operands: int) -> None:
        """Where each parameter starts in the block, and how they are packed."""
        params = list(dict.fromkeys(p for launch in plan.launches for p in launch.params))
        aligned = {p.index: p.alignment - 1 for p in params if isinstance(p, Operand) and p.alignment > 1}
        self._alignments = tuple(aligned.items())
        self._offsets = tuple(p.offset for p in params if isinstance(p, Workspace))
        self._addresses = operands + len(self._offsets)
        self._starts: dict[Param, int] = {p: 8 * p.index for p in params if isinstance(p, Operand)}
        slot = operands
        for p in [p for kind in (Workspace, Scale) for p in params if isinstance(p, kind)]:
            self._starts[p], slot = 8 * slot, slot + 1
        self._constants = []
        for p in [p for p in params if isinstance(p, Constant)]:
            self._starts[p], slot = 8 * slot, slot + -(-len(p.data) // 8)
            self._constants.append((self._starts[p], p.data))
        self._slots = slot

    def __call__(self, pointers: Sequence[int], scale: float, stream: int = 0, workspace: int = 0) -> None:
        """As `natcore.backends.Executable`. Raises ValueError for a misaligned pointer under an explicit config."""
        for index, mask in self._alignments:
            if pointers[index] & mask:
                self._for_unaligned(index, pointers[index], mask + 1)(pointers, scale, stream, workspace)
                return
        try:
            block = self._local.block
        except AttributeError:
            block = self._local.block = self._make_block()
        if self._offsets:
            pointers = [*pointers, *[workspace + offset for offset in self._offsets]]
        block.slots[: self._addresses] = pointers
        if scale != block.scale:
            block.set_scale(scale)
        if stream != block.stream:
            block.set_stream(stream, self._stream_handle(stream))
        if stream == 0:
            # The default stream is the current context's own, so the context must be right.
            error, context = self._current_context()
            if error or int(context) != self._context:
                with current(self._device_index):
                    self._launch(block)
                return
        self._launch(block)

    def _launch(self, block: _Block) -> None:
        launch = self._launch_kernel
        for configuration, kernel, params in block.launches:
            (error,) = launch(configuration, kernel, params, 0)
            if error:
                self._recover(error, configuration, kernel, params)

    def _make_block(self) -> _Block:
        block = _Block(self._slots)
        for start, data in self._constants:
            ctypes.memmove(block.address + start, data, len(data))
        for param, start in self._starts.items():
            if isinstance(param, Scale):
                block.scales.append((_SCALES[param.dtype].from_buffer(block.slots, start), param.factor))
        for kernel, launch in zip(self._kernels, self._launches, strict=True):
            block.add(_configuration(launch), kernel, [self._starts[p] for p in launch.params])
        return block

    def _for_unaligned(self, index: int, pointer: int, alignment: int) -> CudaExecutable:
        if self._config is not None:
            raise ValueError(
                f"{self._call.operands[index]} lies at {pointer:#x}, not a multiple of the {alignment} bytes that "
                f"config {self._config} needs. Leave config away, or copy the array."
            )
        return _unaligned_executable(self._call, self._device_index)

    def _recover(self, error: Any, configuration: Any, kernel: Any, params: int) -> None:
        """A thread without a current context, or with another GPU's, gets the right one for this launch."""
        if error.name in ("CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_INVALID_HANDLE"):
            with current(self._device_index):
                (error,) = self._launch_kernel(configuration, kernel, params, 0)
        if error:
            raise CudaError(f"launching a kernel on cuda:{self._device_index} failed: {error.name}.")


def _configuration(launch: Launch) -> Any:
    """The CUlaunchConfig of a launch, but for the stream."""
    module = driver()
    configuration = module.CUlaunchConfig()
    configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = launch.grid
    configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = launch.block
    configuration.sharedMemBytes = launch.shared_bytes
    if launch.overlaps:
        attribute, value = module.CUlaunchAttribute(), module.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute.id = module.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        configuration.attrs, configuration.numAttrs = [attribute], 1
    return configuration


@lru_cache(maxsize=1024)
def _unaligned_executable(call: Call, device_index: int) -> CudaExecutable:
    return CudaExecutable(call, device_index, _UNALIGNED)


class CudaBackend:
    """`natcore.backends.Backend` for NVIDIA GPUs."""

    def prepare(self, call: Call, device: Device, config: Config | None = None) -> CudaExecutable:
        """Raises NotImplementedError, CompileError or CudaError as `load_plan` does."""
        return CudaExecutable(call, device.index, config)


BACKEND = CudaBackend()
