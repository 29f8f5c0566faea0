"""How a run of several processes ended, told by the processes themselves.

torchrun and its like turn every child's exit status into 1, so the true one travels in a small file: each rank calls
`write`, the launcher calls `check` once the command is over.

    in a rank:     return outcome.record(folder / "outcome.json", lambda: train(settings))
    the launcher:  outcome.check(folder / "outcome.json", process.run(command, log=log), log=log)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import interruption
from train.early_end import EndedEarlyError
from train.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, UserError, user_message

_FULL_BYTES = 2**20
INTERRUPTED = "interrupted: the same command goes on from the last checkpoint."
_SIGNALS_OF_THE_USER = (130, 143)  # 128 + SIGINT, 128 + SIGTERM


@dataclass(frozen=True)
class Outcome:
    """What a rank reported.

    Attributes:
        exit_code: one of `train.errors`.
        problems: messages for the user, empty when all went well.
        saved_step: the step of the checkpoint that a run saved because it was asked to end early; None of any other.
    """

    exit_code: int
    problems: tuple[str, ...]
    saved_step: int | None = None


def write(path: Path, exit_code: int, problems: Iterable[str] = (), *, saved_step: int | None = None) -> None:
    """Reports an end. Any rank may call it at any time: the first report stays, as it names the cause.

    Ranks that fail later mostly fail because the first one did.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # FileExistsError: another rank was first. On a full disk the launcher goes by the exit status and the log.
    with contextlib.suppress(OSError), path.open("x", encoding="utf-8") as stream:
        report = {"exit_code": exit_code, "problems": list(problems), "saved_step": saved_step}
        stream.write(json.dumps(report) + "\n")


def read(path: Path) -> Outcome | None:
    """The report, or None when no rank left one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # none, or one that a full disk cut short
        return None
    return Outcome(record["exit_code"], tuple(record["problems"]), record.get("saved_step"))


def record(path: Path, body: Callable[[], None], *, leads: bool = True) -> int:
    """Runs `body` in a rank, reports how it ended, and returns the exit code.

    A full disk and the like are told as such; other exceptions keep their traceback.

    Args:
        path: where the report goes.
        body: the work of this rank.
        leads: whether this rank (the first one) also reports success.
    """

    def interrupted() -> int:
        write(path, EXIT_INTERRUPTED, (INTERRUPTED,))
        return EXIT_INTERRUPTED

    interruption.raise_keyboard_interrupt(interrupted)  # `train.early_end` takes SIGTERM over once it can save
    try:
        body()
        _leave_process_group()
    except EndedEarlyError as end:
        write(path, end.exit_code, end.problems, saved_step=end.step)
        with contextlib.suppress(Exception):  # the checkpoint is whole, whatever becomes of the other ranks
            _leave_process_group()
        return end.exit_code
    except UserError as error:
        write(path, error.exit_code, error.problems)
        return error.exit_code
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        write(path, EXIT_USER, (message,))
        return EXIT_USER
    except KeyboardInterrupt:
        return interrupted()
    if leads:
        write(path, EXIT_OK)
    return EXIT_OK


def _leave_process_group() -> None:
    """Ends communication while all ranks are there: none may find that another has gone."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def check(path: Path, exit_status: int, *, log: Path, cause: str = "") -> None:
    """Returns when a run went well; otherwise says why it did not, with the true exit code.

    What the ranks could not tell themselves is kept in their place, for `status.sh` to read.

    Args:
        path: the ranks' report. Remove an old one before the run starts.
        exit_status: what the launching command returned.
        log: the file that holds what the ranks printed.
        cause: what the launcher knows of the end, where a rank died without a word.

    Raises:
        UserError: a rank reported a failure, the command failed, or it ended without any report.
    """
    outcome = read(path)
    # when one rank dies the others are stopped, and may report that first; it was the user only if we passed it on, or
    # if all ranks have saved together, which takes all of them
    stopped = outcome is not None and outcome.exit_code == EXIT_INTERRUPTED and outcome.saved_step is None
    if outcome is not None and outcome.exit_code != EXIT_OK and not stopped:
        raise UserError(outcome.problems, exit_code=outcome.exit_code)
    error = _error(exit_status, log, cause, is_told=outcome is not None and not stopped)
    if error is not None:
        with contextlib.suppress(OSError):  # a full disk has no room for it
            path.unlink(missing_ok=True)
            write(path, error.exit_code, error.problems)
        raise error


def _error(exit_status: int, log: Path, cause: str, *, is_told: bool) -> UserError | None:
    """What went wrong that no rank has told; `is_told` when the first rank told that all went well."""
    if exit_status in _SIGNALS_OF_THE_USER:
        return UserError(INTERRUPTED, exit_code=EXIT_INTERRUPTED)
    folder = log.parent
    if exit_status != EXIT_OK and folder.is_dir() and shutil.disk_usage(folder).free < _FULL_BYTES:  # none for a report
        return UserError(f"{folder}: no space left: free some, and the same command goes on from the last checkpoint.")
    if exit_status != EXIT_OK and cause:
        return UserError(f"{cause}\nAll of the output: {log}.", exit_code=exit_status)
    if exit_status != EXIT_OK:
        return UserError(
            f"training broke off with status {exit_status}: the traceback is above, and in {log}.",
            exit_code=EXIT_FAILURE,
        )
    if not is_told:
        return UserError(f"training ended without saying how: see {log}.", exit_code=EXIT_FAILURE)
    return None
