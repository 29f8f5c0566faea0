"""The installer killed at every step, and two at the same time: programs of its own, in a cache of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron_small_repository import git, make_repository

from train.engine.megatron_deepspeed import checkout

# What the launcher runs, but for the import of upstream's code, which this repository does not hold.
INSTALL = """
import sys
from pathlib import Path
from train.engine.megatron_deepspeed import checkout, install
checkout.PROJECT_ROOT = Path(sys.argv[1])
install.smoke_import = lambda folder: ""
install.install(install.InstallSettings(repository=sys.argv[2], ref=sys.argv[3]))
"""
# Stands before the real program on the PATH: at one of its calls it kills the installer, which ends it too.
KILLER = """#!/bin/bash
case "$*" in
    *"$KILL_AT"*) kill -KILL $PPID; exec sleep 60 ;;
esac
PATH="$REAL_PATH" exec {program} "$@"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "upstream")


def start(project: Path, repository: Path, ref: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", INSTALL, project, repository, ref],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished_cache(project: Path, ref: str) -> bool:
    """Whether the cache holds the whole checkout, its compiled helpers, and nothing else."""
    folder = project / ".cache" / "megatron-deepspeed"
    helpers = checkout.helpers_file(folder / ref)
    neighbours = [path.name for path in helpers.parent.iterdir() if "helpers" in path.name]
    return (
        [path.name for path in folder.iterdir()] == [ref]
        and checkout.commit_of(folder / ref) == ref
        and sorted(neighbours) == sorted(["helpers.cpp", helpers.name])
    )


@pytest.fixture
def killers(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "killers"
    folder.mkdir()
    for program in ("git", "g++"):
        (folder / program).write_text(KILLER.format(program=program))
        (folder / program).chmod(0o755)
    yield folder


@pytest.mark.parametrize("moment", [" init ", " fetch ", " checkout ", "helpers.cpp"])
def test_killed_and_run_again_it_ends_whole(moment: str, repository: Path, killers: Path, tmp_path: Path) -> None:
    ref, project = git(repository, "rev-parse", "v1"), tmp_path / "project"
    path = os.environ["PATH"]
    killed = start(
        project, repository, ref, PATH=f"{killers}{os.pathsep}{path}", REAL_PATH=path, KILL_AT=moment, CXX="g++"
    )
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    again = start(project, repository, ref)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0, said
    once_more = start(project, repository, ref)
    said, _ = once_more.communicate(timeout=60)
    assert once_more.returncode == 0 and "is already in" in said and "are already built" in said
    assert finished_cache(project, ref)


def test_two_at_the_same_time_take_turns(repository: Path, tmp_path: Path) -> None:
    ref, project, gate = git(repository, "rev-parse", "v1"), tmp_path / "project", tmp_path / "gate"
    slow = tmp_path / "slow-g++"
    slow.write_text(f'#!/bin/bash\nwhile [ ! -e "{gate}" ]; do sleep 0.05; done\nexec g++ "$@"\n')
    slow.chmod(0o755)
    first = start(project, repository, ref, CXX=str(slow))
    assert first.stdout is not None and "cloned into" in first.stdout.readline()  # it holds the lock until the gate
    second = start(project, repository, ref)
    assert second.stdout is not None and "another installation is under way: waiting" in second.stdout.readline()
    gate.touch()
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert "dataset helpers built" in said[0] and "is already in" in said[1] and "are already built" in said[1]
    assert finished_cache(project, ref)
