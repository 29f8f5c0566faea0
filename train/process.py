"""The one place that starts programs. Everything else builds a `Command` and hands it here.

    exit_code = process.run(Command(("python", "-m", "train.engine.transformers.worker")), log=folder / "rank0.log")

Commands are lists of arguments: nothing goes through a shell.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Protocol

from train import outputs

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIALS?)(_|$)", re.IGNORECASE)
MARK = "TRAIN_RUN_MARK"  # the environment variable by which everything that a run started is found
_LIBC = ctypes.CDLL(None)  # loaded here: nothing may be loaded between fork and exec
_POLL_S = 0.5
Child = subprocess.Popen[bytes]
GRACE_S = 30.0  # what a child gets between our signal and SIGKILL: long enough for the last log lines


@dataclass(frozen=True)
class Command:
    """A program to start.

    Attributes:
        argv: the program and its arguments.
        environment: variables set on top of the caller's environment.
        working_dir: where it runs; the caller's folder when None.
        files: rendered files it reads, written just before it starts.
        hides_secrets: whether the caller's secrets stay with the caller, by their variables' names.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    working_dir: Path | None = None
    files: Mapping[Path, str] = field(default_factory=dict)
    hides_secrets: bool = False

    def text(self) -> str:
        """The command as one would type it, for --dry_run and logs. Values of secrets are not shown."""
        words = [f"{name}={redacted(name, shlex.quote(value))}" for name, value in sorted(self.environment.items())]
        words += [shlex.quote(word) for word in self.argv]
        line = " ".join(words)
        return f"cd {shlex.quote(str(self.working_dir))} && {line}" if self.working_dir else line


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret."""
    return _SECRET_NAME.search(name) is not None


def redacted(name: str, value: str) -> str:
    """`value`, or three stars when the variable's name says that it is a secret."""
    return "***" if is_secret(name) else value


class Watcher(Protocol):
    """Somebody who follows a program while it runs, and speaks to what it started by another way."""

    def output(self, chunk: bytes) -> None:
        """The program has printed this."""

    def signalled(self, number: int) -> None:
        """This process got SIGINT or SIGTERM; the program does not get it."""

    def is_over(self) -> bool:
        """Whether the program is to be killed now. Asked twice a second, and after all output."""


def run(command: Command, *, log: Path | None = None, watcher: Watcher | None = None, grace_s: float = GRACE_S) -> int:
    """Runs `command`, copies its output to this terminal and to `log`, and returns its true exit code.

    SIGINT and SIGTERM go on to the program; what is still there `grace_s` later is killed. With a `watcher` it is
    the watcher who answers them and says when to kill. Whatever the program started ends with it, even ranks in
    sessions of their own whose launcher was killed; and it ends when this process is killed.

    Returns:
        The program's exit status, or 128 + N when signal N ended it or was passed on to it, as shells have it.
    """
    for file, text in command.files.items():
        outputs.write_text(file, text)
    mark = f"{os.environ.get(MARK, '')}/{uuid.uuid4()}"  # a run inside a run carries both
    child = subprocess.Popen(
        command.argv,
        env={**_inherited(command), **command.environment, MARK: mark},
        cwd=command.working_dir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # one process group, so that a signal reaches the program and its children
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )

    passed_on: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        passed_on.append(number)
        if watcher is not None:  # told in the loop below, where no lock of its can be held
            return
        signal_group(child, number)
        signal.setitimer(signal.ITIMER_REAL, grace_s / mark.count("/"))  # an inner run gives up before its outer one

    def kill(_number: int, _frame: FrameType | None) -> None:
        signal_group(child, signal.SIGKILL)

    handlers = {signal.SIGINT: pass_on, signal.SIGTERM: pass_on, signal.SIGALRM: kill}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        _copy_output(child, log, mark, watcher, passed_on)
        return_code = child.wait()
    except BaseException:
        signal_group(child, signal.SIGKILL)
        child.wait()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        kill_marked(mark)
    if passed_on and return_code != 0 and watcher is None:  # torchrun and its like end with 1 then; the cause was ours
        return 128 + passed_on[0]
    return return_code if return_code >= 0 else 128 - return_code


