"""Imports go one way, no framework comes in by the back door, and `import natcore` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "cupy", "tensorflow"}

#: Lower layers never import higher ones; modules of one layer may import each other.
LAYERS = [
    {"natcore.views", "natcore.errors", "natcore.recent"},
    {"natcore.window"},
    {"natcore.problem"},
    {"natcore.unfused"},
    {
        "natcore.reference",
        "natcore.reference_unfused",
        "natcore.reference_dropout",
        "natcore.planning",
        "natcore.models",
    },
    {"natcore.checkpoints", "natcore.cubin_cache"},
    {"natcore.compiling"},
    {"natcore.device"},
    {"natcore.backends"},
    {"natcore.session", "natcore.merging", "natcore.arrays", "natcore.dlpack", "natcore.ahead"},
    {"natcore.api", "natcore.api_unfused"},
    {"natcore"},
    {"natcore.info", "natcore.__main__"},
]
#: The only modules that may touch cuda-python, and numba.
CUDA_ROOMS = {"natcore.compiling", "natcore.device", "natcore.backends.cuda"}
NUMBA_ROOMS = {"natcore.backends.cpu", "jax_nat"}


def _modules() -> dict[str, Path]:
    """Every module of the three packages, by name."""
    found = {}
    for root in (ROOT, ROOT / "frontends"):
        for package in ("natcore", "torch_nat", "jax_nat"):
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(module: str) -> set[str]:
    """The full names of what a module imports anywhere, also inside functions; typing-only imports left out."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return names


def _inside(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _layer(name: str) -> int:
    """The layer of a module, or of the module that a name is imported from: the longest prefix decides."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for level, layer in enumerate(LAYERS):
            if prefix in layer and (prefix != "natcore" or name == "natcore" or f"natcore.{parts[1]}" not in MODULES):
                return level
    raise AssertionError(f"{name} has no layer: add it to LAYERS")


CORE = sorted(name for name in MODULES if name.split(".")[0] == "natcore")


@pytest.mark.parametrize("module", CORE)
def test_core_imports_go_down_only(module: str):
    for name in _imports(module):
        if name.split(".")[0] == "natcore":
            assert _layer(name) <= _layer(module), f"{module} imports {name}, which is above it"
        assert name.split(".")[0] not in {"torch_nat", "jax_nat"}, f"{module} imports the front-end {name}"


@pytest.mark.parametrize("module", CORE)
def test_core_imports_no_framework(module: str):
    assert not {name for name in _imports(module) if name.split(".")[0] in FRAMEWORKS}


def test_reference_knows_only_the_problem():
    ours = {name for name in _imports("natcore.reference") if name.startswith("natcore")}
    assert ours and all(name.startswith("natcore.problem.") for name in ours), ours


@pytest.mark.parametrize("module", sorted(MODULES))
def test_front_ends_keep_apart_and_rooms_are_kept(module: str):
    roots = {name.split(".")[0] for name in _imports(module)}
    if module.startswith("torch_nat"):
        assert not roots & {"jax_nat", "jax", "jaxlib", "flax"}
    if module.startswith("jax_nat"):
        assert not roots & {"torch_nat", "torch"}
    assert "cuda" not in roots or _inside(module, CUDA_ROOMS), f"{module} imports cuda-python"
    assert "numba" not in roots or _inside(module, NUMBA_ROOMS), f"{module} imports numba"


def _loaded_by(code: str) -> set[str]:
    """The top-level modules that are loaded after ``code`` ran in a fresh interpreter."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@pytest.mark.parametrize("module", ["natcore", "natcore.planning", "natcore.models", "natcore.__main__"])
def test_importing_the_core_loads_nothing_heavy(module: str):
    loaded = _loaded_by(f"import {module}")
    assert "numpy" in loaded or module != "natcore"
    assert not loaded & (FRAMEWORKS | {"numba", "llvmlite", "cuda", "scipy", "ml_dtypes"})


def test_a_numpy_call_loads_no_framework_and_no_cuda():
    loaded = _loaded_by("import natcore, numpy; q = numpy.ones((1, 4, 1, 4), 'float32'); natcore.na1d(q, q, q, 3)")
    assert not loaded & (FRAMEWORKS | {"cuda"})


def test_the_rules_can_fail():
    """The reader of imports sees lazy, relative and aliased ones, and leaves out typing-only ones."""
    seen = _imports("natcore.backends")
    assert {"natcore.backends.cpu", "natcore.backends.cuda"} <= seen
    assert "natcore.planning.Config" not in seen
    assert _layer("natcore.problem") < _layer("natcore.backends.cpu") < _layer("natcore.api.na2d") < _layer("natcore")
