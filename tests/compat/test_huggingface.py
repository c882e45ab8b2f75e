"""Dinat of transformers after install(), NAT for transformers, and conversion, on two releases of transformers.

One is the test environment's own; the older one is put beside it, without its dependencies.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("huggingface_checks.py")
#: The oldest 5.x, with the tokenizers that it wants. Its other dependencies are those of the newer one, of
#: which constraints/common.txt pins huggingface-hub to a version that suits both.
OLD = ("transformers==5.0.0", "tokenizers==0.22.2")


@pytest.fixture(scope="session")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH; kept beside the environment, so that it is fetched once."""
    folder = Path(sys.prefix) / "share" / "natcore-tests" / OLD[0].replace("==", "-")
    if not (folder / "transformers").is_dir():
        fresh = tmp_path_factory.mktemp("transformers")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh), *OLD]
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert fetched.returncode == 0, f"{' '.join(OLD)} could not be fetched: {fetched.stderr}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(fresh, folder)
        except OSError:  # another file system, or another process was first
            return fresh
    return folder


def run(*arguments: str, path: Path | None = None) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def test_on_the_environments_release():
    output = run("0.21")
    assert "hands over a wrong layout: torch_nat replaces its forward" in output
    assert "transformers 5." in output and "all checks passed" in output


def test_on_the_oldest_release(old_release: Path):
    output = run("0.17", path=old_release)
    assert "hands over a wrong layout: torch_nat replaces its forward" in output
    assert "transformers 5.0.0" in output and "all checks passed" in output


def test_install_after_dinat_was_imported_raises():
    output = run("late")
    assert "install() before" in output and "all checks passed" in output
