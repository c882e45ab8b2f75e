"""What the documentation says is true: its snippets run, its commands exist, its picture is up to date."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(language: str) -> list:
    """The fenced blocks of a language, as parameters named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{page.name}:{line}"))
    return found


def test_there_are_snippets():
    assert len(_blocks("python")) >= 4 and len(_blocks("bash")) >= 4


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_snippet_runs(code: str, tmp_path: Path):
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("code", _blocks("bash"))
def test_shell_snippet_names_what_exists(code: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line in code.splitlines():
        words = line.split("#")[0].split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        elif words[:2] == ["pip", "install"]:
            named = re.search(r"\[(.*)\]", line)
            assert named and set(named[1].split(",")) <= set(extras), line
        elif words[:3] == ["python", "-m", "natcore"]:
            command = [sys.executable, "-m", "natcore", words[3], "--help"]
            help_text = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert help_text.returncode == 0, help_text.stderr
            assert all(option in help_text.stdout for option in words[4:] if option.startswith("--")), line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), line
        else:
            raise AssertionError(f"this test does not know how to check: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    targets += re.findall(r"`((?:natcore|frontends|tests|examples|benchmarks|docs|constraints|\.ci)/[\w./]*)`", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, missing


def test_picture_is_what_the_definition_gives():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "docs")}
    code = "import draw_neighborhood, sys; sys.stdout.write(draw_neighborhood.picture())"
    drawn = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout == (ROOT / "docs" / "neighborhood.svg").read_text(encoding="utf-8")
