"""A rank's process ends by its own status, as Python's would, but for taking the interpreter down."""

from __future__ import annotations

import subprocess
import sys

import pytest

_BEGINNING = """
import atexit, ctypes, sys, threading, time
from train import rank_end

class Module:
    def __del__(self):
        print("the interpreter is taken down", flush=True)

sys.modules["kept"] = Module()
atexit.register(print, "at exit")
c = ctypes.CDLL(None)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Ends a process by `main`, which `body` defines, through `rank_end.run`."""
    script = f"{_BEGINNING}\n{body}\nrank_end.run(main)\n"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("return 4", 4, ""),
        ("return 0", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(130)", 130, ""),
        ("raise SystemExit('no such thing')", 1, "no such thing\n"),
    ],
)
def test_the_status_is_mains(end: str, status: int, told: str) -> None:
    done = run(f"def main(): {end}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "at exit\n", told)


@pytest.mark.parametrize(("error", "status"), [("ValueError('what')", 1), ("KeyboardInterrupt()", 130)])
def test_what_nobody_has_caught_keeps_its_traceback(error: str, status: int) -> None:
    done = run(f"def main(): raise {error}")
    assert done.returncode == status and done.stdout == "at exit\n"
    assert "Traceback" in done.stderr and error.partition("(")[0] in done.stderr


def test_what_is_under_way_is_finished_and_what_is_written_arrives() -> None:
    done = run(
        "def late():\n    time.sleep(0.3)\n    print('thread')\n"
        "def main():\n    threading.Thread(target=late).start()\n    c.printf(b'from C\\n')\n    return 3"
    )
    assert done.returncode == 3 and done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["at exit", "from C", "thread"]


def test_an_error_on_the_way_out_does_not_change_the_status() -> None:
    done = run("def main():\n    sys.stdout.close()\n    return 3")
    assert done.returncode == 3


def test_an_interrupt_on_the_way_out_ends_the_waiting_and_nothing_else() -> None:
    done = run(
        "import os, signal\n"
        "def late():\n    time.sleep(0.3)\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "def main():\n    threading.Thread(target=late).start()\n    print('written')\n    return 3"
    )
    assert done.returncode == 3 and done.stdout == "written\nat exit\n"
    assert "KeyboardInterrupt" in done.stderr


def test_what_fails_on_the_way_out_is_told_and_the_rest_is_done() -> None:
    done = run(
        "def failing(*_): raise RuntimeError('hook')\nsys.excepthook = failing\ndef main(): raise ValueError('main')"
    )
    assert done.returncode == 1 and done.stdout == "at exit\n" and "RuntimeError: hook" in done.stderr
