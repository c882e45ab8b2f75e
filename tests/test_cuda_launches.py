"""What a CUDA executable hands to the driver, read back from its memory; the driver is a recorder, no GPU is needed."""

from __future__ import annotations

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from natcore.backends import cuda
from natcore.planning import Config, Constant, Launch, Operand, Param, Scale, Workspace, facts_for_arch, plan_for
from natcore.planning.listed import contiguous_call
from natcore.problem import Call, Direction, Problem, Window

FACTS = facts_for_arch("sm_90a")
CONTEXT, ELSEWHERE = 77, 78
GENERAL = Config("general")
#: Tensor core kernels of small and of large maps, overlapping launches, a double-precision scale, many operands.
PROBLEMS = {
    "small": (Problem(Window.of(2, 7), 2, (7, 7), 2, 2, 32, 32, 0, "float16", "float32"), None),
    "large": (Problem(Window.of(2, 7), 2, (28, 28), 2, 2, 32, 32, 0, "bfloat16", "bfloat16"), None),
    "double": (Problem(Window.of(1, 3), 1, (9,), 4, 2, 8, 5, 3, "float64", "float64"), GENERAL),
    "dropout": (Problem(Window.of(1, 3), 1, (9,), 1, 1, 8, 8, 2, "float32", None, 0.5), GENERAL),
}


class Driver:
    """Keeps, for each launch: the current context, stream, grid, whether it overlaps, its parameters' bytes."""

    CUfunction = CUstream = int
    CUlaunchAttribute = CUlaunchAttributeValue = SimpleNamespace
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)

    def __init__(self, launches: tuple[Launch, ...]) -> None:
        self.expected = launches
        self.found: list[tuple[Any, ...]] = []
        self.context = CONTEXT

    def CUlaunchConfig(self) -> SimpleNamespace:
        return SimpleNamespace(numAttrs=0, hStream=None)

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuLaunchKernelEx(self, configuration: Any, kernel: int, params: int, extra: int) -> tuple[int]:
        sizes = [size_of(param) for param in self.expected[kernel].params]
        table = (ctypes.c_void_p * len(sizes)).from_address(params)
        given = [ctypes.string_at(place or 0, size) for place, size in zip(table, sizes, strict=True)]
        grid = (configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ)
        self.found.append((self.context, configuration.hStream, grid, bool(configuration.numAttrs), given))
        return (0,)


class Pushed:
    """As `natcore.device.current`."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.before = driver, driver.context

    def __enter__(self) -> None:
        self.driver.context = CONTEXT

    def __exit__(self, *_: object) -> None:
        self.driver.context = self.before


def size_of(param: Param) -> int:
    if isinstance(param, Constant):
        return len(param.data)
    return 4 if isinstance(param, Scale) and param.dtype == "float32" else 8


def bytes_of(param: Param, pointers: list[int], scale: float, workspace: int) -> bytes:
    if isinstance(param, Operand):
        return struct.pack("=Q", pointers[param.index])
    if isinstance(param, Workspace):
        return struct.pack("=Q", workspace + param.offset)
    if isinstance(param, Scale):
        return struct.pack({"float32": "=f", "float64": "=d"}[param.dtype], scale * param.factor)
    return param.data


@pytest.mark.parametrize("direction", get_args(Direction)[:2])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_parameter_of_every_launch(monkeypatch: pytest.MonkeyPatch, name: str, direction: Direction) -> None:
    """Over changing pointers, scales, streams, workspaces and contexts, in two threads."""
    problem, config = PROBLEMS[name]
    call: Call = contiguous_call(direction, problem)
    plan = plan_for(call, FACTS, config)
    driver = Driver(plan.launches)
    for what, value in {
        "driver": lambda: driver,
        "facts": lambda index: FACTS,
        "load_plan": lambda *_: cuda.LoadedPlan(plan, tuple(range(len(plan.launches)))),
        "primary_context": lambda index: CONTEXT,
        "while_capturing": nullcontext,
        "current": lambda index: Pushed(driver),
    }.items():
        monkeypatch.setattr(cuda, what, value)
    executable = cuda.CudaExecutable(call, 0, config)

    def run(first: int, scale: float, stream: int, workspace: int, context: int) -> None:
        driver.context = context
        driver.found.clear()
        pointers = [0 if s is None else (1 << 46) + 4096 * (first + i) for i, s in enumerate(call.strides)]
        executable(pointers, scale, stream, workspace)
        where = CONTEXT if stream == 0 else context  # the default stream is the current context's
        assert driver.context == context
        assert driver.found == [
            (where, stream, x.grid, x.overlaps, [bytes_of(p, pointers, scale, workspace) for p in x.params])
            for x in plan.launches
        ]

    def several() -> None:
        run(0, 0.5, 0, 1 << 40, CONTEXT)
        run(7, 0.5, 5, 1 << 41, CONTEXT)
        run(3, 0.25, 5, 1 << 42, ELSEWHERE)
        run(3, 0.0, 0, 1 << 40, ELSEWHERE)
        run(3, -1.5, 6, 1 << 40, CONTEXT)

    several()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(several).result()
    run(0, 0.5, 0, 1 << 40, CONTEXT)
