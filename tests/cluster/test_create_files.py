"""create_ssh_config_file and create_hostfile: from a job's nodes to a file, and never into ~/.ssh."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import process, settings
from train.cluster import ask_nodes
from train.cluster.create_files import HostfileSettings, SshConfigSettings, create_hostfile, create_ssh_config_file
from train.errors import UserError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
SSH_SCRIPTS = {
    "create_ssh_config_file.sh": "22",
    "create_ssh_config_file_for_gcp_play_multi_node_multi_gpu.sh": "22",
    "create_ssh_config_file_for_abci_multi_node_multi_gpu.sh": "2222",
}
GPU_LINES = (
    "GPU 0: NVIDIA H200 (UUID: GPU-a)\n  MIG 3g.71gb Device 0: (UUID: MIG-a)\nGPU 1: NVIDIA H200 (UUID: GPU-b)\n"
)


@pytest.fixture(autouse=True)
def in_a_slurm_job(monkeypatch, tmp_path):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nodes_answer(monkeypatch):
    """Sets what the nodes' nvidia-smi gives, as (exit code, output) by host; returns the commands that asked."""
    asked = []

    def set_answers(**answers):
        def capture(command, *, timeout_s=60.0):
            asked.append(command.argv)
            return answers["here" if command.argv[0] == "nvidia-smi" else command.argv[-2]]

        monkeypatch.setattr(process, "capture", capture)
        return asked

    return set_answers


def hostfile(**given):
    return create_hostfile(settings.build(HostfileSettings, given))


