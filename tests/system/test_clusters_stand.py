"""The clusters that the other tests of this folder run on are what they say: hosts apart, and schedulers that work."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from grid_engine import GridEngine  # type: ignore[import-not-found]
from hosts import Hosts, wait_until  # type: ignore[import-not-found]
from slurm import Slurm  # type: ignore[import-not-found]

NODES = ("node1", "node2")


def ssh(hosts: Hosts, target: str, *argv: str, source: str = "login") -> subprocess.CompletedProcess[str]:
    return hosts.run(source, ["ssh", "-F", str(hosts.ssh_config), target, *argv])


def script(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/bash\n{text}")
    return file


@pytest.mark.parametrize(("source", "target"), [("login", "node1"), ("node1", "node2"), ("node2", "node1")])
@pytest.mark.parametrize("port", ["22", "2222"])
def test_every_host_reaches_the_others_by_ssh(hosts, source, target, port):
    done = ssh(hosts, target, "-p", port, "hostname; echo $HOME; echo $SSH_CONNECTION", source=source)
    assert done.returncode == 0, done.stderr
    name, home, connection = done.stdout.splitlines()
    assert (name, home) == (target, str(hosts.home))
    assert connection.split()[0] == hosts[source].address and connection.split()[3] == port


def test_hosts_have_their_own_network_processes_and_scratch_folders(hosts):
    for name in hosts.names:
        shown = hosts.run(name, ["ls", "/sys/class/net"], check=True).stdout.split()
        assert sorted(shown) == sorted(["docker0", "lo", hosts[name].interface])
        for folder in ("/tmp", "/dev/shm", "/run"):
            hosts.run(name, ["touch", f"{folder}/left_by_{name}"], check=True)
    assert len({hosts[name].interface for name in NODES}) == 2
    found = hosts.run("node1", ["find", "/tmp", "/dev/shm", "/run", "-name", "left_by_*"], check=True).stdout.split()
    assert sorted(found) == [f"{folder}/left_by_node1" for folder in ("/dev/shm", "/run", "/tmp")]
    assert not Path("/tmp/left_by_node1").exists()
    assert {process.name for process in hosts.processes("node1")} <= {"sshd", "slurmd", "munged", "sge_execd"}


def test_this_machine_is_left_as_it_is(hosts):
    assert socket.gethostname() not in hosts.names
    assert not [link for link in Path("/sys/class/net").iterdir() if link.name.startswith(("port-", "lan", "eno1"))]
    assert "node1" not in Path("/etc/hosts").read_text()
    assert str(hosts.folder) not in Path("/proc/self/mounts").read_text()


def test_the_interpreter_and_this_project_are_there_on_every_host(hosts, project_root):
    for name in hosts.names:
        done = hosts.run(name, [sys.executable, "-c", "import train; print(train.__file__)"], cwd=project_root)
        assert done.stdout.strip() == str(project_root / "train" / "__init__.py"), done.stderr


def test_exit_codes_signals_and_time_limits_reach_what_runs_on_a_host(hosts):
    assert hosts.run("node1", ["bash", "-c", "exit 3"]).returncode == 3
    assert hosts.run("node1", ["bash", "-c", "kill -KILL $$"]).returncode == 128 + signal.SIGKILL
    running = hosts.popen("node1", ["bash", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"])
    assert running.stdout.readline() == "ready\n"
    running.terminate()
    assert running.wait(timeout=10) == 7
    with pytest.raises(subprocess.TimeoutExpired):
        hosts.run("node1", ["sleep", "1000"], timeout_s=0.5)
    wait_until(lambda: not hosts.strays("node1"), "the timed-out program to be gone", 10)


def test_pdsh_reaches_both_nodes(hosts):
    append = {"PDSH_SSH_ARGS_APPEND": f"-F {hosts.ssh_config}"}
    done = hosts.run("login", ["pdsh", "-R", "ssh", "-S", "-w", "node1,node2", "hostname; exit 3"], env=append)
    assert sorted(done.stdout.splitlines()) == ["node1: node1", "node2: node2"], done.stderr
    assert done.returncode == 3


def mpirun(hosts: Hosts, interfaces: str) -> subprocess.CompletedProcess[str]:
    options = {"plm_rsh_args": f"-F {hosts.ssh_config}", "oob_tcp_if_include": interfaces}
    mca = [word for name, value in options.items() for word in ("--mca", name, value)]
    return hosts.run("node1", ["mpirun", "--allow-run-as-root", "--host", "node1,node2", *mca, "hostname"])


def test_openmpi_starts_on_hosts_whose_interfaces_have_different_names(hosts):
    done = mpirun(hosts, "10.77.0.0/24")
    assert sorted(done.stdout.split()) == list(NODES), done.stderr


def test_openmpi_told_an_interface_that_one_host_lacks_fails(hosts):
    """What the set-up is for: an interface's name does not hold for all hosts."""
    done = mpirun(hosts, hosts["node1"].interface)
    assert done.returncode != 0
    assert sorted(done.stdout.split()) != list(NODES)


def test_a_cut_host_is_unreachable_until_it_is_joined_again(hosts):
    hosts.cut("node2")
    assert "timed out" in ssh(hosts, "node2", "true").stderr
    assert ssh(hosts, "node1", "true").returncode == 0
    assert hosts.run("node2", ["true"]).returncode == 0, "it runs on, alone"
    hosts.join("node2")
    assert ssh(hosts, "node2", "true").returncode == 0


def test_a_host_can_refuse_ssh(hosts):
    hosts.refuse_ssh("node2")
    assert "Connection refused" in ssh(hosts, "node2", "true").stderr
    hosts.accept_ssh("node2")
    assert ssh(hosts, "node2", "true").returncode == 0


def test_an_unknown_host_is_unknown_at_once(hosts):
    done = hosts.run("login", ["ssh", "-F", str(hosts.ssh_config), "node3", "true"], timeout_s=10)
    assert done.returncode == 255 and "Name or service not known" in done.stderr


def test_a_disk_can_be_full_on_one_host(hosts, tmp_path):
    (tmp_path / "before").touch()
    hosts.small_disk("node2", tmp_path, "1m")
    fill = ["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=1M", "count=2"]
    assert "No space left" in hosts.run("node2", fill).stderr
    assert hosts.run("node1", fill).returncode == 0
    hosts.mend()
    assert hosts.run("node2", ["ls", str(tmp_path)]).stdout.split() == ["before", "file"]


def test_hosts_and_what_runs_on_them_end_with_the_process_that_made_them(hosts, tmp_path):
    program = (
        "import sys, time, pathlib, hosts\n"
        "made = hosts.Hosts(pathlib.Path(sys.argv[1]), {'node1': 'eth0'}).__enter__()\n"
        "running = made.popen('node1', ['sleep', '1000'])\n"
        "hosts.wait_until(lambda: made.strays('node1'), 'sleep')\n"
        "print(made['node1'].pid, made['switch'].pid, made.strays('node1')[0].pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    pids = maker.stdout.readline().split()
    assert len(pids) == 3 and all(Path("/proc", pid).exists() for pid in pids)
    maker.kill()
    maker.wait()
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in pids), f"processes {pids} to be gone", 20)


def test_slurm_runs_on_both_nodes(slurm: Slurm):
    assert sorted(slurm.run("srun", "--nodes=2", "hostname").stdout.split()) == list(NODES)


def test_slurm_sees_a_jobs_exit_code(slurm: Slurm, tmp_path):
    job = slurm.submit("--nodes=2", script(tmp_path / "job.sh", "srun bash -c 'exit 3'\n"))
    facts = slurm.wait_for(job, "FAILED", "COMPLETED")
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "3:0")


