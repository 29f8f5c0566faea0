"""Where clusters cannot be made, one sentence says why; a broken set-up is not taken for one that is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hosts import Hosts, NotPossibleError  # type: ignore[import-not-found]

SCRIPT = Path(__file__).with_name("install_packages.sh")


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Puts a program of this name and text before all others on the PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    return put


def install() -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)


def test_packages_that_are_there_are_not_installed_again(pretend):
    pretend("dpkg-query", "printf installed")
    pretend("apt-get", "exit 9")
    assert install().returncode == 0


def test_packages_that_only_root_can_install_are_named(pretend):
    pretend("dpkg-query", 'case "$*" in *pdsh*) exit 1;; *) printf installed;; esac')
    pretend("apt-get", "exit 9")
    pretend("id", "echo 1000")
    done = install()
    assert done.returncode == 1
    assert done.stderr == "install_packages.sh: packages are missing (pdsh) and only root can install them\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_apt_says_is_told(pretend):
    pretend("dpkg-query", 'case "$*" in *pdsh*) exit 1;; *) printf installed;; esac')
    pretend("apt-get", "echo 'E: no such mirror'; exit 100")
    done = install()
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first == "E: no such mirror"
    assert last.startswith("install_packages.sh: apt-get could not install pdsh; its whole output is in ")
    Path(last.split()[-1]).unlink()


def test_hosts_are_refused_to_anybody_but_root(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPossibleError, match="only root"):
        Hosts(tmp_path).start()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ssh-keygen") is None, reason="needs root and ssh-keygen")
@pytest.mark.parametrize(
    ("told", "error"),
    [("unshare: unshare failed: Operation not permitted", NotPossibleError), ("Traceback ...", RuntimeError)],
)
def test_a_machine_without_namespaces_says_so(pretend, tmp_path, told, error):
    pretend("unshare", f"echo '{told}' >&2; exit 1")
    with pytest.raises(error, match=told.replace(".", r"\.")):
        Hosts(tmp_path).start()