def start(argv: Sequence[str], environment: Mapping[str, str], working_dir: str | None) -> Child:
    """Starts a program that the caller watches itself; what it prints goes to its `stdout`, a pipe.

    It runs in a session of its own, and the kernel kills it when this process dies.

    Args:
        argv: the program and its arguments.
        environment: all of its variables.
        working_dir: where it runs; this process's folder when None.

    Raises:
        OSError: there is no such program or folder.
    """
    return subprocess.Popen(
        argv,
        env=environment,
        cwd=working_dir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_killed_with_parent if sys.platform == "linux" else None,
    )


def capture(command: Command, *, timeout_s: float = 60.0) -> tuple[int, str]:
    """Runs a short command and returns its exit status and everything it printed; 127 when it does not exist."""
    try:
        child = subprocess.Popen(
            command.argv,
            env={**_inherited(command), **command.environment},
            cwd=command.working_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # git's transport, a child of a child, must not keep us waiting beyond the time
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
    except FileNotFoundError:
        return 127, f"{command.argv[0]}: not found"
    try:
        text, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        signal_group(child, signal.SIGKILL)
        text, _ = child.communicate()
        return 124, text.decode(errors="replace") + f"\n{command.argv[0]}: no answer in {timeout_s} s"
    except BaseException:
        signal_group(child, signal.SIGKILL)
        child.wait()
        raise
    return child.returncode, text.decode(errors="replace")


def _inherited(command: Command) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not (command.hides_secrets and is_secret(name))}


def _copy_output(
    child: subprocess.Popen[bytes], log: Path | None, mark: str, watcher: Watcher | None, signals: Sequence[int]
) -> None:
    """Copies until nobody holds the pipe any more. Once the program has ended, what it left behind is ended too."""
    assert child.stdout is not None
    with contextlib.ExitStack() as stack:
        sinks: list[BinaryIO] = [sys.stdout.buffer]
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            sinks.append(stack.enter_context(log.open("ab")))
        swept, told = False, 0
        while True:
            if watcher is not None:
                for number in signals[told:]:
                    watcher.signalled(number)
                    told += 1
                if watcher.is_over() and child.poll() is None:
                    signal_group(child, signal.SIGKILL)
            ready, _, _ = select.select([child.stdout], [], [], _POLL_S)
            if not swept and child.poll() is not None:
                kill_marked(mark)
                swept = True
            if not ready:
                continue
            chunk = os.read(child.stdout.fileno(), 65536)
            if not chunk:
                return
            if watcher is not None:
                watcher.output(chunk)
            for sink in list(sinks):
                try:
                    sink.write(chunk)
                    sink.flush()
                except BrokenPipeError:  # nobody reads the terminal any more (| head): the run and its log go on
                    sinks.remove(sink)
                except OSError as error:
                    if error.errno != errno.EIO or sink is not sys.stdout.buffer:
                        raise
                    _leave_terminal()  # it was closed under a run in the background: the run and its log go on


def _leave_terminal() -> None:
    """Sends what is still to be printed nowhere: no later word of this process's may end it."""
    nowhere, terminal = os.open(os.devnull, os.O_WRONLY), os.fstat(sys.stdout.fileno())
    for stream in (sys.stdout, sys.stderr):
        if os.path.samestat(os.fstat(stream.fileno()), terminal):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def marked(command: Command) -> Iterator[tuple[Command, str]]:
    """For `capture`: the command with a mark of its own, and the mark. Whatever it started ends with the block.

    torchrun's workers, for one, have sessions of their own, and would keep their GPUs.
    """
    mark = uuid.uuid4().hex
    try:
        yield Command(command.argv, {**command.environment, MARK: mark}), mark
    finally:
        kill_marked(mark)


def kill_marked(mark: str) -> None:
    """Kills every process that carries the mark of a run that has ended."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK, "").startswith(mark):
                process.kill()


def end_with_parent() -> None:
    """In the child: asks the kernel for SIGTERM when the process that started it dies (prctl, PR_SET_PDEATHSIG)."""
    _LIBC.prctl(1, signal.SIGTERM)


def _killed_with_parent() -> None:
    """In the child: as `end_with_parent`, with the signal that nobody can hold up."""
    _LIBC.prctl(1, signal.SIGKILL)


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
