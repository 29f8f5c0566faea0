"""A launch from settings to end: what --dry_run shows, what is written where, what is refused, and one real run."""

from __future__ import annotations

import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.cluster import launch
from train.cluster.allocation import Allocation
from train.cluster.settings import ClusterSettings
from train.early_end import END_BY_VARIABLE
from train.errors import UserError
from train.process import Command

HERE = Allocation(("localhost",), 2, "cpu", "for the test")
TWO = Allocation(("node1", "node2"), 4, "cpu", "for the test", job_id="7")


def plan(folder: Path, where: Allocation = HERE, cluster: ClusterSettings | None = None, **more: Any) -> launch.Plan:
    command = more.pop("command", Command((sys.executable, "-c", "print('rank')"), {"A": "1"}))
    given = {"launch_dir": folder / "launch", "job_name": "tiny", **more}
    return launch.plan(command, where, cluster or ClusterSettings(), **given)


def test_one_node_that_is_this_machine_needs_no_ssh(tmp_path):
    made = plan(tmp_path, paths=[tmp_path / "no"])
    assert made.reason == "launcher: local (one node, this one)"
    assert list(made.files) == [tmp_path / "launch" / "node.sh"]
    assert made.transport.argv == ("bash", str(tmp_path / "launch" / "node.sh"), "--node", "0")
    assert made.job.is_local and made.job.paths == () and made.job.working_dir == Path.cwd()
    assert not (tmp_path / "launch").exists(), "building touches nothing"


def test_nodes_are_reached_with_a_configuration_of_the_runs_own(tmp_path):
    made = plan(tmp_path, TWO, ClusterSettings(launcher="ssh", ssh_port=2222), paths=[tmp_path])
    text = made.files[tmp_path / "launch" / "ssh_config"]
    assert "2222" in text and str(tmp_path / "launch" / "known_hosts") in text
    assert not made.job.is_local and made.job.paths == (tmp_path,) and made.job.working_dir == tmp_path / "launch"
    assert made.job.name == "7 tiny"


def test_the_users_own_ssh_configuration_is_included_whole(tmp_path):
    made = plan(tmp_path, TWO, ClusterSettings(launcher="ssh", ssh_config=Path("my config")))
    assert made.files[tmp_path / "launch" / "ssh_config"] == f'Include "{Path.cwd()}/my config"\n'


def test_a_dry_run_shows_what_would_run_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:planted@proxy:1")
    file = tmp_path / "secrets"
    file.write_text("MINE=planted\n")
    file.chmod(0o600)
    made = plan(tmp_path, TWO, ClusterSettings(launcher="ssh", secrets_file=file))
    assert made.job.secrets == {
        "WANDB_API_KEY": "planted",
        "HTTPS_PROXY": "http://me:planted@proxy:1",
        "MINE": "planted",
    }
    assert "planted" not in made.text() + repr(made)
    assert "# in the end, 4 x on each of node1, node2:\nA=1 " in made.text()
    assert "node.sh\n#!/usr/bin/env bash\n" in made.text()
    assert "# in the end, once, here:" in plan(tmp_path, is_distributed=False).text()


def test_settings_reach_the_job(tmp_path):
    cluster = ClusterSettings(
        launcher="ssh", starter="torchrun", network_interface="lo", preflight="warn", join_timeout_s=7,
        node_timeout_s=8, grace_s=9, time_budget_min=1, modules=("cuda/1",), node_setup=Path("setup.sh"),
        max_open_files=77,
    )  # fmt: skip
    made = plan(tmp_path, TWO, cluster, engine_dir=tmp_path)
    job = made.job
    assert (job.starter, job.interface, job.refuses_differences, job.engine_dir) == ("torchrun", "lo", False, tmp_path)
    assert (job.join_timeout_s, job.node_timeout_s, job.grace_s) == (7, 8, 9)
    assert float(job.environment[END_BY_VARIABLE]) > 1e9
    script = made.files[tmp_path / "launch" / "node.sh"]
    assert (
        "module load cuda/1" in script
        and f"source {shlex.quote(str(Path.cwd() / 'setup.sh'))}" in script
        and "hard=77" in script
    )
    assert END_BY_VARIABLE not in plan(tmp_path, TWO, ClusterSettings(launcher="ssh")).job.environment


def test_the_time_budget_counts_from_the_launchers_beginning(tmp_path):
    """Tokenizing or reshaping a checkpoint may take longer than the margin that is left for the save."""
    made = plan(tmp_path, TWO, ClusterSettings(launcher="ssh", time_budget_min=10), began=1000.0)
    assert made.job.environment[END_BY_VARIABLE] == "1600.0"


def test_a_secrets_file_of_everybodys_is_refused_before_anything_starts(tmp_path):
    file = tmp_path / "secrets"
    file.write_text("A=planted\n")
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        plan(tmp_path, cluster=ClusterSettings(secrets_file=file))


