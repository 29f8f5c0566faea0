"""One host of tests/system: programs started on it, what runs on it, and its part of the network."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMESPACE = Path(__file__).with_name("namespace.py")
DAEMONS = {"sshd", "munged", "slurmctld", "slurmd", "sge_qmaster", "sge_execd"}  # a cluster's own processes


@dataclass(frozen=True)
class Process:
    """A process on a host. `pid` is its id on this machine, outside of the host's namespace."""

    pid: int
    name: str
    argv: tuple[str, ...]


@dataclass
class Host:
    """One host. `holder` keeps it; `pid` is its first process as seen from this machine."""

    name: str
    address: str
    interface: str
    home: Path
    holder: subprocess.Popen[str]
    pid: int
    small_disks: list[str] = field(default_factory=list)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this host, with the caller's environment, folder, input and output."""
        return [sys.executable, "-S", "-E", str(NAMESPACE), "enter", str(self.pid), *argv]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What root finds after logging in, and `extra`: nothing of this process's environment."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        login = {"HOME": str(self.home), "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8"}
        return {**login, "PATH": path, **(extra or {})}

    def popen(self, argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path) -> subprocess.Popen[str]:
        """Starts `argv`; stdout and stderr together are its `stdout`. Signals sent to it reach `argv`."""
        return subprocess.Popen(
            self.command(argv), env=self.environment(env), cwd=cwd, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Runs `argv`; killed and subprocess.TimeoutExpired after `timeout_s`."""
        return subprocess.run(
            self.command(argv), env=self.environment(env), cwd=cwd, text=True, errors="replace", timeout=timeout_s,
            stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True,
        )  # fmt: skip

    def ip(self, *commands: str) -> None:
        """Runs ip's commands on this host's network; process ids in them are those of this machine."""
        for command in commands:
            argv = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", *command.split()]
            subprocess.run(argv, check=True, capture_output=True, text=True)

    def processes(self) -> list[Process]:
        """Everything that runs here, except the first process."""
        namespace, found = Path(f"/proc/{self.pid}/ns/pid").readlink(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if (folder / "ns" / "pid").readlink() == namespace and int(folder.name) != self.pid:
                    argv = (folder / "cmdline").read_text(errors="replace").split("\0")[:-1]
                    found.append(Process(int(folder.name), (folder / "comm").read_text().strip(), tuple(argv)))
        return found


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Returns when `condition` holds.

    Raises:
        TimeoutError: naming `what` was waited for.
    """
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.05)
