"""Where a run runs, and why: nodes and processes on each, taken whole or refused."""

from __future__ import annotations

import socket

import pytest

from train import process
from train.cluster import allocation
from train.cluster.settings import ClusterSettings, SubmitSettings
from train.errors import UserError

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
ON_NODE1 = {**SLURM, "SLURMD_NODENAME": "node1"}


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch):
    """A machine whose nvidia-smi lists four GPUs, the first of them split in two."""
    lines = [
        "GPU 0: NVIDIA H200 (UUID: GPU-a)",
        "  MIG 3g.71gb Device 0: (UUID: MIG-a)",
        "  MIG 3g.71gb Device 1: (UUID: MIG-b)",
    ]
    lines += [f"GPU {number}: NVIDIA H200 (UUID: GPU-{number})" for number in (1, 2, 3)]
    monkeypatch.setattr(process, "capture", lambda command: (0, "\n".join(lines)))


@pytest.fixture
def elsewhere(monkeypatch):
    """A login node: none of the names in a job is this machine's."""
    monkeypatch.setattr(socket, "gethostname", lambda: "login")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])


def find(num_processes=0, device="auto", cluster=None, **environment):
    return allocation.find(
        cluster or ClusterSettings(), num_processes=num_processes, device=device, environment=environment
    )


def test_without_gpus_one_process_on_the_cpu():
    found = find(CUDA_VISIBLE_DEVICES="")
    assert (found.device, found.processes_per_host, found.world_size) == ("cpu", 1, 1)
    assert (found.hosts, found.source, found.job_id) == ((socket.gethostname(),), "none", None)
    assert found.reason == "this machine only (no GPU; processes: 1, one without GPUs)"


def test_one_process_per_gpu_unless_asked_otherwise():
    assert find(CUDA_VISIBLE_DEVICES="0,1,3").processes_per_host == 3
    assert find(2, CUDA_VISIBLE_DEVICES="0,1,3").processes_per_host == 2
    assert find(CUDA_VISIBLE_DEVICES="0,1").device == "cuda"
    assert find(device="cpu", CUDA_VISIBLE_DEVICES="0,1").device == "cpu"


def test_a_gpu_is_counted_only_when_it_is_there(monkeypatch):
    assert find().processes_per_host == 4
    assert find(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5").processes_per_host == 4
    assert find(CUDA_VISIBLE_DEVICES="MIG-a,MIG-b,MIG-c").processes_per_host == 2
    monkeypatch.setattr(process, "capture", lambda command: (127, "nvidia-smi: not found"))
    assert find(CUDA_VISIBLE_DEVICES="0,1").device == "cpu"


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError, match="--num_processes 4: this machine has 2 GPUs"):
        find(4, CUDA_VISIBLE_DEVICES="0,1")
    with pytest.raises(UserError, match="--num_processes 4: Slurm job 4711 has 2 GPUs"):
        find(4, **ON_NODE1, SLURM_GPUS_ON_NODE="2")


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda: nvidia-smi shows no GPU"):
        find(device="cuda", CUDA_VISIBLE_DEVICES="")


def test_a_slurm_job_of_two_nodes():
    found = find(**ON_NODE1, SLURM_GPUS_ON_NODE="4")
    assert (found.hosts, found.processes_per_host, found.device) == (("node1", "node2"), 4, "cuda")
    assert (found.source, found.job_id, found.this_host, found.world_size) == ("slurm", "4711", "node1", 8)
    assert found.reason == "Slurm job 4711: node[1-2], 4 processes each (SLURM_GPUS_ON_NODE)"