def test_a_run_in_an_awkward_folder(awkward_path, capfd):
    files = {awkward_path / "rendered.json": "{}"}
    code = f"import os; print('rank', os.environ['RANK'], open({str(awkward_path / 'rendered.json')!r}).read())"
    made = plan(awkward_path, command=Command((sys.executable, "-c", code), files=files, working_dir=awkward_path))
    end = launch.run(made, log=awkward_path / "logs" / "run.log")
    assert end == launch.End(0, "")
    assert sorted((awkward_path / "logs" / "run.log").read_text().splitlines()) == ["rank 0 {}", "rank 1 {}"]
    assert [file.name for file in (awkward_path / "launch").iterdir()] == ["node.sh"]
    assert stat.S_IMODE((awkward_path / "launch" / "node.sh").stat().st_mode) & 0o022 == 0
    capfd.readouterr()


def test_a_run_that_fails_says_why(tmp_path, capfd):
    made = plan(
        tmp_path, command=Command((sys.executable, "-c", "raise SystemExit('the cause')")), is_distributed=False
    )
    end = launch.run(made, log=tmp_path / "run.log")
    assert end == launch.End(1, "rank 0 ended with status 1. Its last lines:\n    the cause")
    capfd.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "deepspeed"])
def test_another_starter_numbers_the_ranks_and_its_failure_is_told(tmp_path, capfd, starter):
    module = tmp_path / "worker.py"
    module.write_text(
        "import os, sys, time\n"
        "told = f\"rank {os.environ['RANK']} {os.environ['WORLD_SIZE']} {sys.argv[1:]}\\n\"\n"
        "os.write(1, told.encode())\n"  # at once: two ranks share the log
        "time.sleep(1)\nsys.exit(os.environ['RANK'] == '1' and 'the cause')\n"
    )
    command = Command((sys.executable, "-m", "worker", "a b"), {"DS_ACCELERATOR": "cpu"}, working_dir=tmp_path)
    end = launch.run(
        plan(tmp_path, cluster=ClusterSettings(starter=starter), command=command), log=tmp_path / "run.log"
    )
    text = (tmp_path / "run.log").read_text()
    assert "rank 0 2 ['a b']" in text and "rank 1 2 ['a b']" in text, text
    assert end.exit_status == 1 and end.text.startswith("a rank ended with status 1. Its last lines:"), end
    capfd.readouterr()


# Through the launcher of step 2, as a user gives it.

DRY_RUN = ["--recipe", "gpt_0.125B", "--engine", "transformers", "--device", "cpu", "--input_tokenizer_file",
           "no.model", "--data_path", "no", "--dry_run"]  # fmt: skip


@pytest.fixture
def dry_run(launch: Any, tmp_path: Path) -> Any:
    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return launch("step2_pretrain_model/pretrain.sh", *DRY_RUN, "--output_model_dir", tmp_path / "out", *words,
                      environment=environment)  # fmt: skip

    return run


def test_a_dry_run_of_two_nodes(dry_run, tmp_path):
    file = tmp_path / "hosts"
    file.write_text("node1 slots=2\nnode2 slots=2\n")
    done = dry_run("--hostfile", file, "--launcher", "ssh", WANDB_API_KEY="planted")
    assert done.returncode == 0, done.stderr
    assert "2 x on each of node1, node2" in done.stdout and "planted" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launcher", "telnet"], "--launcher"),
        (["--starter", "mpirun"], "--starter"),
        (["--nodes_from", "hostfile"], "--nodes_from hostfile needs --hostfile FILE."),
        (["--hostfile", "{tmp}/no"], "no: there is no such file; create_hostfile.sh --output"),
        (["--hostfile", "{tmp}/hosts", "--nodes_from", "slurm"], "leave one of them out"),
        (["--hostfile", "{tmp}/hosts", "--num_nodes", "3"], "3"),
        (["--hostfile", "{tmp}/hosts", "--launcher", "local"], "--launcher local"),
        (["--hostfile", "{tmp}/twice"], "line 2: node1 stands in line 1 already"),
        (["--ssh_port", "99999"], "--ssh_port 99999: a port from 1 to 65535 was expected."),
        (["--grace_s", "0", "--node_timeout_s", "-1"], "--node_timeout_s -1: it must be at least 1."),
        (["--secrets_file", "{tmp}/hosts"], "can be read by others: chmod 600 it."),
        (["--num_nodes", "-1"], "--num_nodes -1: it must be 0 or more."),
        (["--join_timeout_s", "soon"], "--join_timeout_s"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(dry_run, tmp_path, words, message):
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    (tmp_path / "hosts").chmod(0o644)
    (tmp_path / "twice").write_text("node1\nnode1\n")
    done = dry_run(*(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 2, done
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
