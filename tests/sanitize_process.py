"""A process of tests/sanitize.py under a tool. It brings no framework, and little else, as there are many of them.

Cases run on memory of the driver's own: inputs are copied in, results are filled with NaN, and the workspace is left as
it comes, so that initcheck sees whoever reads what nobody wrote. Results are checked against the reference.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from natcore import compiling
from natcore.backends import cuda, prepare
from natcore.device import check as checked
from natcore.device import current, driver
from natcore.planning import Config, DeviceFacts
from natcore.planning.listed import contiguous_call
from natcore.problem import OPERANDS, RESULTS, Call, Direction, Problem, call_of
from natcore.views import Device, View, contiguous_strides
from tests import host
from tests.cases import Bounds, Case, bounds, check_bounds, expected, inputs, numpy_dtype, problem_for

#: Planted, to see that each tool reports it: an allocation too short, an input never written, a barrier left out.
FAULTS = {"memcheck": "short", "initcheck": "unwritten", "racecheck": "unsynchronised"}
FAULTY = "tiled"  # the kernel without its barrier
BARRIER = "__syncthreads();  // this round's span is there"


@dataclass(frozen=True)
class Job:
    """One case in one direction: its dtype, its config (a kernel's name alone: as that kernel cuts the map), and the
    multiprocessors that it is planned for, if not all."""

    case: Case
    direction: Direction
    dtype: str
    config: Config
    multiprocessors: int | None = None

    @property
    def problem(self) -> Problem:
        return problem_for(self.case, self.dtype)

    @property
    def call(self) -> Call:
        return contiguous_call(self.direction, self.problem)

    @property
    def name(self) -> str:
        options = "".join(f",{name}={value}" for name, value in self.config.options)
        return f"{self.direction}:{self.case.name}:{self.config.kernel}{options}" + (
            "" if self.multiprocessors is None else f":on_{self.multiprocessors}"
        )

    def facts(self, device: DeviceFacts) -> DeviceFacts:
        return device if self.multiprocessors is None else replace(device, multiprocessors=self.multiprocessors)


class Data(NamedTuple):
    """What a job needs besides the kernel: its operands, and what its results may be."""

    arrays: dict[str, np.ndarray]
    bounds: Bounds


def data_of(case: Case, direction: Direction, dtype: str) -> Data:
    backward = direction == "backward"
    arrays = inputs(case, dtype)
    found = bounds(case, dtype, arrays, saved_out=backward)
    if backward:
        forward = expected(case, arrays)
        arrays |= {"out": forward["out"].astype(numpy_dtype(dtype)), "lse": forward["lse"].astype(np.float32)}
    return Data(arrays, found)


class Memory:
    """Device memory of the driver's own, freed together."""

    def __init__(self) -> None:
        self._addresses: list[Any] = []

    def take(self, size: int) -> int:
        address = checked(driver().cuMemAlloc(max(size, 1)), f"cuMemAlloc({size})")
        self._addresses.append(address)
        return int(address)

    def free(self) -> None:
        for address in self._addresses:
            checked(driver().cuMemFree(address), "cuMemFree")
        self._addresses.clear()


@contextmanager
def planned_for(job: Job) -> Iterator[None]:
    """Plans are made for the job's multiprocessors meanwhile, and not remembered."""
    if job.multiprocessors is None:
        yield
        return
    facts = cuda.facts
    with mock.patch.object(cuda, "facts", lambda index: job.facts(facts(index))):
        prepare.cache_clear(), cuda.load_plan.cache_clear()
        yield
        prepare.cache_clear(), cuda.load_plan.cache_clear()


@contextmanager
def unsynchronised() -> Iterator[None]:
    """Kernels are compiled without the barrier meanwhile, and are not remembered as others."""
    with tempfile.TemporaryDirectory() as folder:
        sources = host.with_defect(Path(folder), "kernels/tiled_forward.cu", BARRIER, "")
        with mock.patch.object(compiling, "SOURCES", sources):
            compiling.sources_of.cache_clear()
            yield
            compiling.sources_of.cache_clear()


def run(job: Job, data: Data, fault: str | None = None) -> None:
    """The job on fresh memory. Raises AssertionError where a result is wrong."""
    memory = Memory()
    try:
        with planned_for(job), unsynchronised() if fault == "unsynchronised" else nullcontext():
            _run(job, data, fault, memory)
    finally:
        memory.free()


def _run(job: Job, data: Data, fault: str | None, memory: Memory) -> None:
    problem = job.problem
    views: dict[str, View] = {}
    for name in OPERANDS[job.direction]:
        if not problem.has(name):
            continue
        shape, dtype = problem.shapes[name], problem.dtype_of(name)
        size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
        planted = fault if name == "k" else None
        address = memory.take(size // 2 if planted == "short" else size)
        views[name] = View(address, shape, contiguous_strides(shape), dtype, Device("cuda", 0))
        if name in RESULTS[job.direction]:
            checked(driver().cuMemsetD8(address, 0xFF, size), "cuMemsetD8")
        elif planted is None:
            array = np.ascontiguousarray(data.arrays[name])
            checked(driver().cuMemcpyHtoD(address, array.ctypes.data, size), f"copying {name}")
    if job.case.packed:
        views |= _packed(data.arrays, views, memory)
    executable = prepare(call_of(job.direction, problem, views), Device("cuda", 0), job.config)
    workspace = memory.take(executable.workspace_bytes)
    scale = problem.default_scale if job.case.scale is None else job.case.scale
    executable([views[n].ptr if n in views else 0 for n in OPERANDS[job.direction]], scale, 0, workspace)
    checked(driver().cuCtxSynchronize(), "cuCtxSynchronize")
    results = {n: _read(views[n]) for n in RESULTS[job.direction] if n in views}
    check_bounds(job.case, job.dtype, data.bounds, results)


def _packed(host: dict[str, np.ndarray], views: dict[str, View], memory: Memory) -> dict[str, View]:
    """q, k and v as views of one [batch, *spatial, 3, heads, head_dim]."""
    whole = np.ascontiguousarray(np.stack([host[n] for n in "qkv"], axis=-3))
    address, strides = memory.take(whole.nbytes), contiguous_strides(whole.shape)
    checked(driver().cuMemcpyHtoD(address, whole.ctypes.data, whole.nbytes), "copying qkv")
    step = strides[-3] * whole.dtype.itemsize
    inner = (*strides[:-3], *strides[-2:])
    return {n: views[n]._replace(ptr=address + i * step, strides=inner) for i, n in enumerate("qkv")}


def _read(view: View) -> np.ndarray:
    data = np.empty(view.shape, numpy_dtype(view.dtype))
    checked(driver().cuMemcpyDtoH(data.ctypes.data, view.ptr, data.nbytes), "copying back")
    return data


def serve(address: Path) -> None:
    """Runs jobs that come from the other end, (job, file of its data, planted fault), until None comes; answers each
    with what is wrong ("": nothing) and the seconds that it took."""
    with Client(str(address), "AF_UNIX") as other, current(0):
        while (task := other.recv()) is not None:
            job, data, fault = task
            begin, wrong = time.perf_counter(), ""
            try:
                run(job, pickle.loads(Path(data).read_bytes()), fault)
            except AssertionError as error:
                wrong = str(error)
            other.send((wrong, time.perf_counter() - begin))
