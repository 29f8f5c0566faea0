"""Ruff, mypy and ShellCheck are clean, and the house rules that they do not know hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    if (ROOT / name).is_file()
]  # fmt: skip
PYTHON = [file for file in TRACKED if file.suffix == ".py"]
BASH = [file for file in TRACKED if file.suffix == ".sh" or file == ROOT / ".ci" / "run"]
LIBRARY = [file for file in PYTHON if file.is_relative_to(ROOT / "train") or file.is_relative_to(ROOT / "scripts")]


def check(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    check(sys.executable, "-m", "ruff", "check", ".")
    check(sys.executable, "-m", "ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy():
    check(sys.executable, "-m", "mypy")


def test_shellcheck():
    assert BASH, "there are bash scripts"
    check(str(Path(sys.executable).parent / "shellcheck"), "--external-sources", *map(str, BASH))


@pytest.mark.parametrize("file", BASH, ids=lambda file: str(file.relative_to(ROOT)))
def test_bash_scripts_stop_at_the_first_error_and_stay_short(file):
    text = file.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    if file.name != "env.sh":  # it is sourced: strictness is its caller's
        assert "\nset -euo pipefail\n" in text
    assert len(text.splitlines()) <= 50
    assert file.name == "env.sh" or file.stat().st_mode & 0o111, "a script is executable"


FORBIDDEN = {
    r"shell\s*=\s*True": "goes through a shell",
    r"os\.system\(": "goes through a shell",
    r"sys\.path\.(append|insert|extend)|sys\.path\s*(\+=|=[^=])": "edits the import path",
    r"weights_only\s*=\s*False": "runs what a file carries",
    r"\bTODO\b|\bFIXME\b": "is not finished",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_ways(pattern):
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in LIBRARY
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"{FORBIDDEN[pattern]}: {found}"


def test_only_one_module_starts_programs():
    starts = [
        str(file.relative_to(ROOT))
        for file in LIBRARY
        if re.search(r"^\s*(import subprocess|from subprocess)|os\.(exec|spawn|popen)", file.read_text(), re.MULTILINE)
    ]
    assert starts == ["train/process.py"]


def test_nothing_imports_from_scripts():
    assert not [
        str(file) for file in LIBRARY if re.search(r"^\s*(from|import) scripts\b", file.read_text(), re.MULTILINE)
    ]


def test_every_module_says_what_it_is_for():
    silent = [
        str(file.relative_to(ROOT))
        for file in LIBRARY
        if file.read_text().strip() and not re.match(r'(#!.*\n)?"""', file.read_text())
    ]
    assert not silent