@pytest.mark.parametrize(
    ("num_processes", "device", "variables", "processes", "reason"),
    [
        (0, "auto", {}, 4, "4 processes each (one per GPU that nvidia-smi shows here)"),
        (3, "auto", {}, 3, "3 processes each (--num_processes)"),
        (0, "auto", {"SLURM_GPUS_ON_NODE": "2"}, 2, "2 processes each (SLURM_GPUS_ON_NODE)"),
        (0, "cpu", {"SLURM_GPUS_ON_NODE": "4"}, 1, "1 process each (one per node, on the CPU)"),
        (2, "cpu", {}, 2, "2 processes each (--num_processes, on the CPU)"),
        (0, "auto", NO_GPU, 1, "1 process each (one per node, on the CPU)"),
        (0, "auto", {"SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_CPUS_PER_NODE": "208(x2)"}, 4, "4 processes each"),
    ],
)
def test_processes_on_each_node_and_where_the_number_comes_from(num_processes, device, variables, processes, reason):
    found = find(num_processes, device, **ON_NODE1, **variables)
    assert found.processes_per_host == processes
    assert reason in found.reason


def test_gpus_that_the_scheduler_gave_and_nobody_sees_are_refused():
    with pytest.raises(UserError, match=r"has 4 GPUs on each node \(SLURM_GPUS_ON_NODE\), but nvidia-smi shows 3"):
        find(**ON_NODE1, SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="0,1,2")
    with pytest.raises(UserError, match=r"has 4 GPUs on each node .* but nvidia-smi shows none"):
        find(**ON_NODE1, SLURM_GPUS_ON_NODE="4", **NO_GPU)
    assert find(3, **ON_NODE1, SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="0,1,2").world_size == 6
    assert find(device="cpu", **ON_NODE1, SLURM_GPUS_ON_NODE="4", **NO_GPU).device == "cpu"


def test_from_a_login_node_only_what_the_scheduler_tells_is_known(elsewhere):
    found = find(**SLURM, SLURM_GPUS_PER_NODE="h100:8")
    assert (found.processes_per_host, found.device, found.this_host) == (8, "cuda", None)
    assert find(**SLURM, SLURM_GPUS_PER_NODE="0").device == "cpu"
    assert find(8, "cuda", **SLURM).world_size == 16
    assert find(0, "cpu", **SLURM).world_size == 2
    with pytest.raises(UserError, match=r"--device auto: this machine is not one of the nodes .* say --device cuda"):
        find(**SLURM)
    with pytest.raises(UserError, match=r"--device cuda: this machine is not one of the nodes .* say --num_processes"):
        find(device="cuda", **SLURM)


def test_this_machine_alone_when_asked_leaves_nodes_idle_and_says_so():
    found = find(cluster=ClusterSettings(nodes_from="none"), **SLURM, **NO_GPU)
    assert (found.hosts, found.source, found.job_id) == ((socket.gethostname(),), "none", "4711")
    assert "the other 1 of 2 nodes of Slurm job 4711: node[1-2] stay idle" in found.reason
    broken = {"SLURM_JOB_ID": "1", **NO_GPU}
    assert find(cluster=ClusterSettings(nodes_from="none"), **broken).world_size == 1
    assert "idle" not in find(cluster=ClusterSettings(nodes_from="none"), **NO_GPU).reason


def test_the_local_launcher_starts_on_no_other_machine(elsewhere):
    with pytest.raises(
        UserError, match=r"job 4711: node\[1-2\] has 2 nodes, and --launcher local .* --nodes_from none"
    ):
        find(cluster=ClusterSettings(launcher="local"), **SLURM)
    one = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1"}
    with pytest.raises(UserError, match="job 1: node1 is another machine, and --launcher local"):
        find(cluster=ClusterSettings(launcher="local"), **one)
    alone = ClusterSettings(launcher="local", nodes_from="none")
    assert find(cluster=alone, **SLURM, **NO_GPU).world_size == 1


def test_a_caller_that_starts_here_alone_is_refused_several_nodes():
    """The call without cluster settings, of code that knows no other machine."""
    with pytest.raises(UserError, match="2 nodes"):
        allocation.find(num_processes=0, device="auto", environment=ON_NODE1)
    assert allocation.find(num_processes=2, device="cpu", environment={}).world_size == 2


