"""What all tests share: the checkout's places, and a way to run a launcher as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

_LONGEST = ("test_docs.py", "test_demo.py")

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; threads of theirs would wait for each other, spinning
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; what tests start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that at the end no worker has minutes of work while another has none."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The checkout's folder."""
    return PROJECT_ROOT


class Launcher:
    """Runs a script of scripts/ in a process of its own."""

    def __call__(
        self,
        script: str,
        *arguments: object,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """`script` is relative to scripts/; .sh runs in bash, .py in this interpreter. Output is text."""
        path = PROJECT_ROOT / "scripts" / script
        program = ["bash", str(path)] if path.suffix == ".sh" else [sys.executable, str(path)]
        return subprocess.run(
            [*program, *(str(argument) for argument in arguments)],
            cwd=cwd or PROJECT_ROOT,
            env={**os.environ, "TRAIN_PYTHON": sys.executable, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@pytest.fixture(scope="session")
def launch() -> Launcher:
    """Runs a launcher and returns exit code, stdout and stderr."""
    return Launcher()


@pytest.fixture
def awkward_path(tmp_path: Path) -> Path:
    """A folder whose name breaks careless quoting."""
    folder = tmp_path / "with space, 'quote' and $HOME; echo broken"
    folder.mkdir()
    return folder
