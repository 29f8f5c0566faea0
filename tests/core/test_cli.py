"""Launchers tell the truth in their exit code and say what is wrong on stderr."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import pytest

from train import cli
from train.errors import NonFiniteLossError, UserError, VerificationError, user_message
from train.settings import setting


@dataclass(frozen=True)
class Settings:
    name: str = setting("x", help="a name")


def run(function, *words: str) -> int:
    return cli.run(Settings, function, words, description="what it does", example="example.py --name y")


def fails_with(error: BaseException):
    def function(_settings: Settings) -> int:
        raise error

    return function


def test_success_is_zero():
    assert run(lambda _: None) == 0
    assert run(lambda _: 0) == 0


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("one thing"), 2, "error: one thing"),
        (UserError(["one", "two"]), 2, "error: 2 problems:\n  - one\n  - two"),
        (VerificationError("differs"), 3, "error: differs"),
        (NonFiniteLossError("NaN"), 4, "error: NaN"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "full", "/data/x"), 2, "error: /data/x: no space left"),
        (OSError(errno.EROFS, "ro", "/data/x"), 2, "error: /data/x: the file system is read-only"),
        (PermissionError(errno.EACCES, "no", "/data/x"), 2, "error: /data/x: permission denied"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_a_code(error, code, text, capsys):
    assert run(fails_with(error)) == code
    assert text in capsys.readouterr().err


def behind(error: BaseException, cause: BaseException) -> BaseException:
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full", "/data/x"), "/data/x: no space left"),
        (behind(RuntimeError("unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "full")), "no space left"),
        (behind(RuntimeError("stream"), behind(ValueError("x"), OSError(errno.EDQUOT, "quota"))), "the disk quota"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "no space left"),
        (RuntimeError("shapes differ"), None),
        (OSError(errno.EIO, "bad disk"), None),
        (behind(RuntimeError("ours"), FileNotFoundError(errno.ENOENT, "none", "x")), None),
    ],
)
def test_what_the_user_can_mend_is_told_of_library_errors_too(error, message):
    told = user_message(error)
    assert (told is None) if message is None else told.startswith(message)


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(fails_with(ZeroDivisionError()))
    with pytest.raises(OSError, match="bad"):
        run(fails_with(OSError(errno.EIO, "bad disk")))


def test_a_wrong_flag_is_exit_code_2(capsys):
    assert run(lambda _: 0, "--nam", "y") == 2
    assert "did you mean --name?" in capsys.readouterr().err
