"""What `python -m natcore info` says: what was found on this machine, what is missing, how to get it.

No framework is imported: a package's presence and version are read from its installed files.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from natcore import __version__, cubin_cache
from natcore.compiling import nvrtc_version
from natcore.device import check, device_count, driver, facts
from natcore.errors import CudaError
from natcore.planning import CANDIDATES


class Finding(NamedTuple):
    """One line of the report. ``remedy`` says how to get what is missing, "" where nothing is."""

    subject: str
    state: str
    remedy: str = ""


def findings() -> list[Finding]:
    """All of it, in the order of the report."""
    return [
        Finding("natcore", f"{__version__} at {Path(__file__).parent}"),
        Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        _cpu(),
        *_gpus(),
        _nvrtc(),
        _cache(),
        _torch(),
        _jax(),
        _package("safetensors", "model files: pip install 'natcore[torch]' or 'natcore[jax]'"),
    ]


def report() -> str:
    """The findings as text, the remedies below."""
    lines, missing = [], []
    for subject, state, remedy in findings():
        lines.append(f"{subject:<12} {state}")
        if remedy:
            missing.append(f"  {subject}: {remedy}")
    return "\n".join([*lines, "", "Missing:" if missing else "Nothing is missing.", *missing])


def _version(distribution: str) -> str | None:
    """The installed version of a distribution, None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str, remedy: str) -> Finding:
    version = _version(name)
    return Finding(name, version or "not installed", "" if version else remedy)


def _cpu() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    version = _version("numba")
    state = f"{usable} cores; numba {version or 'not installed'}"
    return Finding("CPU", state, "" if version else "CPU kernels need numba: pip install numba")


def _gpus() -> list[Finding]:
    """The driver and every GPU that it shows."""
    try:
        cuda = driver()
        version = check(cuda.cuDriverGetVersion(), "cuDriverGetVersion")
    except CudaError as error:
        if platform.system() == "Darwin":
            return [Finding("GPU", "none: there is no CUDA on macOS")]
        return [Finding("GPU", "none", f"{error} Without a GPU, CPU arrays work.")]
    found = [
        Finding("CUDA driver", f"{_driver_release() or ''} for CUDA {version // 1000}.{version % 1000 // 10}".strip())
    ]
    for index in range(device_count()):
        device = check(cuda.cuDeviceGet(index), "cuDeviceGet")
        name = check(cuda.cuDeviceGetName(128, device), "cuDeviceGetName").rstrip(b"\0").decode()
        memory = check(cuda.cuDeviceTotalMem(device), "cuDeviceTotalMem") / 2**30
        arch = facts(index).arch
        supported = any(kernel.runs_on(arch) for candidate in CANDIDATES for kernel in candidate.kernels)
        remedy = "" if supported else f"no kernel of natcore runs on {arch}; use CPU arrays or a newer GPU"
        found.append(Finding(f"GPU {index}", f"{name}, {arch}, {memory:.0f} GiB", remedy))
    return found


def _driver_release() -> str | None:
    """The release of the driver, such as 580.65, where the kernel module tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b\d{3,}\.[\d.]+", text)
    return match[0] if match else None


def _nvrtc() -> Finding:
    if platform.system() == "Darwin":
        return Finding("NVRTC", "none: there is no CUDA on macOS")
    try:
        major, minor = nvrtc_version()
    except CudaError as error:
        return Finding("NVRTC", "not found", str(error))
    return Finding("NVRTC", f"{major}.{minor}, cuda-bindings {_version('cuda-bindings')}")


def _cache() -> Finding:
    try:
        folder = cubin_cache.cache_folder()
    except RuntimeError as error:
        return Finding("cache", f"none ({error})", "set NATCORE_CACHE_DIR to a writable folder")
    sizes = [entry.stat().st_size for entry in folder.glob("*.cubin")] if folder.is_dir() else []
    state = f"{folder}, {len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return Finding("cache", state)
    return Finding("cache", f"{state}, not writable", "set NATCORE_CACHE_DIR to a writable folder")


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("PyTorch", "not installed", "torch_nat needs it: pip install 'natcore[torch]'")
    toolkit = _torch_cuda()
    return Finding(
        "PyTorch", f"{version}, {f'built for CUDA {toolkit}' if toolkit else 'CPU build'}", _cpu_build(toolkit)
    )


def _torch_cuda() -> str | None:
    """The CUDA version that PyTorch was built for, from its version file; None for a CPU build."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    match = (
        re.search(r"^cuda\b[^=\n]*= *'([^']+)'", path.read_text(encoding="utf-8"), re.MULTILINE)
        if path.exists()
        else None
    )
    return match[1] if match else None


def _jax() -> Finding:
    version, flax = _version("jax"), _version("flax")
    if version is None or flax is None:
        state = f"jax {version or 'not installed'}, flax {flax or 'not installed'}"
        return Finding("JAX", state, "jax_nat needs both: pip install 'natcore[jax]'")
    plugin = next((n for n in ("jax-cuda13-plugin", "jax-cuda12-plugin") if _version(n)), None)
    return Finding("JAX", f"{version}, flax {flax}, {plugin or 'CPU only'}", _cpu_build(plugin))


def _cpu_build(cuda: str | None) -> str:
    """The remedy for a CPU build of a framework on a machine that has a GPU."""
    return "there is a GPU: install a CUDA build to use it" if cuda is None and device_count() else ""
