"""Signals at an exact moment of a run, from inside its ranks: what the tests of runs that end early share.

    variables = signal_at.moment(tmp_path, "^open .*tiny.jsonl a ", nth=2, to="others")

Python's audit events are the moments: the `nth` whose name and arguments match, in the first rank, sends SIGTERM. The
ranks find this on PYTHONPATH as `sitecustomize`, which Python imports before anything else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_CODE = r"""
import os, re, signal, subprocess, sys, time
pattern, nth, to = os.environ["TEST_SIGNAL_AT"], int(os.environ["TEST_SIGNAL_NTH"]), os.environ["TEST_SIGNAL_TO"]
rank, owner = os.environ.get("RANK", "0"), os.getpid()
seen = []

def hook(name, arguments):
    if len(seen) >= nth or name not in ("open", "import") or os.getpid() != owner:
        return
    if re.search(pattern, " ".join([name, *map(str, arguments)])):
        seen.append(name)
        if len(seen) == nth:
            act()

def act():
    if to == "nobody":  # tells that the moment has come, and waits to be signalled from outside
        open(os.environ["TEST_SIGNAL_REACHED"], "w").close()
        time.sleep(120)
    elif to == "others":
        for pid in siblings():
            os.kill(pid, signal.SIGTERM)
    else:  # every process of every rank, as a scheduler does it; twice, as impatient ones do
        groups = [os.getpgid(pid) for pid in [*siblings(), owner] * 2]
        code = f"import os; [os.killpg(group, {int(signal.SIGTERM)}) for group in {groups}]"
        subprocess.run([sys.executable, "-ISc", code], check=True, start_new_session=True)

def siblings():
    children = open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split()
    return [int(pid) for pid in children if int(pid) != owner and is_rank(pid)]

def is_rank(pid):
    return b"\0RANK=" in b"\0" + open(f"/proc/{pid}/environ", "rb").read()

if rank == "0" and ("RANK" in os.environ or os.environ.get("TEST_SIGNAL_ALONE")):
    sys.addaudithook(hook)
"""


def moment(folder: Path, pattern: str, *, nth: int = 1, to: str = "all", alone: bool = False) -> dict[str, str]:
    """Environment variables that make the first rank act at a moment.

    Args:
        folder: a folder of the test's own.
        pattern: regular expression for an audit event, such as `open FILE MODE FLAGS` or `import NAME ...`.
        nth: which of them.
        to: "all" ranks and the processes in their groups get SIGTERM, "others" all ranks but the first, "nobody" writes
            the file that `reached` names and waits.
        alone: whether the run is one process without torchrun.
    """
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(_CODE)
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH", "")])),
        "TEST_SIGNAL_AT": pattern,
        "TEST_SIGNAL_NTH": str(nth),
        "TEST_SIGNAL_TO": to,
        "TEST_SIGNAL_REACHED": str(reached(folder)),
    }
    return variables | ({"TEST_SIGNAL_ALONE": "1"} if alone else {})


def reached(folder: Path) -> Path:
    """The file that appears when the moment of `to="nobody"` has come."""
    return folder / "reached"


def sigterm_when_reached(folder: Path, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Starts a launcher, sends it SIGTERM once the moment of `to="nobody"` has come; exit status and standard error."""
    running = subprocess.Popen(
        argv, env=os.environ | dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not reached(folder).exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    return running.returncode, said