def test_slurm_ends_a_job_at_its_limit_with_sigterm_first(slurm: Slurm, tmp_path):
    text = f"trap 'echo $SLURM_NODEID >> {tmp_path}/told; exit 0' TERM; touch {tmp_path}/set$SLURM_NODEID; "
    text += "sleep 1000 & wait"
    job = slurm.submit("--partition=short", "--nodes=2", "--wrap", f'srun bash -c "{text.replace("$", chr(92) + "$")}"')
    slurm.wait_for(job, "RUNNING")
    wait_until(lambda: all((tmp_path / f"set{node}").exists() for node in (0, 1)), "both ranks to set their traps")
    slurm.reach_limit(job)
    facts = slurm.wait_for(job, "TIMEOUT", "COMPLETED", "FAILED", timeout_s=90)
    assert facts["JobState"] == "TIMEOUT"
    wait_until(lambda: (tmp_path / "told").exists() and sorted((tmp_path / "told").read_text().split()) == ["0", "1"],
               "both ranks to have been told")  # fmt: skip


def test_slurm_puts_a_preempted_job_back_into_the_queue(slurm: Slurm, tmp_path):
    text = f"trap 'touch {tmp_path}/told; exit 0' TERM; echo start >> {tmp_path}/starts; sleep 1000 & wait\n"
    low = slurm.submit("--nodes=2", "--cpus-per-task=4", "--requeue", script(tmp_path / "low.sh", text))
    slurm.wait_for(low, "RUNNING")
    wait_until((tmp_path / "starts").exists, "the job to set its trap")
    high = slurm.submit("--partition=urgent", "--nodes=2", "--cpus-per-task=4", "--wrap", "true")
    slurm.wait_for(high, "COMPLETED", timeout_s=90)
    facts = slurm.wait_for(low, "RUNNING", timeout_s=90)
    assert facts["Restarts"] == "1"
    assert (tmp_path / "told").exists()


def test_grid_engine_gives_both_hosts_and_starts_tasks_on_them(grid_engine: GridEngine, tmp_path):
    text = "cat $PE_HOSTFILE\nfor host in node1 node2; do qrsh -inherit $host hostname; done\nexit 3\n"
    job = script(tmp_path / "job.sh", text)
    out = tmp_path / "out"
    facts = grid_engine.wait_for(grid_engine.submit("-S", "/bin/bash", "-pe", "mpi", "2", "-j", "y", "-o", out, job))
    lines = out.read_text().splitlines()
    assert sorted(line.split()[:2] for line in lines[:2]) == [["node1", "1"], ["node2", "1"]]
    assert lines[2:] == ["node1", "node2"]
    assert facts["exit_status"] == "3"


def test_a_grid_engine_job_reaches_its_other_host_by_ssh(grid_engine: GridEngine, hosts, tmp_path):
    other = "$(awk '{print $1}' $PE_HOSTFILE | grep -v $(hostname))"
    job = script(tmp_path / "job.sh", f"hostname\nssh -F {hosts.ssh_config} {other} hostname\n")
    out = tmp_path / "out"
    grid_engine.wait_for(grid_engine.submit("-S", "/bin/bash", "-pe", "mpi", "2", "-j", "y", "-o", out, job))
    assert sorted(out.read_text().split()) == list(NODES)


def test_grid_engine_gives_whole_nodes_by_a_resource_as_abci_does(grid_engine: GridEngine, tmp_path):
    job = script(tmp_path / "job.sh", "cat $PE_HOSTFILE\n")
    out = tmp_path / "out"
    facts = grid_engine.wait_for(grid_engine.submit("-S", "/bin/bash", "-l", "rt_F=2,h_rt=60", "-o", out, job))
    assert sorted(line.split()[0] for line in out.read_text().splitlines()) == list(NODES)
    assert facts["granted_pe"] == "mpi" and "h_rt=60" in facts["category"]


def test_grid_engine_ends_a_job_at_its_limit(grid_engine: GridEngine, tmp_path):
    job = script(tmp_path / "job.sh", "sleep 1000\n")
    facts = grid_engine.wait_for(grid_engine.submit("-pe", "mpi", "2", "-l", "h_rt=3", "-o", tmp_path / "out", job))
    assert facts["failed"].startswith("37") and facts["exit_status"].startswith("137")
