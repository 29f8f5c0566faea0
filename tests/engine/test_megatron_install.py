"""Installing Megatron-DeepSpeed whole or not at all: from a repository made here, and from a checkout if there is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from train import outputs
from train.engine.megatron_deepspeed import checkout, install
from train.engine.megatron_deepspeed.install import InstallSettings
from train.errors import UserError

# Enough of upstream's tree to be cloned and compiled; nothing to import.
HELPERS = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "helpers", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_helpers(void) { return PyModule_Create(&module); }
"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository in the form of upstream's, with two commits and the tag `v1` on the first."""
    folder = tmp_path / "upstream with space"
    (folder / "megatron" / "data").mkdir(parents=True)
    (folder / "pretrain_gpt.py").write_text("")
    (folder / "megatron" / "training.py").write_text("")
    (folder / "megatron" / "data" / "helpers.cpp").write_text(HELPERS)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    git(folder, "tag", "v1")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "two")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installer's folder, empty."""
    monkeypatch.setattr(checkout, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.delenv(checkout.DIRECTORY_VARIABLE, raising=False)
    return checkout.cache_dir()


def clone_first(repository: Path) -> Path:
    commit = git(repository, "rev-parse", "v1")
    folder = checkout.folder_for(commit)
    install.clone(str(repository), commit, folder, timeout_s=60)
    return folder


def test_clones_the_very_commit(repository: Path) -> None:
    folder = clone_first(repository)
    assert checkout.commit_of(folder) == git(repository, "rev-parse", "v1") != git(repository, "rev-parse", "HEAD")
    assert (folder / "pretrain_gpt.py").is_file()


def test_tags_and_branches_are_refs_too(repository: Path) -> None:
    git(repository, "branch", "feature/x", "v1")
    for ref, name in (("v1", "v1"), ("feature/x", "feature-x")):
        install.clone(str(repository), ref, checkout.folder_for(ref), timeout_s=60)
        assert checkout.commit_of(checkout.cache_dir() / name) == git(repository, "rev-parse", "v1")


def test_unknown_ref_leaves_nothing(repository: Path, own_cache: Path) -> None:
    with pytest.raises(UserError, match="f" * 40 + " could not be cloned from .*--repository /path/to/"):
        install.clone(str(repository), "f" * 40, checkout.folder_for("f" * 40), timeout_s=60)
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("password", ["t0ken", "t0/k?e#n", "t0%2Fken", "t0'ken@x"])
def test_credentials_in_the_url_are_never_shown(
    password: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://us3r:{password}@127.0.0.1:9/team/x.git"  # nobody listens on the discard port
    assert install.install(InstallSettings(repository=url, dry_run=True)) == 0
    with pytest.raises(
        UserError, match=r"could not be cloned from http://\*\*\*@127\.0\.0\.1:9/team/x\.git: "
    ) as error:
        install.clone(url, "v1", checkout.folder_for("v1"), timeout_s=60)
    shown = capsys.readouterr().out
    assert "http://***@127.0.0.1:9/team/x.git" in shown
    for secret in ("us3r", "t0", "ken"):
        assert secret not in shown and secret not in str(error.value), str(error.value)


def test_a_url_without_credentials_is_shown_as_it_is() -> None:
    for text in ("https://example.org/team/x.git", "git@example.org:team/x.git", "/a folder/with@sign"):
        assert install.without_credentials(text) == text


def test_a_server_that_says_nothing_is_given_up(own_cache: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.git"
        with pytest.raises(UserError, match=r"no answer in 1\.0 s\. Check the ref and the network"):
            install.clone(url, "v1", checkout.folder_for("v1"), timeout_s=1.0)
    assert list(own_cache.iterdir()) == []


def test_a_killed_clone_is_replaced(repository: Path, own_cache: Path) -> None:
    commit = git(repository, "rev-parse", "v1")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = own_cache / f".{commit}.unfinished-{socket.gethostname()}-{dead.pid}"
    (leftover / "megatron").mkdir(parents=True)
    assert checkout.find_checkout() is None
    folder = clone_first(repository)
    assert outputs.is_unfinished(leftover) and list(own_cache.iterdir()) == [folder]


def test_helpers_are_built_for_this_python(repository: Path) -> None:
    folder = clone_first(repository)
    install.build_helpers(folder)
    specification = importlib.util.spec_from_file_location("helpers", checkout.helpers_file(folder))
    assert specification is not None and specification.loader is not None
    assert importlib.util.module_from_spec(specification).__name__ == "helpers"


def test_helpers_that_do_not_compile_leave_nothing(repository: Path) -> None:
    folder = clone_first(repository)
    (folder / "megatron" / "data" / "helpers.cpp").write_text("this is no C++")
    with pytest.raises(UserError, match=r"(?s)the dataset helpers did not compile \(.*error:"):
        install.build_helpers(folder)
    assert not checkout.helpers_file(folder).exists()


def test_found_only_when_it_is_whole(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "PINNED_COMMIT", git(repository, "rev-parse", "v1"))
    assert checkout.find_checkout() is None and "there is no such folder; run" in checkout.why_missing()
    folder = clone_first(repository)
    assert checkout.find_checkout() is None and "its dataset helpers are not built" in checkout.why_missing()
    install.build_helpers(folder)
    found = checkout.find_checkout()
    assert found is not None and found.path == folder and found.commit == git(repository, "rev-parse", "v1")
    assert found.reason == "the pinned commit in this project's cache" and checkout.why_missing() == ""
    (folder / "pretrain_gpt.py").unlink()
    assert "pretrain_gpt.py missing" in checkout.why_missing()


def test_a_checkout_elsewhere_wins(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install.build_helpers(repository)
    monkeypatch.setenv(checkout.DIRECTORY_VARIABLE, str(repository))
    found = checkout.find_checkout()
    assert found is not None and found.path == repository
    assert found.commit == git(repository, "rev-parse", "HEAD") and "MEGATRON_DEEPSPEED_DIR" in found.reason


def test_commit_of_a_folder_without_git_is_unknown(tmp_path: Path) -> None:
    assert checkout.commit_of(tmp_path) == "unknown"


@pytest.mark.slow
def test_a_tree_that_does_not_import_is_told(repository: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)does not import:.*Error"):
        install.smoke_import(clone_first(repository))


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "REQUIRED_PACKAGES", ("six_not_there", "json"))
    (problem,) = install.missing_requirements()
    assert "needs six_not_there: run" in problem and "-m pip install six_not_there" in problem


def test_missing_programs_and_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    monkeypatch.setattr(install.sysconfig, "get_path", lambda _name: str(tmp_path))
    found = install.missing_requirements()
    assert [problem.split(":")[0] for problem in found if "pip install" not in problem] == [
        "git is not on the PATH",
        "no C++ compiler 'no-such-compiler' on the PATH",
        f"{tmp_path / 'Python.h'} is missing",
    ]


def test_dry_run_needs_nothing(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    assert install.install(InstallSettings(dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert f"fetch --quiet --depth 1 {checkout.DEFAULT_REPOSITORY} {checkout.PINNED_COMMIT}" in shown
    assert "helpers.cpp" in shown and not own_cache.exists()


def test_launcher_passes_its_arguments_on(launch, tmp_path: Path) -> None:
    done = launch("common/install_megatron_deepspeed.sh", "--dry_run", "--ref", "v9", "--repository", str(tmp_path))
    assert done.returncode == 0 and f"--depth 1 {tmp_path} v9" in done.stdout


@pytest.mark.megatron
@pytest.mark.slow
def test_installs_from_a_local_clone_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], project_root: Path
) -> None:
    named = os.environ.get(checkout.DIRECTORY_VARIABLE)
    source = Path(named) if named else project_root / ".cache" / "megatron-deepspeed" / checkout.PINNED_COMMIT
    if checkout.commit_of(source) != checkout.PINNED_COMMIT:
        pytest.skip(f"no Megatron-DeepSpeed at {checkout.PINNED_COMMIT}: run {checkout.INSTALL_COMMAND}")
    settings = InstallSettings(repository=str(source))
    assert install.install(settings) == 0
    first = capsys.readouterr().out
    assert "cloned into" in first and "patch deepspeed-compression:" in first
    monkeypatch.chdir(tmp_path)
    assert install.install(settings) == 0
    assert "is already in" in capsys.readouterr().out
    assert checkout.find_checkout() is not None
