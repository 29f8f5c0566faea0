from __future__ import annotations

import importlib.machinery
import sys
import time
import types
from pathlib import Path

import pytest

from train import start_times


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_times, "_marks", [])


def test_the_parts_sum_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start_times.BEGAN_VARIABLE, "1000.0")
    for name, at in (("launcher and nodes", 1003.2), ("imports", 1013.0), ("first step", 1041.3)):
        start_times.mark(name, at)
    start_times.mark("imports", 1050.0)  # a name counts once
    assert start_times.line() == (
        "start: 41.3 s to the end of the first step = launcher and nodes 3.2 + imports 9.8 + first step 28.3"
    )


def test_python_that_keeps_no_compiled_files_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(start_times.BEGAN_VARIABLE, "1000.0")
    start_times.mark("imports", 1013.0)
    kept = tmp_path / "torch" / "__pycache__" / "__init__.pyc"
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    torch.__spec__.cached = str(kept)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert start_times.line().endswith("imports 13.0")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert start_times.line().endswith(
        f"imports 13.0; imports compile torch's files at every start: unset PYTHONDONTWRITEBYTECODE, or once run "
        f"{sys.executable} -m compileall -q {tmp_path}"
    )
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert start_times.line().endswith("imports 13.0")


@pytest.mark.parametrize("began", [None, "", "soon"])
def test_without_a_launcher_nothing_is_told(monkeypatch: pytest.MonkeyPatch, began: str | None) -> None:
    monkeypatch.delenv(start_times.BEGAN_VARIABLE, raising=False)
    if began is not None:
        monkeypatch.setenv(start_times.BEGAN_VARIABLE, began)
    start_times.mark("imports")
    assert start_times.line() == ""


def test_a_process_knows_when_it_was_made() -> None:
    assert 0 < time.time() - float(start_times.own_birth()) < 24 * 3600
    start_times.begin()
    assert [name for name, _ in start_times._marks] == ["launcher and nodes", "Python"]
