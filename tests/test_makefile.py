"""The Makefile's targets are there for make as it is installed; what they run is tested elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def make(project_root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=project_root, capture_output=True, text=True, check=False)


def test_help_lists_the_targets(project_root):
    done = make(project_root, "help")
    assert done.returncode == 0, done.stderr
    assert "make demo" in done.stdout and "make test" in done.stdout


def test_recipes_run_in_a_strict_shell(project_root, tmp_path):
    """The settings of this very Makefile, with a recipe that fails in its first line."""
    head = (project_root / "Makefile").read_text().split(".PHONY")[0]
    (tmp_path / "Makefile").write_text(head + "all:\n\t@false\n\techo reached\n")
    done = make(tmp_path, "all")
    assert done.returncode == 2 and "reached" not in done.stdout
    assert "No such file" not in done.stderr


@pytest.mark.parametrize(("python", "message"), [("no-such-python", "is not installed"), ("/bin/false", "is too old")])
def test_an_unfit_interpreter_is_named(project_root, python, message):
    script = project_root / "scripts" / "common" / "check_python.sh"
    done = subprocess.run(["bash", str(script), python], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr
