"""The environment script of a run: its text, and what bash makes of it on a node where nothing else is set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train import process
from train.cluster import node_script

GOLDEN = Path(__file__).parent / "golden" / "node_script.txt"
SHELLCHECK = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
# Stands in for the agent: says what it was started with.
AGENT = "import json, os, resource, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ),"
AGENT += " resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))"


def build(**changes: Any) -> str:
    given: dict[str, Any] = {
        "python": "/shared/env/bin/python",
        "launch_dir": Path("/shared/run/launch"),
        "working_dir": Path("/shared/run"),
        "environment": {"PATH": "/shared/env/bin:/usr/bin", "NCCL_DEBUG": "INFO"},
        "max_open_files": 4096,
    }
    return node_script.build(**{**given, **changes})


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script as a login without any environment does; the interpreter is a stand-in unless told otherwise."""
    python = tmp_path / "stand in" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nif [ "$2" = -c ]; then exit 0; fi\nexec "{sys.executable}" -c "{AGENT}" "$@"\n')
    python.chmod(0o755)

    def run(*arguments: str, before: str = "", **changes: Any) -> subprocess.CompletedProcess[str]:
        given = {"python": str(python), "working_dir": tmp_path, "launch_dir": tmp_path, "environment": {}, **changes}
        script = tmp_path / "node.sh"
        script.write_text(build(**given))
        argv = ["env", "-i", "bash", "-c", f'{before}\nexec bash "$0" "$@"', str(script), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd="/")

    return run


def refused(done: subprocess.CompletedProcess[str], *words: str, status: int = 2) -> None:
    assert done.returncode == status, done
    assert done.stderr.splitlines()[-1].startswith(f"error: {os.uname().nodename}: "), done
    assert [word for word in words if word not in done.stderr] == [], done
    assert done.stdout == ""


