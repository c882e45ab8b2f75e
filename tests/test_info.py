"""`python -m natcore`: the report on a machine that lacks things, and the exit status of compile."""

import subprocess
import sys
from pathlib import Path

import pytest

from natcore import __main__, compiling, cubin_cache, device, info
from natcore.errors import CompileError, CudaError


def _found(subject: str) -> info.Finding:
    return next(finding for finding in info.findings() if finding.subject == subject)


def _no_driver():
    raise CudaError("the CUDA driver was not found.")


def test_report_runs_and_imports_no_framework():
    code = (
        "import sys; from natcore.__main__ import main; status = main(['info'])\n"
        "loaded = {'torch', 'jax', 'flax', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'{status} {loaded}' if status or loaded else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    for word in ("natcore", "Python", "CPU", "NVRTC", "cache", "PyTorch", "JAX", "safetensors"):
        assert f"\n{word} " in f"\n{ran.stdout}"


def test_what_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    def no_nvrtc():
        raise CudaError("NVRTC was not found: natcore[cuda13]")

    monkeypatch.setattr(info, "driver", _no_driver)
    monkeypatch.setattr(info, "device_count", lambda: 0)
    monkeypatch.setattr(info, "nvrtc_version", no_nvrtc)
    monkeypatch.setattr(info, "_version", lambda name: None)
    monkeypatch.setattr(info.platform, "system", lambda: "Linux")
    text = info.report()
    missing = text[text.index("Missing:") :]
    for subject, remedy in {
        "CPU": "pip install numba", "GPU": "driver was not found", "NVRTC": "natcore[cuda13]",
        "PyTorch": "natcore[torch]", "JAX": "natcore[jax]", "safetensors": "natcore[torch]",
    }.items():  # fmt: skip
        line = next(line for line in missing.splitlines() if line.startswith(f"  {subject}: "))
        assert remedy in line


def test_cpu_build_beside_a_gpu_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(info, "device_count", lambda: 1)
    monkeypatch.setattr(info, "_torch_cuda", lambda: None)
    assert "CUDA build" in info._torch().remedy
    monkeypatch.setattr(info, "_torch_cuda", lambda: "13.0")
    assert info._torch() == info.Finding("PyTorch", f"{info._version('torch')}, built for CUDA 13.0")


def test_cuda_version_of_torch_is_what_torch_says():
    torch = pytest.importorskip("torch")
    assert info._torch_cuda() == torch.version.cuda


def test_cache_is_counted_and_an_unwritable_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NATCORE_CACHE_DIR", str(tmp_path / "cache"))
    assert _found("cache") == info.Finding("cache", f"{tmp_path / 'cache'}, 0 kernels, 0.0 MiB")
    cubin_cache.write_entry("k", cubin_cache.Cubin(bytes(3 << 20), cubin_cache.Resources(1, 0, 0, 0, 0)))
    assert "1 kernels, 3.0 MiB" in _found("cache").state
    (tmp_path / "file").touch()
    monkeypatch.setenv("NATCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "NATCORE_CACHE_DIR" in _found("cache").remedy


@pytest.mark.gpu
def test_gpus_are_named():
    assert device.device_count() > 0
    assert device.facts(0).arch in _found("GPU 0").state and not _found("GPU 0").remedy
    assert _found("CUDA driver").state


def _row(arch: str) -> compiling.ReportRow:
    spec = compiling.KernelSpec("kernel", (("HEAD_DIM", "32"),), arch)
    return compiling.ReportRow(spec, cubin_cache.Resources(40, 0, 0, 0, 8), 1.0, False)


def test_compile_reports_each_architecture_and_fails_if_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    asked = []

    def listed(arch: str, check: bool) -> list[compiling.ReportRow]:
        asked.append((arch, check))
        if arch == "sm_120" and check:
            raise CompileError("1 kernels for sm_120 exceed what they declare:", "8 bytes spilled")
        return [] if arch == "sm_70" else [_row(arch)]

    monkeypatch.setattr(compiling, "compile_listed", listed)
    assert __main__.main(["compile", "--arch", "sm_80", "--arch", "sm_90a"]) == 0
    assert "sm_90a kernel 40 registers, 8 bytes spilled" in capsys.readouterr().out
    assert __main__.main(["compile", "--check", "--arch", "sm_120", "--arch", "sm_80"]) == 1
    captured = capsys.readouterr()
    assert "8 bytes spilled" in captured.err and "sm_80: 1 kernels" in captured.out
    assert __main__.main(["compile", "--arch", "sm_70"]) == 1
    assert asked == [("sm_80", False), ("sm_90a", False), ("sm_120", True), ("sm_80", True), ("sm_70", False)]