@pytest.mark.parametrize("script", SSH_SCRIPTS)
def test_each_ssh_script_writes_a_file_of_its_own(script, launch, tmp_path):
    done = launch(f"common/{script}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "ssh_config").read_text()
    assert "Host node1 node2\n" in text and f"Port {SSH_SCRIPTS[script]}\n" in text
    assert f'UserKnownHostsFile "{tmp_path}/ssh_config.known_hosts" ~/.ssh/known_hosts' in text
    assert "nodes: Slurm job 7: node[1-2]" in done.stdout
    assert f"--ssh_config {tmp_path}/ssh_config" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["ssh_config"], "nothing else, no ~/.ssh"
    again = launch(f"common/{script}", cwd=tmp_path)
    assert (again.returncode, "is there already, for the same nodes" in again.stdout) == (0, True)


def test_another_file_is_kept(tmp_path):
    given = settings.build(SshConfigSettings, {"output": "mine"})
    Path("mine").write_text("Host *\n")
    with pytest.raises(UserError, match="pass --overwrite"):
        create_ssh_config_file(given)
    assert Path("mine").read_text() == "Host *\n"
    create_ssh_config_file(settings.build(SshConfigSettings, {"output": "mine", "overwrite": True}))
    assert "Host node1 node2" in Path("mine").read_text()


@pytest.mark.parametrize("settings_class", [SshConfigSettings, HostfileSettings])
def test_nothing_is_ever_written_into_the_users_ssh_folder(settings_class, tmp_path):
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home" / ".ssh")
    for output in (tmp_path / "home" / ".ssh" / "config", tmp_path / "link" / "config"):
        with pytest.raises(UserError, match=r"lies in your ~/\.ssh"):
            settings.build(settings_class, {"output": output, "overwrite": True})


@pytest.mark.parametrize("function", [create_ssh_config_file, create_hostfile])
def test_outside_of_any_job_nobody_names_the_nodes(function, monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name)
    given = SshConfigSettings() if function is create_ssh_config_file else HostfileSettings(slots=8)
    with pytest.raises(UserError, match=r"nobody names the nodes \(no --hostfile; .*SLURM_JOB_ID.*PBS_JOBID"):
        function(given)
    assert not list(Path().iterdir())


def test_the_hostfile_launcher(launch, tmp_path):
    done = launch("common/create_hostfile.sh", "--slots", "8", "--output", "my hosts", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my hosts").read_text() == "node1 slots=8\nnode2 slots=8\n"
    assert f"--hostfile '{tmp_path}/my hosts'" in done.stdout
    shown = launch("common/create_hostfile.sh", "--slots", "4", "--dry_run", cwd=tmp_path)
    assert shown.stdout == "node1 slots=4\nnode2 slots=4\n"
    bad = launch("common/create_hostfile.sh", "--slots", "8", "--num_nodes", "4", cwd=tmp_path)
    assert (bad.returncode, "--num_nodes 4: there are 2" in bad.stderr) == (2, True)


def test_slots_are_what_the_scheduler_counts(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h100:8")
    hostfile()
    assert Path("hostfile").read_text() == "node1 slots=8\nnode2 slots=8\n"
    assert "8 on each node (SLURM_GPUS_PER_NODE)" in capsys.readouterr().out


def test_slots_are_the_gpus_of_this_node_when_it_is_one_of_them(monkeypatch, capsys):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setattr(process, "capture", lambda command: (0, GPU_LINES))
    hostfile()
    assert Path("hostfile").read_text() == "node1 slots=2\nnode2 slots=2\n"
    assert "nvidia-smi on node1; --ask_nodes asks the others too" in capsys.readouterr().out


def test_every_node_is_asked_for_its_gpus(nodes_answer, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    asked = nodes_answer(here=(0, GPU_LINES), node2=(0, "Warning: Permanently added 'node2'.\n" + GPU_LINES))
    Path("config").write_text("")
    hostfile(ask_nodes=True, ssh_config="config")
    assert Path("hostfile").read_text() == "node1 slots=2\nnode2 slots=2\n"
    config = str(Path("config").absolute())
    assert sorted(asked) == [
        ("nvidia-smi", "--list-gpus"),
        ("ssh", "-T", "-F", config, "node2", "nvidia-smi --list-gpus"),
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((0, "GPU 0: x\n"), r"differ from node to node \(node1: 2, node2: 1\)"),
        ((127, "sh: nvidia-smi: not found"), r"differ from node to node \(node1: 2, node2: 0\)"),
        ((9, "NVIDIA-SMI has failed"), r"node2: nvidia-smi failed with exit code 9 \(NVIDIA-SMI has failed\)"),
        ((255, "ssh: connect to host node2 port 22: Connection refused"), r"node2: ssh does not reach it \(ssh: conn"),
        ((124, "no answer in 60.0 s"), "node2: nvidia-smi failed with exit code 124"),
    ],
)
def test_a_node_that_differs_or_does_not_answer_is_named(answer, message, nodes_answer):
    nodes_answer(node1=(0, GPU_LINES), node2=answer)
    with pytest.raises(UserError, match=message):
        hostfile(ask_nodes=True)
    assert not Path("hostfile").exists()


def test_without_any_gpu_the_slots_must_be_given(nodes_answer):
    nodes_answer(node1=(127, ""), node2=(127, ""))
    with pytest.raises(UserError, match="the nodes show no GPU: give --slots"):
        hostfile(ask_nodes=True)
    with pytest.raises(UserError, match=r"not told here how many GPUs .* give --slots PROCESSES, or --ask_nodes"):
        hostfile()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": -1}, "--slots -1"),
        ({"slots": 8, "ask_nodes": True}, "leave one of them out"),
        ({"nodes_from": "hostfile"}, "needs --hostfile"),
        ({"nodes_from": "condor"}, "not one of auto, slurm"),
        ({"ssh_port": 0}, "--ssh_port 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        settings.build(HostfileSettings, given)


def test_an_ssh_configuration_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--ssh_config no is not a file"):
        hostfile(ask_nodes=True, ssh_config="no")


def test_mig_instances_do_not_count_as_gpus():
    assert ask_nodes.parse_gpus(GPU_LINES) == 2
    assert ask_nodes.parse_gpus("No devices found.\n") == 0
