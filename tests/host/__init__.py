"""Runs plans of the general kernels on the host: the kernels' own source, compiled by the system's C++ compiler.

With one lane a row and one thread a block (options that the plans take) a kernel is a plain loop, so
everything but the shuffles is tested without a GPU: geometry, strides, packing of parameters, plans.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from natcore.compiling import SOURCES
from natcore.planning import Config, Constant, KernelSpec, Launch, Operand, Plan, Scale, Workspace

HERE = Path(__file__).parent
CONFIG = Config("general", (("lanes", 1), ("threads", 1)))
COMPILER = shutil.which("g++") or shutil.which("c++")


def build(source: str, folder: Path, defines: Mapping[str, str]) -> ctypes.CDLL:
    """The shared library of a source in this folder, compiled with these defines, once per folder."""
    assert COMPILER is not None
    flags = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    target = folder / (hashlib.sha256(repr((source, flags)).encode()).hexdigest()[:16] + ".so")
    if not target.exists():
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{HERE}", f"-I{SOURCES}"]
        command = [COMPILER, *options, *flags, str(HERE / source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(target))


def kernel(spec: KernelSpec, folder: Path) -> ctypes.CDLL:
    names = {"KERNEL": spec.name, "KERNEL_FILE": f'"kernels/{spec.name}.cu"'}
    return build("kernel.cc", folder, dict(spec.defines) | names)


def run(plan: Plan, pointers: Sequence[int], scale: float, workspace: int, folder: Path) -> None:
    """As an executable of the CUDA backend, on host memory."""
    for launch in plan.launches:
        assert launch.block == (1, 1, 1) and launch.grid[1:] == (1, 1) and launch.shared_bytes == 0
        library = kernel(launch.kernel, folder)
        values = [_value(param, pointers, scale, workspace) for param in launch.params]
        _check_sizes(library, launch, values)
        table = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        library.launch(launch.grid[0], table)


def _value(param: object, pointers: Sequence[int], scale: float, workspace: int) -> ctypes._SimpleCData | ctypes.Array:
    match param:
        case Operand(index=index, alignment=alignment):
            assert pointers[index] % alignment == 0
            return ctypes.c_uint64(pointers[index])
        case Workspace(offset=offset):
            return ctypes.c_uint64(workspace + offset)
        case Scale(dtype=dtype, factor=factor):
            return (ctypes.c_double if dtype == "float64" else ctypes.c_float)(scale * factor)
        case Constant(data=data):
            return (ctypes.c_char * len(data)).from_buffer_copy(data)
    raise TypeError(param)


def _check_sizes(library: ctypes.CDLL, launch: Launch, values: Sequence[object]) -> None:
    sizes = (ctypes.c_int * 64)()
    count = library.parameter_sizes(sizes)
    ours = [ctypes.sizeof(value) for value in values]  # type: ignore[arg-type]
    assert ours == list(sizes[:count]), f"{launch.kernel.name}: plan packs {ours}, kernel takes {sizes[:count]}"


def aligned_bytes(count: int, fill: int = 0xFF) -> np.ndarray:
    """Memory aligned to 256 bytes; the fill 0xFF is NaN in every float type."""
    memory = np.full(count + 256, fill, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + count]
