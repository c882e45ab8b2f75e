"""Kernel specs to cubins, by NVRTC, remembered on disk. Needs no GPU and no driver."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from natcore.cubin_cache import SCHEMA, Cubin, Resources, read_entry, write_entry
from natcore.errors import CompileError, CudaError
from natcore.planning import CANDIDATES, DeviceFacts, KernelSpec, facts_for_arch, kernel_info

SOURCES = Path(__file__).parent / "cuda_src"


@dataclass(frozen=True)
class ReportRow:
    """One kernel of `compile_listed`: what was compiled, whether from the cache, and what it takes."""

    spec: KernelSpec
    resources: Resources
    seconds: float
    cached: bool


def compile_kernel(spec: KernelSpec) -> Cubin:
    """The cubin of a kernel, from the disk cache or by NVRTC.

    Raises CompileError with the compiler's log, or CudaError where there is no NVRTC.
    """
    return _compile(spec)[0]


def compile_kernels(specs: Iterable[KernelSpec]) -> list[Cubin]:
    """As `compile_kernel`, many at once: NVRTC drops the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_kernel, specs))


def compile_listed(arch: str, check: bool = False) -> list[ReportRow]:
    """Compiles every kernel that runs on an architecture, at the calls that its candidate lists.

    This fills the disk cache ahead of time. With ``check``, raises CompileError naming each kernel
    that spills, or takes more registers or shared memory than it declares.
    """
    facts = facts_for_arch(arch)
    specs = listed_specs(facts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(_report, specs))
    faults = [fault for row in rows for fault in faults_of(row)]
    if check and faults:
        raise CompileError(f"{len(faults)} kernels for {arch} exceed what they declare:", "\n".join(faults))
    return rows


def listed_specs(facts: DeviceFacts) -> list[KernelSpec]:
    """Every distinct kernel of the listed calls of every candidate that runs on the GPU."""
    specs: dict[KernelSpec, None] = {}
    for candidate in CANDIDATES:
        for call in candidate.listed():
            if candidate.refusal(call, facts) is None:
                specs.update({launch.kernel: None for launch in candidate.plan(call, facts, {}).launches})
    return list(specs)


def faults_of(row: ReportRow) -> list[str]:
    """Where a compiled kernel exceeds its declaration, in words."""
    info, took = kernel_info(row.spec.name), row.resources
    limits = {
        "bytes spilled": (took.spill_store_bytes + took.spill_load_bytes, info.max_spilled_bytes),
        "registers": (took.registers, info.max_registers),
        "bytes of static shared memory": (took.shared_bytes, info.max_shared_bytes),
    }
    defines = " ".join(f"{name}={value}" for name, value in row.spec.defines)
    return [
        f"{row.spec.name} ({defines}): {value} {what}, at most {limit} declared"
        for what, (value, limit) in limits.items()
        if value > limit
    ]


def _report(spec: KernelSpec) -> ReportRow:
    start = time.perf_counter()
    cubin, cached = _compile(spec)
    if cubin.resources is None:
        raise CompileError(f"the compiler gave no report on kernel {spec.name} for {spec.arch}.")
    return ReportRow(spec, cubin.resources, time.perf_counter() - start, cached)


def _compile(spec: KernelSpec) -> tuple[Cubin, bool]:
    """The cubin and whether it came from the cache."""
    info = kernel_info(spec.name)
    if not info.runs_on(spec.arch):
        raise CompileError(f"kernel {spec.name} is for {', '.join(info.architectures)}, not for {spec.arch}.")
    key = cache_key(spec)
    cubin = read_entry(key)
    if cubin is not None:
        return cubin, True
    cubin = _run_nvrtc(spec)
    write_entry(key, cubin)
    return cubin, False


# ---- sources ----


@lru_cache
def sources_of(name: str) -> dict[str, str]:
    """The kernel's source, first, and every header that it includes, by path under cuda_src."""
    found: dict[str, str] = {}
    wanted = [f"kernels/{name}.cu"]
    while wanted:
        path = wanted.pop()
        if path not in found:
            found[path] = (SOURCES / path).read_text(encoding="utf-8")
            wanted += re.findall(r'^#include "([^"]+)"', found[path], flags=re.MULTILINE)
    return found


def cache_key(spec: KernelSpec) -> str:
    """A digest of all that the cubin depends on."""
    parts = [SCHEMA, nvrtc_version(), spec.arch, spec.name, sorted(spec.defines), sorted(sources_of(spec.name).items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---- NVRTC ----


@lru_cache
def _nvrtc():
    """cuda.bindings' nvrtc module, its library loaded. Raises CudaError, naming the extra, without one."""
    try:
        from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:  # the library is looked for on first use
        raise CudaError(
            "NVRTC, the CUDA run-time compiler, was not found. Install the extra that fits the driver: "
            f"natcore[cuda13] (driver 580 or newer) or natcore[cuda12]. ({error})"
        ) from error
    return nvrtc


@lru_cache
def nvrtc_version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return int(major), int(minor)


@lru_cache
def _no_cache() -> tuple[str, ...]:
    """The option that turns NVRTC's own cache off, whose hits come without ptxas's report; () where unknown."""
    nvrtc = _nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(b"", b"empty.cu", 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, 1, [b"--no-cache"])
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return ("--no-cache",) if error == nvrtc.nvrtcResult.NVRTC_SUCCESS else ()


def _run_nvrtc(spec: KernelSpec) -> Cubin:
    nvrtc = _nvrtc()
    sources = sources_of(spec.name)
    (path, source), *headers = sources.items()
    error, program = nvrtc.nvrtcCreateProgram(
        source.encode(),
        path.encode(),
        len(headers),
        [text.encode() for _, text in headers],
        [name.encode() for name, _ in headers],
    )
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC could not create a program for {spec.name}: {error.name}.")
    try:
        options = [f"--gpu-architecture={spec.arch}", "--std=c++17", "--ptxas-options=-v", *_no_cache()]
        options += [f"-D{name}={value}" for name, value in spec.defines]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(_failure(spec, error.name), log)
        image = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Cubin(image, _resources(log))


def _text(size_of, read, program) -> bytes:
    _, size = size_of(program)
    buffer = bytearray(size)  # never bytes: the binding writes into it, and short bytes are shared
    read(program, buffer)
    return bytes(buffer)


def _failure(spec: KernelSpec, error: str) -> str:
    version = ".".join(map(str, nvrtc_version()))
    message = f"NVRTC {version} failed on kernel {spec.name} for {spec.arch} ({error})."
    if error == "NVRTC_ERROR_INVALID_OPTION":
        message += f" It may be too old to know {spec.arch}: install natcore[cuda13]."
    return message


def _resources(log: str) -> Resources | None:
    """Reads ptxas's report, which -v puts into the log."""
    patterns = (
        r"Used (\d+) registers",
        r"(\d+) bytes smem|$",  # absent where there is none
        r"(\d+) bytes stack frame",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
    )
    found = [re.search(pattern, log) for pattern in patterns]
    if any(match is None for match in found):
        return None
    return Resources(*(int(match[1] or 0) for match in found if match is not None))
