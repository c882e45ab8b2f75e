"""Kernels compile for every architecture without spilling, and the disk cache survives everybody."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from natcore import compiling, cubin_cache
from natcore.compiling import Resources, compile_kernel, compile_listed, faults_of, listed_specs
from natcore.errors import CompileError, CudaError
from natcore.planning import CANDIDATES, KernelSpec, facts_for_arch, kernel_info

SMALL = KernelSpec(
    "general_sum_partials", (("PARTIAL", "float32"), ("RESULT", "float16"), ("THREADS", "128")), "sm_90a"
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NATCORE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiles(monkeypatch) -> list[KernelSpec]:
    """What NVRTC was really asked for."""
    asked: list[KernelSpec] = []
    real = compiling._run_nvrtc
    monkeypatch.setattr(compiling, "_run_nvrtc", lambda spec: asked.append(spec) or real(spec))
    return asked


def test_an_entry_is_used_again(cache, compiles):
    first, second = compile_kernel(SMALL), compile_kernel(SMALL)
    assert first == second and compiles == [SMALL]
    assert first.image[:4] == b"\x7fELF" and first.resources is not None and first.resources.registers > 0
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]  # no temporary file is left


def test_everything_that_matters_is_in_the_key(cache, monkeypatch):
    base = compiling.cache_key(SMALL)
    others = [
        replace(SMALL, arch="sm_80"),
        replace(SMALL, defines=(*SMALL.defines, ("X", "1"))),
        replace(SMALL, name="general_forward"),
    ]
    assert len({base, *map(compiling.cache_key, others)}) == 4
    assert compiling.cache_key(replace(SMALL, defines=SMALL.defines[::-1])) == base
    monkeypatch.setattr(compiling, "nvrtc_version", lambda: (1, 0))
    assert compiling.cache_key(SMALL) != base
    monkeypatch.undo()
    headers = compiling.sources_of("general_sum_partials")
    assert {"common/types.cuh", "ptx/convert.cuh"} < set(headers)
    monkeypatch.setattr(compiling, "sources_of", lambda name: headers | {"ptx/convert.cuh": "// changed"})
    assert compiling.cache_key(SMALL) != base


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped bit", "another's", "forged", "folder"])
def test_a_damaged_entry_is_a_miss(cache, compiles, damage: str):
    good = compile_kernel(SMALL)
    (path,) = cache.iterdir()
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped bit":
        path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif damage == "another's":
        compile_kernel(replace(SMALL, arch="sm_80"))
        (other,) = set(cache.iterdir()) - {path}
        path.write_bytes(other.read_bytes())
    elif damage == "forged":
        rest = json.dumps({"resources": 3}).encode() + b"\n"
        path.write_bytes(hashlib.sha256(rest).digest() + rest)
    else:
        path.unlink()
        path.mkdir()
    compiles.clear()
    if damage == "folder":
        with pytest.warns(RuntimeWarning, match="cannot write its kernel cache"):
            assert compile_kernel(SMALL).resources == good.resources
        return
    assert compile_kernel(SMALL).resources == good.resources
    assert compile_kernel(SMALL).image[:4] == b"\x7fELF"
    assert compiles == [SMALL], "the damaged entry must be replaced by a good one, once"


def test_without_a_writable_folder(tmp_path, monkeypatch, compiles):
    """Works, uncached, and says so once."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("NATCORE_CACHE_DIR", str(blocker / "below_a_file"))
    cubin_cache._warn_uncached.cache_clear()
    with pytest.warns(RuntimeWarning, match="NATCORE_CACHE_DIR") as caught:
        compile_kernel(SMALL)
        compile_kernel(SMALL)
    assert len(caught) == 1 and len(compiles) == 2


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cubin_cache._warn_uncached.cache_clear()
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert compile_kernel(SMALL).image
    assert not list(cache.iterdir())


