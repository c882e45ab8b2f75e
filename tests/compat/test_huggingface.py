"""Dinat of transformers after install(), NAT for transformers, and conversion, on the two releases pinned here.

One is the test environment's own; the other is put beside it, without its dependencies.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("huggingface_checks.py")
#: transformers, with what it wants of another version than constraints/common.txt has (which pins huggingface-hub to a
#: version that suits both): the oldest 5.x, and the one that the test environment has.
RELEASES = {"5.0.0": ("tokenizers==0.22.2",), "5.23.0": ()}


@pytest.fixture(scope="session")
def place_of(tmp_path_factory: pytest.TempPathFactory):
    """From a release to a folder for PYTHONPATH, kept beside the environment; None for the environment's own."""

    def place(release: str) -> Path | None:
        if importlib.metadata.version("transformers") == release:
            return None
        folder = Path(sys.prefix) / "share" / "natcore-tests" / f"transformers-{release}"
        if not (folder / "transformers").is_dir():
            fresh = tmp_path_factory.mktemp("transformers")
            wanted = [f"transformers=={release}", *RELEASES[release]]
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh), *wanted]
            fetched = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert fetched.returncode == 0, f"{' '.join(wanted)} could not be fetched: {fetched.stderr}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(fresh, folder)
            except OSError:  # another file system, or another process was first
                return fresh
        return folder

    return place


def run(*arguments: str, path: Path | None = None) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(("release", "natten"), [("5.0.0", "0.17"), ("5.23.0", "0.21")])
def test_transformers(release: str, natten: str, place_of):
    output = run(natten, path=place_of(release))
    assert "hands over a wrong layout: torch_nat replaces its forward" in output
    assert f"transformers {release}\n" in output and "all checks passed" in output


def test_the_pins_are_where_they_are_looked_for():
    assert f"transformers=={max(RELEASES)}" in (ROOT / "constraints" / "common.txt").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert all(f"transformers {release}" in page for release in RELEASES)


def test_install_after_dinat_was_imported_raises():
    output = run("late")
    assert "install() before" in output and "all checks passed" in output
