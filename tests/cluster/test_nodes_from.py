"""What schedulers say of a job's nodes: read whole, and refused when it contradicts itself.

The variables are those of the schedulers' manuals; tests/cluster/recorded/ holds what a real Slurm and a real Grid
Engine gave, read in test_recorded_nodes.py.
"""

from __future__ import annotations

import socket

import pytest

from train.cluster import schedulers
from train.cluster.nodes import Absent, fold
from train.cluster.nodes_from import gridengine, openmpi, pbs, slurm
from train.cluster.settings import ClusterSettings
from train.errors import UserError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
NODES_OF = {"slurm": slurm.find, "gridengine": gridengine.find, "pbs": pbs.find, "openmpi": openmpi.find}


def nodes(source="auto", **environment):
    return schedulers.find_nodes(ClusterSettings(nodes_from=source), environment)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path as text."""

    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1 node2 node3"),
        ("node[001-003,7]", "node7 node001 node002 node003"),
        ("node[08-11]", "node08 node09 node10 node11"),
        ("gpu-[1-2]-[0-1]", "gpu-1-0 gpu-1-1 gpu-2-0 gpu-2-1"),
        ("zeta,alpha[1-2],beta", "zeta alpha1 alpha2 beta"),  # the list's own order: its first node leads
        ("rack[1-2]n.example.org", "rack1n.example.org rack2n.example.org"),
        ("node[001-003,007],gpu-[1-2]-[0-1]",
         "node001 node002 node003 node007 gpu-1-0 gpu-1-1 gpu-2-0 gpu-2-1"),
    ],
)  # fmt: skip
def test_slurm_lists_are_unfolded(text, hosts):
    assert slurm.parse_node_list(text) == tuple(hosts.split())


@pytest.mark.parametrize(
    "text", ["node[1-", "node[3-1]", "node[]", "node1 node2", "@all", "node*", "a!b", "$(reboot)", ",", "-oProxy"]
)
def test_what_is_no_slurm_list_is_refused(text):
    with pytest.raises(UserError, match="--nodes_from none"):
        slurm.parse_node_list(text)


def test_names_are_folded_for_people():
    assert fold(["node1", "node2", "gpu-1-0"]) == "gpu-1-0,node[1-2]"


@pytest.mark.parametrize(
    ("variables", "gpus", "origin"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:8"}, 8, "SLURM_GPUS_ON_NODE"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, 8, "SLURM_GPUS_PER_NODE"),
        ({"SLURM_GPUS_PER_NODE": "a100:2,v100:2"}, 4, "SLURM_GPUS_PER_NODE"),
        ({"SLURM_JOB_GPUS": "0,1,2"}, 3, "SLURM_JOB_GPUS"),
        ({"SLURM_STEP_GPUS": "4,5"}, 2, "SLURM_STEP_GPUS"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS": "16"}, 8, "SLURM_GPUS_ON_NODE"),
        ({"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_ON_NODE": "208"}, None, ""),
    ],
)
def test_gpus_of_a_slurm_job(variables, gpus, origin):
    found = nodes(**SLURM, **variables)
    assert (found.gpus, found.origin) == (gpus, origin)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_JOB_NODELIST": "node1"}, r"SLURM_JOB_NUM_NODES is 2, but SLURM_JOB_NODELIST \(node1\) names 1"),
        ({"SLURM_JOB_NODELIST": ""}, "has no node list"),
        ({"SLURM_JOB_NODELIST": None}, "has no node list"),
        ({"SLURM_JOB_NUM_NODES": "two"}, "SLURM_JOB_NUM_NODES is 'two', a number"),
        ({"SLURM_JOB_NUM_NODES": "0"}, "SLURM_JOB_NUM_NODES is '0', a number of 1 or more"),
        ({"SLURM_HET_SIZE": "2"}, "heterogeneous"),
        ({"SLURM_GPUS_ON_NODE": "many"}, "SLURM_GPUS_ON_NODE is 'many', a number of GPUs"),
        ({"SLURM_GPUS_ON_NODE": "3", "SLURM_GPUS": "4"}, r"4 GPUs \(SLURM_GPUS\) on 2 nodes, 3 of them on this one"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 copies .* this is task 1"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 copies .* this is task 0"),
    ],
)  # fmt: skip
def test_a_slurm_job_that_contradicts_itself_is_refused(changes, message):
    variables = {name: value for name, value in {**SLURM, **changes}.items() if value is not None}
    for source in ("auto", "slurm"):
        with pytest.raises(UserError, match=message):
            nodes(source, **variables)


def test_a_shell_in_the_first_task_of_srun_goes_on():
    shell = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PTY_PORT": "40155"}
    assert nodes(**shell).hosts == ("node1", "node2")
    assert nodes(**{**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).hosts == ("node1", "node2")


def test_grid_engine_takes_hosts_from_pe_hostfile(write):
    file = write("pe_hostfile", "node1 40 gpu@node1 UNDEFINED\nnode2 40 gpu@node2 UNDEFINED\n")
    found = nodes(PE_HOSTFILE=file, NHOSTS="2", JOB_ID="12", NSLOTS="80")
    assert (found.source, found.hosts, found.job_id) == ("gridengine", ("node1", "node2"), "12")
    assert found.slots is None and found.gpus is None, "slots are cores as a rule"
    assert "PE_HOSTFILE's slots, 40 on each node, were taken for cores" in found.notes[0]
    assert nodes(PE_HOSTFILE=file, JOB_ID="12", SGE_TASK_ID="3").job_id == "12.3"
    assert nodes(PE_HOSTFILE=file, JOB_ID="12", SGE_TASK_ID="undefined").job_id == "12"


def test_a_host_that_two_queues_gave_is_one_host(write):
    file = write("pe_hostfile", "node1 1 a@node1 <NULL>\nnode1 1 b@node1 <NULL>\nnode2 2 a@node2 <NULL>\n")
    assert nodes(PE_HOSTFILE=file, NHOSTS="2").hosts == ("node1", "node2")


def test_univas_list_of_hosts(write):
    file = write("hosts", "g0001\ng0002\n")
    assert nodes(SGE_JOB_HOSTLIST=file, NHOSTS="2", JOB_ID="3").hosts == ("g0001", "g0002")
    both = write("pe", "g0001.abci.local 80 gpu <NULL>\ng0002.abci.local 80 gpu <NULL>\n")
    assert nodes(SGE_JOB_HOSTLIST=file, PE_HOSTFILE=both).hosts == ("g0001.abci.local", "g0002.abci.local")


def test_a_grid_engine_job_without_parallel_environment_is_its_one_host(write):
    found = nodes(JOB_ID="5", SGE_TASK_ID="undefined", NHOSTS="1", NSLOTS="1", HOSTNAME="node7")
    assert (found.source, found.hosts) == ("gridengine", ("node7",))
    assert nodes(JOB_ID="5").source == "none", "JOB_ID alone may be anybody's"


@pytest.mark.parametrize(
    ("pe_hostfile", "hostlist", "variables", "message"),
    [
        (None, None, {"NHOSTS": "2"}, r"has 2 nodes \(NHOSTS\), but neither PE_HOSTFILE nor SGE_JOB_HOSTLIST"),
        (None, None, {"NHOSTS": "2", "PE_HOSTFILE": "/no/such"}, "/no/such, which cannot be read .No such file"),
        ("", None, {}, "which is empty"),
        ("node1 1 q UNDEFINED\n", None, {"NHOSTS": "2"}, r"NHOSTS is 2, but 1 are named \(node1\)"),
        ("node1 3 q x\nnode2 1 q x\n", None, {}, r"differ from node to node \(node1: 3, node2: 1\)"),
        ("node1\nnode2 x q\n", None, {}, "line 1 of PE_HOSTFILE is 'node1'(.|\n)*line 2 of PE_HOSTFILE is 'node2 x q'"),
        ("-oA 1 q x\n", None, {}, "'-oA' in PE_HOSTFILE cannot be host names"),
        ("node1 1 q x\nnode2 1 q x\n", "node1\nnode3\n", {}, "names node1, node2, but SGE_JOB_HOSTLIST node1, node3"),
        (None, "\n", {}, "SGE_JOB_HOSTLIST names .*, which is empty"),
        (
            None,
            None,
            {"SGE_TASK_ID": "undefined", "PE": "mpi", "NHOSTS": "1"},
            r"\(mpi\), but no PE_HOSTFILE: this is one",
        ),
        (None, None, {"NHOSTS": "many"}, "NHOSTS is 'many', a number"),
    ],
)
def test_a_grid_engine_job_that_contradicts_itself_is_refused(pe_hostfile, hostlist, variables, message, write):
    given = {"JOB_ID": "12", **variables}
    given |= {} if pe_hostfile is None else {"PE_HOSTFILE": write("pe", pe_hostfile)}
    given |= {} if hostlist is None else {"SGE_JOB_HOSTLIST": write("list", hostlist)}
    with pytest.raises(UserError, match=message):
        nodes(**given)


def test_pbs_names_a_host_per_slot(write):
    found = nodes(PBS_NODEFILE=write("n", "node1\nnode1\nnode2\nnode2\n"), PBS_JOBID="9.head", PBS_NUM_NODES="2")
    assert (found.source, found.hosts, found.job_id, found.slots) == ("pbs", ("node1", "node2"), "9.head", None)
    assert "names each node 2 times" in found.notes[0]
    assert nodes(PBS_NODEFILE=write("n", "node1\nnode2\n"), PBS_JOBID="9").notes == ()


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        (None, {}, "PBS_NODEFILE is not set"),
        (None, {"PBS_NODEFILE": ""}, "PBS_NODEFILE names nothing, which cannot be read"),
        (None, {"PBS_NODEFILE": "/no/such"}, "/no/such, which cannot be read"),
        ("", {}, "which is empty"),
        ("node1\nnode1\nnode2\n", {}, r"differ from node to node \(node1: 2, node2: 1\)"),
        ("node1\nnode1\n", {"PBS_NUM_NODES": "2"}, "PBS_NUM_NODES is 2, but PBS_NODEFILE names 1"),
        ("node1 node2\n", {}, "'node1 node2' in PBS_NODEFILE cannot be host names"),
    ],
)
def test_a_pbs_job_that_contradicts_itself_is_refused(text, variables, message, write):
    given = {"PBS_JOBID": "9.head", **variables} | ({} if text is None else {"PBS_NODEFILE": write("nodes", text)})
    with pytest.raises(UserError, match=message):
        nodes(**given)


def test_mpirun_of_one_process_is_this_machine():
    found = nodes(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_RANK="0")
    assert (found.source, found.hosts) == ("openmpi", (socket.gethostname(),))
    several = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_num_nodes": "2"}
    with pytest.raises(UserError, match=r"mpirun has 2 nodes \(OMPI_MCA_orte_num_nodes\) and does not tell .* names"):
        nodes(**several)
    assert nodes(**SLURM, **several).hosts == ("node1", "node2")


@pytest.mark.parametrize(("here", "message"), [("2", "nodes? "), ("4", "on this machine; this is number 1")])
def test_several_copies_under_mpirun_are_refused(here, message):
    given = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": here, "OMPI_COMM_WORLD_RANK": "1"}
    for source in ("auto", "openmpi", "slurm"):
        with pytest.raises(UserError, match="mpirun started 4 copies of this launcher.*" + message):
            nodes(source, **given, **SLURM)
    assert nodes("none", **given).source == "none"


@pytest.mark.parametrize("source", sorted(NODES_OF))
def test_a_forced_source_that_does_not_apply_is_refused_with_what_was_looked_at(source):
    assert isinstance(NODES_OF[source]({}), Absent)
    with pytest.raises(UserError, match=f"--nodes_from {source}: no.*Looked at besides: .*; .*; ") as caught:
        nodes(source)
    for other in set(NODES_OF) - {source}:
        answer = NODES_OF[other]({})
        assert isinstance(answer, Absent) and answer.reason in str(caught.value)


def test_a_forced_source_wins_over_another_schedulers_leftovers(write):
    leftovers = {"PBS_JOBID": "9", "PBS_NODEFILE": "/gone"}
    with pytest.raises(UserError, match=r"job of 2 schedulers: Slurm job 7 \(node\[1-2\]\); PBS job 9.*or pbs"):
        nodes(**SLURM, **leftovers)
    assert nodes("slurm", **SLURM, **leftovers).hosts == ("node1", "node2")
