"""What went wrong, said once: exceptions for the user, and the exit codes of every launcher.

Library code raises `UserError` for anything the user can put right: what was given, what was expected, what to do
next. `train.cli.run` turns it into one message on stderr and a non-zero exit code. Python's own exceptions stay for
our own mistakes, and keep their traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1  # something broke that is not the user's to mend: a traceback says where
EXIT_USER = 2  # the input, a setting or the machine must change first
EXIT_VERIFICATION = 3  # a hand-over was not proven: ids, weights or logits differ
EXIT_NON_FINITE_LOSS = 4  # training met NaN or infinity; the last good checkpoint is named
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_BROKEN_PIPE = 141  # nobody reads our output any more; 128 + SIGPIPE, as shells have it
MOST_PROBLEMS = 10  # that one message tells of a file's records


_USER_ERRNOS = {
    errno.ENOSPC: "no space left: free some, or choose an output on another disk.",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose an output on another disk.",
    errno.EACCES: "permission denied: choose another path or change its permissions.",
    errno.EPERM: "not permitted: choose another path or change its permissions.",
    errno.EROFS: "the file system is read-only: choose another output.",
    errno.ENOENT: "there is no such file: check the path.",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one.",
    errno.EISDIR: "this is a folder, a file is expected here.",
    errno.ENOTDIR: "a part of this path is a file, a folder is expected there.",
}


class UserError(Exception):
    """One or more problems the user can fix. All of them are reported at once.

    Args:
        problems: one message, or several; each a full sentence that ends with what to do.
        exit_code: the launcher's exit status.
    """

    def __init__(self, problems: str | Iterable[str], *, exit_code: int = EXIT_USER) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.exit_code = exit_code
        super().__init__("\n".join(self.problems))


class VerificationError(UserError):
    """A conversion's result differs from its source. Nothing that was not proven is handed over."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        super().__init__(problems, exit_code=EXIT_VERIFICATION)


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        super().__init__(problems, exit_code=EXIT_NON_FINITE_LOSS)


def refuse(problems: Iterable[str], *, rest: str | None = None) -> None:
    """Raises `UserError` with all `problems`, or returns when there is none.

    Args:
        problems: messages.
        rest: what is wrong with whatever they tell of, such as "records are no questions": of problems that may be as
            many as a file has lines, the first ten are told then, and how many more there are.
    """
    found = tuple(problems)
    more = len(found) - MOST_PROBLEMS
    if rest is not None and more > 0:
        found = (*found[:MOST_PROBLEMS], f"{more} more {rest}.")
    if found:
        raise UserError(found)


def first_line(error: BaseException) -> str:
    """What an error of a library says first, to quote in a message of ours; its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# How errors without an errno tell of a full disk: the system's words, and those of torch's file writer.
_FULL_DISK_SIGNS = (os.strerror(errno.ENOSPC), ". unexpected pos ", "PytorchStreamWriter failed writing file")


def user_message(error: BaseException) -> str | None:
    """What to tell of an error that the user can mend (no space, no permission, a wrong path); None of any other.

    A full disk is also found behind an error of a library's own: torch raises a RuntimeError after the OSError, or one
    that only tells of the short write, and safetensors one that quotes the system.
    """
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{_USER_ERRNOS[error.errno]}"
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno in (errno.ENOSPC, errno.EDQUOT):
            return user_message(behind)
        if any(sign in str(behind) for sign in _FULL_DISK_SIGNS):
            return _USER_ERRNOS[errno.ENOSPC]
        behind = behind.__cause__ or behind.__context__
    return None
