"""How nodes are reached: argv and environment of each transport, words on lost hosts, and real pdsh and clush."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from train import process
from train.cluster import launchers
from train.cluster.allocation import Allocation
from train.cluster.launchers import LostHost, lost_host
from train.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
TWO = Allocation(("node1", "node2"), 4, "cuda", "for the test", source="slurm", job_id="7")
SCRIPT = Path("/shared/a run/launch/node.sh")


def build(launcher: str, where: Allocation = TWO, script: Path = SCRIPT, **more: object) -> process.Command:
    given = {"ssh_config": script.with_name("ssh_config"), "variables": {"SLURM_CPUS_ON_NODE": "32"}, **more}
    return launchers.build(launcher, where, script=script, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("launcher", ["local", "srun", "pdsh", "ssh", "openmpi"])
def test_golden_file(launcher, monkeypatch):
    monkeypatch.setattr(launchers.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(launchers.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(launchers.sys, "executable", "/env/bin/python")
    golden = GOLDEN / f"launcher_{launcher}.txt"
    text = build(launcher, network="10.0.0.0/24").text() + "\n"
    if os.environ.get("ACCEPT_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), f"to accept the change: ACCEPT_GOLDEN=1 python -m pytest {__file__}"


def test_every_transport_keeps_the_callers_secrets_from_its_children():
    assert all(build(launcher).hides_secrets for launcher in ("local", "srun", "pdsh", "ssh", "openmpi"))


def test_a_thousand_nodes_are_reached_at_once():
    many = Allocation(tuple(f"node{number}" for number in range(1000)), 8, "cuda", "")
    for launcher in ("pdsh", "ssh"):
        argv = build(launcher, many).argv
        assert argv[argv.index("-f") + 1] == "1000"
    assert "--nodes=1000" in build("srun", many).argv


def test_mpirun_asks_root_once_and_speaks_over_the_shared_network(monkeypatch):
    monkeypatch.setattr(launchers.os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in build("openmpi").argv
    assert "btl_tcp_if_include" not in build("openmpi").argv


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pdsh@node1: node2: ssh exited with exit code 255", LostHost("node2", 255)),
        ("pdsh@node1: node2: ssh killed by signal 9", LostHost("node2", 137)),
        ("clush: node2: exited with exit code 255", LostHost("node2", 255)),
        ("Clush.py: node2: exited with exit code 127", LostHost("node2", 127)),
        ("srun: error: node2: task 1: Exited with exit code 2", LostHost("node2", 2)),
        ("srun: error: node2: tasks 1,3-4: Exited with exit code 2", LostHost("node2", 2)),
        ("srun: error: node[2-3]: tasks 1-2: Exited with exit code 2", LostHost("node2", 2)),
        ("srun: error: node2: task 1: Killed", LostHost("node2", 137)),
        ("srun: error: Node failure on node2", LostHost("node2", 137)),
        ("srun: error: Node failure on node[2-3]", LostHost("node2", 137)),
        ("node2: ssh: connect to host node2 port 22: Connection refused", None),
        ("node2: pdsh@node1: node2: ssh exited with exit code 255", None),
        ("srun: Job step 1.0 created", None),
        ("srun: error: node2: task 1: Exited", None),
        ("", None),
    ],
)
def test_what_transports_say_of_a_lost_host(line, found):
    assert lost_host(line) == found


def programs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)


@pytest.mark.parametrize(
    ("source", "there", "chosen"),
    [
        ("slurm", ("srun", "pdsh", "ssh"), ("srun", "srun is installed")),
        ("slurm", ("pdsh", "ssh"), ("pdsh", "pdsh is installed")),
        ("hostfile", ("srun", "pdsh", "ssh"), ("pdsh", "pdsh is installed")),
        ("gridengine", ("ssh", "mpirun"), ("ssh", "ssh is installed")),
        ("pbs", ("mpirun",), ("openmpi", "mpirun is installed")),
    ],
)
def test_auto_takes_what_is_there(monkeypatch, source, there, chosen):
    programs(monkeypatch, *there)
    assert launchers.choose("auto", Allocation(("a", "b"), 1, "cpu", "", source=source), is_here=False) == chosen


def test_auto_starts_one_node_that_is_this_machine_itself(monkeypatch):
    programs(monkeypatch, "srun")
    one = Allocation(("here",), 1, "cpu", "", source="slurm")
    assert launchers.choose("auto", one, is_here=True) == ("local", "one node, this one")
    assert launchers.choose("srun", one, is_here=True) == ("srun", "asked for")


def test_a_choice_that_cannot_be_is_refused(monkeypatch):
    programs(monkeypatch)
    with pytest.raises(UserError, match="none of srun, pdsh, ssh, mpirun is installed: install one of them"):
        launchers.choose("auto", TWO, is_here=False)
    with pytest.raises(UserError, match="--launcher openmpi needs mpirun, which is not installed here: choose another"):
        launchers.choose("openmpi", TWO, is_here=False)
    with pytest.raises(UserError, match="--launcher local reaches this machine only, and the run has node1, node2"):
        launchers.choose("local", TWO, is_here=False)


# The real programs, with a stand-in for ssh that runs the far command here as a login shell would.

FAR_SHELL = """#!/usr/bin/env bash
printf '%s\\n' "$PWD" "$@" > "{folder}/ssh_$$"
[[ "${{*: -1}}" != *node3* ]] || {{ echo "ssh: connect to host node3 port 22: Connection refused" >&2; exit 255; }}
exec env -i PATH=/usr/bin:/bin bash --norc -c "${{*: -1}}"
"""


@pytest.fixture
def script(tmp_path: Path, awkward_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node.sh in an awkward folder that says how it was called, and an ssh of ours on the PATH."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(FAR_SHELL.format(folder=tmp_path))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder = awkward_path / "100%h %host %n"
    folder.mkdir()
    file = folder / "node.sh"
    file.write_text('printf "%s|" "$0" "$@"; echo\n')
    return file


def said(command: process.Command) -> tuple[int, list[str]]:
    status, text = process.capture(command, timeout_s=60)
    return status, sorted(text.splitlines())


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_pdsh_runs_the_script_of_an_awkward_folder_on_each_node(script, tmp_path):
    status, lines = said(build("pdsh", script=script))
    assert (status, lines) == (0, [f"{node}: {script}|--node|{node}|" for node in ("node1", "node2")])
    calls = [file.read_text().splitlines() for file in tmp_path.glob("ssh_*")]
    for folder, *words in calls:
        assert folder == str(script.parent) and "-F ssh_config" in " ".join(words)


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_pdsh_tells_of_a_host_that_it_does_not_reach(script):
    status, lines = said(build("pdsh", Allocation(("node1", "node3"), 1, "cpu", ""), script=script))
    assert status == 255
    assert [found for line in lines if (found := lost_host(line))] == [LostHost("node3", 255)]


def test_clush_runs_the_script_of_an_awkward_folder_on_each_node(script):
    status, lines = said(build("ssh", script=script))
    assert (status, lines) == (0, [f"{node}: {script}|--node|{node}|" for node in ("node1", "node2")])


def test_clush_tells_of_a_host_that_it_does_not_reach(script):
    status, lines = said(build("ssh", Allocation(("node1", "node3"), 1, "cpu", ""), script=script))
    assert status == 255
    assert [found for line in lines if (found := lost_host(line))] == [LostHost("node3", 255)]


def test_local_runs_the_script_of_an_awkward_folder(script):
    assert said(build("local", script=script)) == (0, [f"{script}|--node|0|"])


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="OpenMPI is not installed")
def test_mpirun_tells_each_agent_its_number(tmp_path):
    """On this machine alone: its far ends are the system tests' work."""
    script = tmp_path / "node.sh"
    script.write_text('echo "number ${OMPI_COMM_WORLD_RANK}"\n')
    script.with_name("ssh_config").write_text("")
    status, lines = said(build("openmpi", Allocation((os.uname().nodename,), 1, "cpu", ""), script=script))
    assert status == 0 and "number 0" in lines, lines


