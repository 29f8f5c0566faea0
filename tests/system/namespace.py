"""Runs inside the namespaces of one host of tests/system: as its first process, or to start a further program there.

    unshare ... python namespace.py init NODE FOLDER    # process 1: mounts, host name; ends when its stdin does
    python namespace.py enter PID PROGRAM ARGUMENT...   # PROGRAM on that host, with this environment and folder

`enter` is what `ssh` would be without a server: it passes signals on and ends as the program ended. nsenter does
neither. Only the standard library, and no import of this project: it starts in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")  # mnt last: the others are looked up in this side's /proc
_PRIVATE = (("tmpfs", "/run"), ("tmpfs", "/dev/shm"), ("proc", "/proc"), ("sysfs", "/sys"))
_RUN = ("sshd", "munge", "slurm", "gridengine")  # folders that an installed system's start makes


def init(name: str, folder: Path) -> None:
    """Makes this process's new namespaces a host, tells its process id as seen from outside, and buries orphans.

    Every file under `folder`/etc and `folder`/NAME/etc is laid over the machine's file of that name.
    """
    outer_pid = Path("/proc/self").readlink()
    for etc in (folder / "etc", folder / name / "etc"):
        for file in sorted(etc.iterdir()):
            mount("--bind", str(file), f"/etc/{file.name}")
    for kind, target in _PRIVATE:
        mount("-t", kind, kind, target)
    for service in _RUN:
        Path("/run", service).mkdir()
    subprocess.run(["hostname", name], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, _bury)
    print(outer_pid, flush=True)
    os.read(0, 1)  # whoever made this host is gone, or closes it: the kernel then ends everything in here


def enter(pid: int, argv: list[str]) -> int:
    """Starts `argv` in the namespaces of process `pid`, and returns its exit status; 128 + N when signal N ended it."""
    folder = Path.cwd()
    for namespace in _NAMESPACES:
        with Path(f"/proc/{pid}/ns/{namespace}").open("rb") as file:
            if _LIBC.setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"setns {namespace} of process {pid}")
    with contextlib.suppress(OSError):  # the host has not this folder: it stays at the root
        os.chdir(folder)
    passed_on = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # none is lost before the program can be told
    child = os.fork()  # a process id namespace takes effect for children only
    if child == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            print(f"{argv[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    for number in passed_on:
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def small_disk(target: str, size: str, keep: list[str]) -> None:
    """Lays an empty file system of `size` (as mount's -o size) over `target`; folders of `keep` in it stay visible."""
    Path(target).mkdir(parents=True, exist_ok=True)
    inside = [folder for folder in keep if Path(folder).is_relative_to(target) and folder != target]
    held = [os.open(folder, os.O_PATH) for folder in inside]
    mount("-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", target)
    for folder, descriptor in zip(inside, held, strict=True):
        Path(folder).mkdir(parents=True, exist_ok=True)
        mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", folder)
        os.close(descriptor)


def _bury(_number: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["init", host, base]:
            init(host, Path(base))
        case ["enter", process, *program] if program:
            sys.exit(enter(int(process), program))
        case ["small_disk", place, size_text, *kept]:
            small_disk(place, size_text, kept)
        case _:
            sys.exit(f"namespace.py: {sys.argv[1:]}: not what its first lines say")
