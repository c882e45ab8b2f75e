"""Runs plans on the host: the kernels' own source, compiled by the system's C++ compiler.

`run` takes plans of the general kernels with one lane a row and one thread a block (options that these plans take): a
kernel is a plain loop then, so everything but the shuffles is tested without a GPU: geometry, strides, packing of
parameters, plans.

`run_blocks` takes plans of whole blocks: every thread is a fiber (fibers.h), and barriers, asynchronous copies, warp
shuffles and tensor core products are those of block.h, warp.h and ptx/. The logic of a tensor core kernel is tested
without a GPU: which lane holds what, who waits for whom, where in shared memory things lie.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np

from natcore.compiling import SOURCES
from natcore.planning import Config, Constant, KernelSpec, Launch, Operand, Plan, Scale, Workspace
from natcore.planning.plan import capability
from natcore.problem import OPERANDS, Direction

HERE = Path(__file__).parent
CONFIG = Config("general", (("lanes", 1), ("threads", 1)))
_SUFFIXES = (".cc", ".cu", ".cuh", ".h")
COMPILER = shutil.which("g++") or shutil.which("c++")


class BlockError(Exception):
    """What a block did that no block may, or its deadlock."""


class Order(IntEnum):
    """Who goes on and when copies land: the order of tests/host/fibers.h. Larger numbers are seeds of random orders."""

    EAGER = 0
    LATE = 1


def build(source: str, folder: Path, defines: Mapping[str, str], sources: Path = SOURCES) -> ctypes.CDLL:
    """The shared library of a source in this folder, compiled with these defines, once for what the sources say."""
    assert COMPILER is not None
    flags = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    key = hashlib.sha256(repr((source, flags)).encode())
    for file in sorted(path for root in (HERE, sources) for path in root.rglob("*") if path.suffix in _SUFFIXES):
        key.update(file.read_bytes())
    target = folder / f"{key.hexdigest()[:16]}.so"
    if not target.exists():
        # longjmp between stacks is no error, and elements lie in words of other types.
        options = ["-std=c++17", "-Og", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
        command = [COMPILER, *options, f"-I{HERE}", f"-I{sources}", *flags, str(HERE / source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:4000]
    return ctypes.CDLL(str(target))


def kernel(spec: KernelSpec, folder: Path, whole_blocks: bool = False, sources: Path = SOURCES) -> ctypes.CDLL:
    """A kernel's library; its `launch` is for blocks of one thread or for whole blocks."""
    names = {"KERNEL": spec.name, "KERNEL_FILE": f'"kernels/{spec.name}.cu"'}
    if whole_blocks:
        names |= {"WHOLE_BLOCKS": "1", "__CUDA_ARCH__": str(capability(spec.arch) * 10)}
    library = build("kernel.cc", folder, dict(spec.defines) | names, sources)
    library.launch.restype = ctypes.c_char_p if whole_blocks else None
    return library


def run(plan: Plan, pointers: Sequence[int], scale: float, workspace: int, folder: Path) -> None:
    """As an executable of the CUDA backend, on host memory; blocks of one thread."""
    for launch in plan.launches:
        assert launch.block == (1, 1, 1) and launch.grid[1:] == (1, 1) and launch.shared_bytes == 0
        library = kernel(launch.kernel, folder)
        values = _values(library, launch, pointers, scale, workspace)
        library.launch(launch.grid[0], _table(values))


def run_blocks(
    plan: Plan,
    pointers: Sequence[int],
    scale: float,
    workspace: int,
    folder: Path,
    order: int = Order.LATE,
    sources: Path = SOURCES,
    arrays: Sequence[np.ndarray] = (),
) -> None:
    """As an executable of the CUDA backend, on host memory; any blocks, one after the other.

    ``order`` is an `Order` or the seed of a random one. ``sources`` may be another folder than natcore/cuda_src, of
    the same layout. With ``arrays``, asynchronous copies may name no other memory, not even those of no bytes. Raises
    BlockError.
    """
    bounds = [bound for array in arrays for bound in _bounds(array)]
    for launch in plan.launches:
        assert launch.block[1:] == (1, 1)
        library = kernel(launch.kernel, folder, True, sources)
        library.set_readable((ctypes.c_size_t * len(bounds))(*bounds), len(bounds) // 2)
        values = _values(library, launch, pointers, scale, workspace)
        grid = (ctypes.c_uint * 3)(*launch.grid)
        error = library.launch(grid, launch.block[0], launch.shared_bytes, int(order), _table(values))
        if error is not None:
            raise BlockError(f"{launch.kernel.name}: {error.decode()}")


def run_on(
    plan: Plan, direction: Direction, arrays: Mapping[str, np.ndarray], scale: float, folder: Path, **how
) -> None:
    """As `run_blocks`, on arrays by their names and a workspace of its own; copies may name no other memory, unless
    ``how`` says so."""
    pointers = [arrays[n].ctypes.data if n in arrays else 0 for n in OPERANDS[direction]]
    workspace = aligned_bytes(plan.workspace_bytes)
    how = {"arrays": [*arrays.values(), workspace]} | how
    run_blocks(plan, pointers, scale, workspace.ctypes.data, folder, **how)


def _bounds(array: np.ndarray) -> tuple[int, int]:
    """Where its elements begin and end; strides are positive."""
    span = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True))
    return array.ctypes.data, array.ctypes.data + span + array.itemsize


def _values(
    library: ctypes.CDLL, launch: Launch, pointers: Sequence[int], scale: float, workspace: int
) -> list[ctypes._SimpleCData | ctypes.Array]:
    values = [_value(param, pointers, scale, workspace) for param in launch.params]
    _check_sizes(library, launch, values)
    return values


def _table(values: Sequence[ctypes._SimpleCData | ctypes.Array]) -> ctypes.Array:
    """Pointers to the parameters, as cuLaunchKernel takes them."""
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


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


def with_defect(folder: Path, file: str, text: str, replacement: str) -> Path:
    """A copy of the sources in ``folder``, where ``text``, which ``file`` has once, is another one."""
    sources = folder / "cuda_src"
    shutil.copytree(SOURCES, sources)
    source = (sources / file).read_text()
    assert source.count(text) == 1
    (sources / file).write_text(source.replace(text, replacement))
    return sources


def aligned_bytes(count: int, fill: int = 0xFF) -> np.ndarray:
    """Memory aligned to 256 bytes; the fill 0xFF is NaN in every float type."""
    memory = np.full(count + 256, fill, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + count]