def told(done: subprocess.CompletedProcess[str]) -> Any:
    import json

    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_golden_file():
    text = build(
        launch_dir=Path("/shared/a run/launch"),
        environment={"PATH": "/env/bin:/usr/bin", "HF_HOME": "/shared/it's"},
        modules=("cuda/12.8", "nccl/2.28"),
        node_setup=Path("/shared/set up.sh"),
        max_open_files=262144,
    )
    if os.environ.get("ACCEPT_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), f"to accept the change: ACCEPT_GOLDEN=1 python -m pytest {__file__}"


@pytest.mark.skipif(not Path(SHELLCHECK).exists(), reason="ShellCheck is not installed")
@pytest.mark.parametrize("more", [{}, {"modules": ("a b/1", "it's"), "node_setup": Path("/s/$HOME 'x'.sh")}])
def test_shellcheck_finds_nothing(tmp_path, more):
    file = tmp_path / "node.sh"
    file.write_text(build(**more))
    # the module system and --node_setup are files that it cannot see; a $ in a path is meant as it is
    argv = [SHELLCHECK, "--exclude=SC1090,SC1091,SC2016", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_it_runs_without_any_environment_and_its_arguments_go_on(node, tmp_path):
    arguments, folder, environment, _ = told(
        node("--node", "a 'b' $HOME", environment={"NCCL_X": "1", "A": "$HOME `id`"})
    )
    assert arguments == ["-P", "-m", "train.cluster.agent", "--launch_dir", str(tmp_path), "--node", "a 'b' $HOME"]
    assert (folder, environment["NCCL_X"], environment["A"]) == (str(tmp_path), "1", "$HOME `id`")


def test_an_awkward_folder(node, awkward_path):
    arguments, folder, _, _ = told(node(working_dir=awkward_path, launch_dir=awkward_path / "launch"))
    assert (folder, arguments[4]) == (str(awkward_path), str(awkward_path / "launch"))


def test_the_real_interpreter_finds_the_agent(tmp_path, awkward_path):
    """From a folder in which the user keeps a script of his own that is called train.py."""
    (awkward_path / "train.py").write_text("raise SystemExit('the wrong one')\n")
    script = awkward_path / "node.sh"
    script.write_text(
        build(
            python=sys.executable,
            launch_dir=awkward_path,
            working_dir=awkward_path,
            environment={"PATH": "/usr/bin:/bin"},
        )
    )
    argv = ["env", "-i", "bash", str(script), "--node", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and f"{awkward_path}/invitation.json" in done.stdout, done


def test_a_missing_interpreter(node):
    refused(node(python="/no/such/python"), "there is no /no/such/python: install the environment where every node")


def test_an_interpreter_without_this_package(node, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(
        "#!/bin/sh\necho Traceback >&2; echo \"ModuleNotFoundError: No module named 'train'\" >&2; exit 1\n"
    )
    bare.chmod(0o755)
    done = node(python=str(bare))
    refused(done, "has no package train: ModuleNotFoundError: No module named 'train'")
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_not_there(node):
    refused(
        node(working_dir=Path("/no/such folder")), "there is no /no/such folder: the run must stand where every node"
    )


def test_no_module_command(node):
    refused(node(modules=("cuda/12.8",)), "environment modules are not installed, --modules needs them")


MODULES = 'module() { [[ "$2" != bad* ]] || return 1; export LOADED="${LOADED:-} $2"; }; export -f module'


def test_modules_are_loaded_and_a_failing_one_is_named(node):
    assert told(node(modules=("cuda/12.8", "a b"), before=MODULES))[2]["LOADED"] == " cuda/12.8 a b"
    refused(node(modules=("cuda/12.8", "bad/1"), before=MODULES), "module load bad/1 failed")


def test_node_setup_is_sourced(node, tmp_path):
    setup = tmp_path / "set up.sh"
    setup.write_text("set -euo pipefail\nexport FROM_SETUP=yes\n")  # what it sets of bash must not end us
    assert told(node(node_setup=setup))[2]["FROM_SETUP"] == "yes"


@pytest.mark.parametrize(
    ("text", "message"),
    [("false", "failed with status 1"), ("return 7", "failed with status 7"), ("exit 7", "failed with status 7")],
)
def test_a_node_setup_that_fails_is_named(node, tmp_path, text, message):
    setup = tmp_path / "set up.sh"
    setup.write_text(text + "\n")
    refused(node(node_setup=setup), f"--node_setup {setup} {message}")


def test_a_node_setup_that_cannot_be_read(node, tmp_path):
    refused(node(node_setup=tmp_path / "no.sh"), "no.sh cannot be read here")
    refused(node(node_setup=tmp_path), "cannot be read here")


def test_open_files_are_raised_as_far_as_the_hard_limit_goes(node):
    assert told(node(max_open_files=900, before="ulimit -Sn 500; ulimit -Hn 1000"))[3] == 900
    assert told(node(max_open_files=262144, before="ulimit -Sn 500; ulimit -Hn 1000"))[3] == 1000


def test_what_is_carried():
    environment = {
        "PATH": "/bin", "LD_LIBRARY_PATH": "/lib", "NCCL_DEBUG": "INFO", "HF_HOME": "/h", "http_proxy": "http://proxy:1",
        "HF_TOKEN": "planted", "WANDB_API_KEY": "planted", "TRAIN_SECRET": "planted", "WANDB_MODE": "offline",
        "https_proxy": "http://me:planted@proxy:1", "AWS_SECRET_ACCESS_KEY": "planted",
        "HOME": "/root", "HOSTNAME": "here", "SLURM_JOB_ID": "1", "TMPDIR": "/tmp/1", "PWD": "/",
        "CUDA_VISIBLE_DEVICES": "0",
        process.MARK: "mark",
    }  # fmt: skip
    assert node_script.carried(environment) == {
        "HF_HOME": "/h", "LD_LIBRARY_PATH": "/lib", "NCCL_DEBUG": "INFO", "PATH": "/bin", "WANDB_MODE": "offline",
        "http_proxy": "http://proxy:1",
    }  # fmt: skip