def test_what_was_used_longest_ago_is_evicted(cache, monkeypatch):
    def entry(name: str) -> None:
        cubin_cache.write_entry(name, cubin_cache.Cubin(bytes(1000), None))

    def names() -> set[str]:
        return {path.name for path in cache.iterdir()}

    monkeypatch.setattr(cubin_cache, "LIMIT_BYTES", 5600)
    cache.mkdir(exist_ok=True)
    (cache / "left_by_a_dead_writer.tmp").write_bytes(bytes(1000))
    (cache / "not_ours.txt").write_bytes(bytes(9000))
    for name in "abcd":
        entry(name)
    ages = {"left_by_a_dead_writer.tmp": 50, "a.cubin": 40, "b.cubin": 30, "c.cubin": 20, "d.cubin": 10}
    now = time.time()
    for name, age in ages.items():
        os.utime(cache / name, (now - age, now - age))
    assert names() == {*ages, "not_ours.txt"}  # below the limit
    assert cubin_cache.read_entry("a") is not None  # a was used just now
    entry("e")
    assert names() == {"not_ours.txt", "a.cubin", "c.cubin", "d.cubin", "e.cubin"}
    assert cubin_cache.read_entry("b") is None


def _compile_in_process(_: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return hashlib.sha256(compile_kernel(SMALL).image).hexdigest()


def test_many_processes_share_the_folder(cache):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        images = pool.map(_compile_in_process, range(16), chunksize=1)
    assert set(images) == {hashlib.sha256(compile_kernel(SMALL).image).hexdigest()}
    assert len(list(cache.iterdir())) == 1


def test_compile_error_carries_the_log(cache):
    broken = replace(SMALL, defines=(("PARTIAL", "no_such_type"), ("RESULT", "float16"), ("THREADS", "128")))
    with pytest.raises(CompileError, match="general_sum_partials for sm_90a") as caught:
        compile_kernel(broken)
    assert 'identifier "no_such_type" is undefined' in caught.value.log
    assert "no_such_type" in str(caught.value)
    assert not cache.exists()


def test_unknown_architectures(cache):
    with pytest.raises(CompileError, match="sm_70"):
        compile_kernel(replace(SMALL, arch="sm_70"))
    with pytest.raises(CompileError, match="too old to know sm_999"):
        compile_kernel(replace(SMALL, arch="sm_999"))
    with pytest.raises(ValueError, match="unknown architecture 'sm_1'"):
        compile_listed("sm_1")


def test_without_nvrtc(cache, monkeypatch):
    nvrtc = compiling._nvrtc()

    def missing():
        raise RuntimeError("libnvrtc not found")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    compiling._nvrtc.cache_clear()
    compiling.nvrtc_version.cache_clear()
    try:
        with pytest.raises(CudaError, match=r"natcore\[cuda13\].*natcore\[cuda12\].*libnvrtc not found"):
            compile_kernel(SMALL)
    finally:
        compiling._nvrtc.cache_clear()
        compiling.nvrtc_version.cache_clear()


def test_faults_name_what_was_exceeded():
    info = kernel_info(SMALL.name)
    fine = Resources(info.max_registers, info.max_shared_bytes, 0, 0, 0)
    row = compiling.ReportRow(SMALL, fine, 0.1, False)
    assert faults_of(row) == []
    worse = replace(fine, registers=fine.registers + 1, spill_load_bytes=4, shared_bytes=fine.shared_bytes + 16)
    faults = faults_of(replace(row, resources=worse))
    assert len(faults) == 3 and all("general_sum_partials (PARTIAL=float32" in fault for fault in faults)


def test_check_fails_on_a_fault(cache, monkeypatch):
    monkeypatch.setattr(compiling, "listed_specs", lambda facts: [SMALL])
    (row,) = compile_listed("sm_90a", check=True)
    assert row.spec == SMALL and not row.cached and compile_listed("sm_90a")[0].cached
    monkeypatch.setattr(compiling, "faults_of", lambda row: ["too much"])
    with pytest.raises(CompileError, match="too much"):
        compile_listed("sm_90a", check=True)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a", "sm_100a", "sm_120"])
def test_the_list_covers_every_kernel(arch: str):
    """Each kernel that declares an architecture is on that architecture's list."""
    listed = {spec.name for spec in listed_specs(facts_for_arch(arch))}
    declared = {info.name for c in CANDIDATES if c.listed() for info in c.kernels if info.runs_on(arch)}
    assert listed == declared and "general_forward" in listed


def test_every_kernel_file_is_declared():
    files = {path.stem for path in (compiling.SOURCES / "kernels").glob("*.cu")}
    assert files == {info.name for c in CANDIDATES for info in c.kernels}


def test_kernels_need_no_cuda_header():
    for path in compiling.SOURCES.rglob("*.cu*"):
        assert "#include <" not in path.read_text(encoding="utf-8"), path
