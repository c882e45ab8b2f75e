"""The CUDA driver, as far as natcore needs it: facts of a GPU, loaded kernels, contexts.

Everything uses a device's primary context, which torch, JAX and CuPy use too. Kernels are loaded as
libraries: one CUkernel serves every context, so a handle is good for all GPUs of its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from natcore.compiling import compile_kernel
from natcore.errors import CudaError
from natcore.planning import DeviceFacts, KernelSpec, Launch

#: Architectures with instructions that other GPUs of their generation lack are compiled as such.
_SPECIFIC = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
_MAX_GRID = (2**31 - 1, 65535, 65535)


@lru_cache
def driver() -> ModuleType:
    """cuda.bindings' driver module, initialised. Raises CudaError where there is no driver or no GPU."""
    try:
        from cuda.bindings import driver as module  # pyright: ignore[reportAttributeAccessIssue]

        (error,) = module.cuInit(0)
    except (ImportError, RuntimeError, OSError) as cause:
        raise CudaError(
            "the CUDA driver was not found. CUDA arrays need an NVIDIA GPU with its driver, and cuda-bindings "
            f"(pip install natcore[cuda13] or natcore[cuda12]); CPU arrays need neither. ({cause})"
        ) from cause
    if error != module.CUresult.CUDA_SUCCESS:
        raise CudaError(f"the CUDA driver found no usable GPU: {error.name}. CPU arrays need none.")
    return module


def check(result: tuple, what: str) -> Any:
    """The value of a driver call. Raises CudaError saying what failed."""
    error, *values = result
    if error != driver().CUresult.CUDA_SUCCESS:
        _, text = driver().cuGetErrorString(error)
        raise CudaError(f"{what} failed: {error.name} ({text.decode() if text else 'no description'}).")
    return values[0] if len(values) == 1 else tuple(values)


def device_count() -> int:
    """The number of GPUs; 0 without a driver."""
    try:
        return check(driver().cuDeviceGetCount(), "cuDeviceGetCount")
    except CudaError:
        return 0


@lru_cache
def facts(index: int) -> DeviceFacts:
    """What planning needs to know about a GPU. Raises CudaError where there is no such GPU."""
    count = check(driver().cuDeviceGetCount(), "cuDeviceGetCount")
    if not 0 <= index < count:
        raise CudaError(f"there is no GPU {index}; the driver sees {count}.")
    names = driver().CUdevice_attribute
    major = _attribute(index, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    minor = _attribute(index, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    return DeviceFacts(
        arch=_SPECIFIC.get((major, minor), f"sm_{major}{minor}"),
        multiprocessors=_attribute(index, names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        shared_bytes_per_block=_attribute(index, names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        l2_bytes=_attribute(index, names.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
    )


def _device(index: int) -> Any:
    return check(driver().cuDeviceGet(index), f"cuDeviceGet({index})")


def _attribute(index: int, name: Any) -> int:
    return check(driver().cuDeviceGetAttribute(name, _device(index)), f"cuDeviceGetAttribute({name.name})")


@lru_cache
def primary_context(index: int) -> Any:
    """The CUcontext that all frameworks share. Retained for the life of the process."""
    return check(driver().cuDevicePrimaryCtxRetain(_device(index)), f"cuDevicePrimaryCtxRetain({index})")


@contextmanager
def current(index: int) -> Iterator[None]:
    """Makes the primary context of a GPU current on this thread, for the length of the block."""
    check(driver().cuCtxPushCurrent(primary_context(index)), "cuCtxPushCurrent")
    try:
        yield
    finally:
        check(driver().cuCtxPopCurrent(), "cuCtxPopCurrent")


@contextmanager
def while_capturing() -> Iterator[None]:
    """Lets this thread load kernels while a stream records a graph, for the length of the block.

    Loading may allocate memory, which the driver takes for a mistake during a capture and answers by ruining the
    graph, unless the thread says that it knows better.
    """
    relaxed = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver().cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        check(driver().cuThreadExchangeStreamCaptureMode(before), "cuThreadExchangeStreamCaptureMode")


@lru_cache
def own_stream(index: int) -> int:
    """A stream of natcore's own on a GPU, for producers that have no current one. Lives as long as the process."""
    with current(index):
        flags = driver().CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(check(driver().cuStreamCreate(flags), "cuStreamCreate"))


def synchronize(index: int, stream: int) -> None:
    """Waits for all work on a stream of a GPU."""
    with current(index):
        check(driver().cuStreamSynchronize(stream), "cuStreamSynchronize")


def fill(index: int, address: int, word: int, stream: int) -> None:
    """Enqueues the writing of one 32-bit word on a stream of a GPU."""
    with current(index):
        check(driver().cuMemsetD32Async(address, word, 1, stream), "cuMemsetD32Async")


@cache
def kernel_handle(spec: KernelSpec) -> Any:
    """The CUkernel of a spec: compiled or read from the cache, loaded, kept for the life of the process."""
    image = compile_kernel(spec).image
    what = f"loading kernel {spec.name} for {spec.arch}"
    library = check(driver().cuLibraryLoadData(image, [], [], 0, [], [], 0), what)
    return check(driver().cuLibraryGetKernel(library, spec.name.encode()), what)


def prepare_launch(launch: Launch, index: int) -> Any:
    """The CUkernel of a launch, ready on a GPU: its limits are checked and its shared memory granted.

    A launch that fails while a graph is captured ruins the graph, so nothing is left to fail then.
    """
    with while_capturing(), current(index):
        kernel = kernel_handle(launch.kernel)
        _check_launch(launch, kernel, index)
        if launch.shared_bytes:
            name = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            result = driver().cuKernelSetAttribute(name, launch.shared_bytes, kernel, _device(index))
            check(result, f"granting kernel {launch.kernel.name} {launch.shared_bytes} bytes of shared memory")
        _load(kernel, launch.kernel.name)
    return kernel


def _load(kernel: Any, name: str) -> None:
    """Brings a kernel's code into the current context, which the driver otherwise puts off until the first launch: a
    capture does not survive the memory that may take."""
    function = check(driver().cuKernelGetFunction(kernel), f"loading kernel {name}")
    try:
        result = driver().cuFuncLoad(function)
    except (AttributeError, RuntimeError):  # bindings or a driver from before CUDA 12.4, which cannot be asked
        return
    check(result, f"loading kernel {name}")


def _check_launch(launch: Launch, kernel: Any, index: int) -> None:
    names = driver().CUfunction_attribute
    name = launch.kernel.name

    def attribute(which: Any) -> int:
        return check(driver().cuKernelGetAttribute(which, kernel, _device(index)), f"reading {which.name} of {name}")

    if any(not 0 < n <= limit for n, limit in zip(launch.grid, _MAX_GRID, strict=True)):
        raise NotImplementedError(f"kernel {name} would need a grid of {launch.grid}; at most {_MAX_GRID} is possible.")
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    most = attribute(names.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
    if threads > most:
        raise NotImplementedError(f"kernel {name} would need {threads} threads a block; at most {most} are possible.")
    shared = launch.shared_bytes + attribute(names.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
    most = facts(index).shared_bytes_per_block
    if shared > most:
        raise NotImplementedError(
            f"kernel {name} would need {shared} bytes of shared memory a block; there are {most}."
        )
