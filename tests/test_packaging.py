"""The wheel: pure Python, complete, importable without frameworks; extras that fit each other."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import natcore

ROOT = Path(__file__).parents[1]
PACKAGES = {"natcore": ROOT / "natcore", **{n: ROOT / "frontends" / n for n in ("torch_nat", "jax_nat")}}
SOURCES = (".py", ".cu", ".cuh", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (path,) = folder.iterdir()
    return path


def test_wheel_is_pure_python_and_holds_every_source(wheel: Path):
    assert wheel.name == f"natcore-{natcore.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.suffix in SOURCES and "__pycache__" not in file.parts
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert any(name.endswith(".cu") for name in expected)
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_installs_and_imports(wheel: Path, tmp_path: Path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel)]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert installed.returncode == 0, installed.stderr
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import natcore, numpy
assert natcore.__file__.startswith({str(tmp_path)!r}), natcore.__file__
q = numpy.ones((1, 5, 5, 1, 4), numpy.float32)
assert numpy.allclose(natcore.na2d(q, q, q, 3), 1)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("package", "framework", "extra"),
    [("torch_nat", "torch", "torch"), ("jax_nat", "jax", "jax"), ("jax_nat", "flax", "jax")],
)
def test_front_end_without_its_framework_names_the_extra(package: str, framework: str, extra: str):
    code = f"import sys; sys.modules[{framework!r}] = None; import {package}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and f"natcore[{extra}]" in last, last


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_extras_are_the_documented_ones_and_cuda_stays_off_macos():
    extras = _project()["optional-dependencies"]
    assert set(extras) == {"torch", "jax", "dense", "cuda12", "cuda13", "demo", "dev"}
    cuda = [line for line in [*_project()["dependencies"], *extras["cuda12"], *extras["cuda13"]] if "cuda" in line]
    assert len(cuda) == 5
    for line in cuda:
        assert line.endswith("platform_system != 'Darwin'"), line
    assert any(line.startswith("nvidia-cuda-nvrtc-cu12") for line in extras["cuda12"])
    assert any(re.match(r"nvidia-cuda-nvrtc\W", line) for line in extras["cuda13"])


def test_ranges_in_pyproject_and_pins_in_constraints():
    from packaging.requirements import Requirement

    pins: dict[str, Requirement] = {}
    for file in (ROOT / "constraints").glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            text = line.split("#")[0].strip()
            if text and not text.startswith("-"):
                pins[Requirement(text).name.replace("_", "-")] = Requirement(text)
    extras = _project()["optional-dependencies"]
    lines = [*_project()["dependencies"], *(line for name in extras if name != "cuda12" for line in extras[name])]
    for requirement in map(Requirement, lines):
        assert not any(s.operator == "==" for s in requirement.specifier), f"{requirement} belongs in constraints/"
        name = requirement.name.replace("_", "-")
        if name == "natcore":
            continue
        assert name in pins, f"constraints/ has no version of {name}"
        for tested in (s.version for s in pins[name].specifier if s.operator == "=="):
            assert requirement.specifier.contains(tested), f"{requirement} excludes the tested {tested}"
