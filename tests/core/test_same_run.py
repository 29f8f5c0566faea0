"""A second launch of the same run is kept away, and told who holds it."""

from __future__ import annotations

import fcntl
import os

import pytest

from train import same_run
from train.errors import UserError


def test_a_second_launch_is_told_process_and_host_of_the_first(tmp_path):
    lock = tmp_path / "run" / ".lock"
    with same_run.claimed(lock, "out"):
        holder = rf"\({os.getpid()} on {os.uname().nodename}\)"
        with (
            pytest.raises(UserError, match=f"out is being made by another process {holder}: wait for it, or stop it."),
            same_run.claimed(lock, "out"),
        ):
            raise AssertionError("two at once")
    with same_run.claimed(lock, "out"):  # it was let go
        assert lock.read_text() == f"{os.getpid()} on {os.uname().nodename}\n"


def test_a_lock_of_an_older_version_names_nobody(tmp_path):
    lock = tmp_path / ".lock"
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="out is being made by another process: wait"),
            same_run.claimed(lock, "out"),
        ):
            raise AssertionError("two at once")