def test_num_nodes_is_asserted():
    assert find(cluster=ClusterSettings(num_nodes=2), **ON_NODE1).world_size == 8
    with pytest.raises(UserError, match=r"--num_nodes 3: there are 2 \(Slurm job 4711: node\[1-2\]\)"):
        find(cluster=ClusterSettings(num_nodes=3), **ON_NODE1)
    with pytest.raises(UserError) as caught:
        find(cluster=ClusterSettings(num_nodes=2))
    for looked_at in ("this machine only", "no --hostfile", "SLURM_JOB_ID", "PE_HOSTFILE", "PBS_JOBID", "OMPI_COMM"):
        assert looked_at in str(caught.value)
    with pytest.raises(UserError, match="--num_nodes 2: there is 1 "):
        find(cluster=ClusterSettings(num_nodes=2, nodes_from="none"), **ON_NODE1)


def test_a_hostfile_wins_and_its_slots_are_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node3.example.org")
    file = tmp_path / "hostfile"
    file.write_text("node3 slots=2\nnode4 slots=2\n")
    found = find(cluster=ClusterSettings(hostfile=file))
    assert (found.hosts, found.processes_per_host, found.device) == (("node3", "node4"), 2, "cuda")
    assert (found.source, found.this_host, found.job_id) == ("hostfile", "node3", None)
    assert found.reason == f"hostfile {file}: node[3-4], 2 processes each (slots=2)"
    inside = find(cluster=ClusterSettings(hostfile=file), **SLURM)
    assert (inside.source, inside.job_id) == ("hostfile", "4711")
    assert inside.reason.endswith("; these are not the nodes of the job around it, Slurm job 4711: node[1-2]")
    assert find(1, cluster=ClusterSettings(hostfile=file)).processes_per_host == 1
    on_cpu = find(device="cpu", cluster=ClusterSettings(hostfile=file))
    assert (on_cpu.processes_per_host, on_cpu.reason.endswith("(slots=2, on the CPU)")) == (2, True)
    file.write_text("node3 slots=8\nnode4 slots=8\n")
    with pytest.raises(UserError, match="slots 8: this machine has 4 GPUs"):
        find(cluster=ClusterSettings(hostfile=file))
    file.write_text("node3\nnode4\n")
    assert find(cluster=ClusterSettings(hostfile=file)).processes_per_host == 4


def test_an_ssh_configuration_that_is_not_there_is_no_wrong_host_key(tmp_path):
    """ssh passes over an Include that is not there, and then refuses hosts whose keys it never saw."""
    settings = ClusterSettings(ssh_config=tmp_path / "ssh_config")
    with pytest.raises(UserError, match=r"ssh_config: there is no such file; create_ssh_config_file.sh makes one"):
        find(cluster=settings)
    (tmp_path / "ssh_config").write_text("Host *\n")
    assert find(cluster=settings).world_size == 4


@pytest.mark.parametrize(
    ("nodes", "processes", "told"),
    [(1, 1, "1 node, 1 process"), (1, 2, "1 node, 2 processes"), (2, 1, "2 nodes, 1 process each"),
     (2, 4, "2 nodes, 4 processes each")],
)  # fmt: skip
def test_what_a_job_asks_for_in_words(nodes, processes, told):
    job = SubmitSettings(submit="slurm", job_nodes=nodes)
    assert allocation.of_job(job, num_processes=processes, device="cpu").reason == f"a job that asks for {told}"


def test_a_hostfile_by_address_knows_this_machine(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("127.0.0.1 slots=1\n192.0.2.1 slots=1\n")
    assert find(cluster=ClusterSettings(hostfile=file)).this_host == "127.0.0.1"


def test_long_names_of_two_domains_are_two_machines(monkeypatch):
    from train.cluster import this_machine

    monkeypatch.setattr(socket, "gethostname", lambda: "node1.east.example")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert this_machine.name_among(["node1.west.example"]) is None
    assert this_machine.name_among(["node1.west.example", "NODE1.east.example"]) == "NODE1.east.example"
    assert this_machine.name_among(["node2", "node1"]) == "node1"
    assert this_machine.name_among(["node2", "node1"], own_name="node2") == "node2"
