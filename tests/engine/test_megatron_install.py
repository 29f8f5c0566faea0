"""Installing Megatron-DeepSpeed whole or not at all: from a repository made here, and from a checkout if there is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_small_repository import git, make_repository

from train import outputs
from train.engine.megatron_deepspeed import checkout, helpers_build, install
from train.engine.megatron_deepspeed.clone import clone, without_credentials
from train.engine.megatron_deepspeed.install import InstallSettings
from train.errors import UserError

_BROKEN_HELPERS = """
#include <Python.h>
#include <csignal>
#include <iostream>
static PyObject* wrong() {
    PyObject* numpy = PyImport_ImportModule("numpy");
    return PyObject_CallMethod(numpy, "array", "([ii])", 1, 2);
}
static PyObject* build(PyObject*, PyObject*) { (void)wrong; %s }
static PyMethodDef methods[] = {{"build_sample_idx", build, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "helpers", NULL, -1, methods};
PyMODINIT_FUNC PyInit_helpers(void) { return PyModule_Create(&module); }
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository in the form of upstream's, with two commits and the tag `v1` on the first."""
    return make_repository(tmp_path / "upstream with space")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installer's folder, empty."""
    monkeypatch.setattr(checkout, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.delenv(checkout.DIRECTORY_VARIABLE, raising=False)
    return checkout.cache_dir()


def clone_first(repository: Path) -> Path:
    commit = git(repository, "rev-parse", "v1")
    folder = checkout.folder_for(commit)
    clone(str(repository), commit, folder, timeout_s=60)
    return folder


def test_clones_the_very_commit(repository: Path) -> None:
    folder = clone_first(repository)
    assert checkout.commit_of(folder) == git(repository, "rev-parse", "v1") != git(repository, "rev-parse", "HEAD")
    assert (folder / "pretrain_gpt.py").is_file()


def test_tags_and_branches_are_refs_too(repository: Path) -> None:
    git(repository, "branch", "feature/x", "v1")
    for ref, name in (("v1", "v1-"), ("feature/x", "feature-x-")):
        folder = checkout.folder_for(ref, str(repository))
        assert folder.name.startswith(name)
        clone(str(repository), ref, folder, timeout_s=60)
        assert checkout.commit_of(folder) == git(repository, "rev-parse", "v1")


def test_one_folder_per_commit_and_per_tag_of_a_repository(repository: Path, tmp_path: Path) -> None:
    tag, commit = "ucllm_nedo_v20240415.1.0", "a" * 40
    upstream, fork = checkout.DEFAULT_REPOSITORY, "https://github.com/matsuolab/Megatron-DeepSpeed"
    assert checkout.folder_for(commit, upstream) == checkout.folder_for(commit, fork) == checkout.cache_dir() / commit
    folders = [checkout.folder_for(ref, place) for ref in (tag, "a/b", "a-b") for place in (upstream, fork, ".")]
    assert len(set(folders)) == len(folders) and all(folder.parent == checkout.cache_dir() for folder in folders)
    with_password = "https://me:secret@github.com/matsuolab/Megatron-DeepSpeed.git/"
    assert checkout.folder_for(tag, with_password) == checkout.folder_for(tag, fork)


def test_a_bare_repository_and_a_bundle_are_sources_too(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "v1")
    bare, bundle = tmp_path / "bare.git", tmp_path / "all.bundle"
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(bare))
    git(repository, "bundle", "create", "--quiet", str(bundle), "--all")
    for number, (source, ref) in enumerate([(bare, commit), (bare, "v1"), (bundle, commit), (bundle, "v1")]):
        folder = tmp_path / f"clone{number}"
        clone(str(source), ref, folder, timeout_s=60)
        assert checkout.commit_of(folder) == commit and (folder / "pretrain_gpt.py").is_file()
    with pytest.raises(UserError, match=r"v9 could not be cloned from .*all\.bundle: .*couldn't find remote ref v9"):
        clone(str(bundle), "v9", tmp_path / "none", timeout_s=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_shared_clone_of_another_user_is_a_source(repository: Path, tmp_path: Path) -> None:
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 1000, 1000)
    commit = git(tmp_path, "-c", "safe.directory=*", "-C", str(repository), "rev-parse", "v1")
    clone(str(repository), commit, tmp_path / "clone", timeout_s=60)
    assert checkout.commit_of(tmp_path / "clone") == commit


def test_without_a_network_it_says_what_to_do(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/team/Megatron-DeepSpeed.git"  # nobody listens on the discard port
    with pytest.raises(UserError) as error:
        clone(url, "6acc370", tmp_path / "clone", timeout_s=60)
    told = str(error.value)
    assert "Failed to connect to 127.0.0.1 port 9" in told and "Check the ref and the network." in told
    assert "A commit is named by all 40 characters of its hash." in told and "git bundle create" in told
    assert told.endswith(f"{checkout.INSTALL_COMMAND} --repository /path/to/Megatron-DeepSpeed")


def test_unknown_ref_leaves_nothing(repository: Path, own_cache: Path) -> None:
    with pytest.raises(UserError, match="f" * 40 + " could not be cloned from .*--repository /path/to/"):
        clone(str(repository), "f" * 40, checkout.folder_for("f" * 40), timeout_s=60)
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
        clone(url, "v1", checkout.folder_for("v1"), timeout_s=60)
    shown = capsys.readouterr().out
    assert "http://***@127.0.0.1:9/team/x.git" in shown
    for secret in ("us3r", "t0", "ken"):
        assert secret not in shown and secret not in str(error.value), str(error.value)


def test_a_url_without_credentials_is_shown_as_it_is() -> None:
    for text in ("https://example.org/team/x.git", "git@example.org:team/x.git", "/a folder/with@sign"):
        assert without_credentials(text) == text


def test_a_server_that_says_nothing_is_given_up(own_cache: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.git"
        with pytest.raises(UserError, match=r"no answer in 1\.0 s\. Check the ref and the network"):
            clone(url, "v1", checkout.folder_for("v1"), timeout_s=1.0)
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
    helpers_build.build_helpers(folder)
    specification = importlib.util.spec_from_file_location("helpers", checkout.helpers_file(folder))
    assert specification is not None and specification.loader is not None
    assert importlib.util.module_from_spec(specification).__name__ == "helpers"


def test_helpers_that_do_not_compile_leave_nothing(repository: Path) -> None:
    folder = clone_first(repository)
    (folder / "megatron" / "data" / "helpers.cpp").write_text("this is no C++")
    with pytest.raises(UserError, match=r"(?s)the dataset helpers did not compile \(.*error:"):
        helpers_build.build_helpers(folder)
    assert not checkout.helpers_file(folder).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's linker and C++ library")
def test_helpers_with_a_cpp_library_of_their_own_print_numbers_beside_torch(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = clone_first(repository)
    body = 'std::cout << "samples: " << 3L << std::endl; return wrong();'
    (folder / "megatron" / "data" / "helpers.cpp").write_text(_BROKEN_HELPERS % body)
    monkeypatch.setenv("CXX", "g++ -static-libstdc++")
    helpers_build.build_helpers(folder)
    with pytest.raises(UserError, match=r"samples: 3\n"):  # "samples: " and nothing else where libraries are mixed
        helpers_build.check_helpers(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise(SIGSEGV); return nullptr;", r"\(killed by SIGSEGV\).* and run this again\.$"),
        ("return wrong();", r"(?s)\(a wrong index\).*\.so said:\nbuild_sample_idx returned \[1, 2\], expected"),
    ],
)
def test_helpers_that_do_not_work_are_told_and_deleted(repository: Path, body: str, said: str) -> None:
    folder = clone_first(repository)
    (folder / "megatron" / "data" / "helpers.cpp").write_text(_BROKEN_HELPERS % body)
    helpers_build.build_helpers(folder)
    with pytest.raises(UserError, match=said):
        helpers_build.check_helpers(folder)
    assert not checkout.helpers_file(folder).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise(SIGKILL); return nullptr;", "could not be tried: status -9 "),
        ('return Py_BuildValue("i", 7);', "could not be tried: AttributeError: 'int' object has no attribute 'tolist'"),
    ],
)
def test_helpers_that_could_not_be_tried_stay(repository: Path, body: str, said: str) -> None:
    folder = clone_first(repository)
    (folder / "megatron" / "data" / "helpers.cpp").write_text(_BROKEN_HELPERS % body)
    helpers_build.build_helpers(folder)
    assert said in helpers_build.check_helpers(folder)
    assert checkout.helpers_file(folder).exists()


@pytest.mark.slow
def test_helpers_of_another_day_that_do_not_work_are_compiled_anew(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clone_first(repository)
    source = folder / "megatron" / "data" / "helpers.cpp"
    good = source.read_text()
    source.write_text(_BROKEN_HELPERS % "raise(SIGSEGV); return nullptr;")
    helpers_build.build_helpers(folder)
    source.write_text(good)
    install._bring_helpers(folder)
    said = capsys.readouterr().out
    assert "(killed by SIGSEGV): they are compiled anew" in said and "dataset helpers built" in said
    assert checkout.helpers_file(folder).is_file()


def test_found_only_when_it_is_whole(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "PINNED_COMMIT", git(repository, "rev-parse", "v1"))
    assert checkout.find_checkout() is None and "there is no such folder; run" in checkout.why_missing()
    folder = clone_first(repository)
    assert checkout.find_checkout() is None and "its dataset helpers are not built" in checkout.why_missing()
    helpers_build.build_helpers(folder)
    found = checkout.find_checkout()
    assert found is not None and found.path == folder and found.commit == git(repository, "rev-parse", "v1")
    assert found.reason == "the pinned commit in this project's cache" and checkout.why_missing() == ""
    (folder / "pretrain_gpt.py").unlink()
    assert "pretrain_gpt.py missing" in checkout.why_missing()


def test_other_versions_that_are_installed_are_named(repository: Path) -> None:
    commit = git(repository, "rev-parse", "v1")
    clone(str(repository), commit, checkout.folder_for(commit), timeout_s=60)
    assert "Other versions" not in checkout.why_missing()  # its helpers are not built
    helpers_build.build_helpers(checkout.folder_for(commit))
    told = checkout.why_missing()
    named = shlex.quote(str(checkout.folder_for(commit)))
    assert told.endswith(f"MEGATRON_DEEPSPEED_DIR={named} takes one.")


def test_a_variable_that_names_nothing_is_to_be_unset(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checkout.DIRECTORY_VARIABLE, "/nowhere")
    told = checkout.why_missing()
    assert "no such folder; run scripts/" in told and told.endswith("and unset MEGATRON_DEEPSPEED_DIR.")
    monkeypatch.setattr(checkout, "PINNED_COMMIT", git(repository, "rev-parse", "v1"))
    helpers_build.build_helpers(clone_first(repository))
    told = checkout.why_missing()
    assert "there is no such folder; unset MEGATRON_DEEPSPEED_DIR to take the one that scripts/" in told


def test_a_checkout_elsewhere_wins(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers_build.build_helpers(repository)
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
    monkeypatch.setattr(helpers_build.sysconfig, "get_path", lambda _name: str(tmp_path))
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
    assert done.returncode == 0 and f" {tmp_path} v9\n" in done.stdout


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
    assert "cloned into" in first and "what that costs" in first and "\ndeepspeed-compression " in first
    monkeypatch.chdir(tmp_path)
    assert install.install(settings) == 0
    assert "is already in" in capsys.readouterr().out
    assert checkout.find_checkout() is not None