def test_no_secret_of_the_environment_reaches_a_transport(script, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    script.write_text(f"{sys.executable!r} -c 'import json, os; print(json.dumps(dict(os.environ)))'\n")
    status, (line,) = said(build("local", script=script))
    assert status == 0 and "planted" not in json.loads(line).values()


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "208(x2)", "SLURM_CPUS_ON_NODE": "208"}, 208),
        ({"SLURM_JOB_CPUS_PER_NODE": "208(x2),96", "SLURM_CPUS_ON_NODE": "208"}, 96),
        ({"SLURM_CPUS_ON_NODE": "4"}, 4),
        ({}, 1),
    ],
)
def test_a_step_asks_for_no_more_cores_than_the_smallest_node_has(variables: dict[str, str], cores: int) -> None:
    assert launchers._cores(variables) == cores


def test_a_job_of_one_gpu_per_task_gives_its_agents_all_gpus():
    """By srun(1); no Slurm with GPUs has run it. sbatch sets these where a script asks for tasks, one for each GPU."""
    job = {"SLURM_CPUS_ON_NODE": "32", "SLURM_GPUS_ON_NODE": "8"}
    assert build("srun", variables=job).argv[0] == "srun"
    argv = build("srun", variables={**job, "SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "single:1"}).argv
    assert argv[:6] == ("env", "-u", "SLURM_GPUS_PER_TASK", "-u", "SLURM_GPU_BIND", "srun")
    assert "--gpus-per-node=8" in argv and argv[-2:] == ("bash", str(SCRIPT))
    argv = build("srun", variables={**job, "SLURM_NTASKS_PER_SOCKET": "4"}).argv
    assert argv[:4] == ("env", "-u", "SLURM_NTASKS_PER_SOCKET", "srun")
    assert not [word for word in argv if word.startswith("--gpus")]
