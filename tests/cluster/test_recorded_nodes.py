"""What a real Slurm and a real Grid Engine gave inside jobs of two nodes (tests/cluster/recorded/)."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.cluster import schedulers
from train.cluster.nodes_from import slurm
from train.cluster.settings import ClusterSettings
from train.errors import UserError

RECORDED = Path(__file__).parent / "recorded"


def recorded(name):
    return dict(line.split("=", 1) for line in (RECORDED / name).read_text().splitlines() if "=" in line)


def test_slurm_job():
    found = schedulers.find_nodes(ClusterSettings(num_nodes=2), recorded("slurm_job.env"))
    assert (found.source, found.hosts, found.own_name) == ("slurm", ("node1", "node2"), "node1")
    assert (found.gpus, found.origin) == (2, "SLURM_GPUS_ON_NODE")


def test_tasks_of_srun():
    """A launcher under srun: every task refuses to start the run once more, but the one that is somebody's shell."""
    for task in (0, 1):
        with pytest.raises(UserError, match=f"srun started 2 copies of this launcher, this is task {task}"):
            schedulers.find_nodes(ClusterSettings(), recorded(f"slurm_srun_rank{task}.env"))
    shell = {**recorded("slurm_srun_rank0.env"), "SLURM_PTY_PORT": "40155"}
    assert schedulers.find_nodes(ClusterSettings(), shell).hosts == ("node1", "node2")


def test_slurms_own_unfolding():
    """scontrol show hostnames unfolded two lists: node[1-2] and one of two dimensions."""
    names = (RECORDED / "slurm_scontrol_show_hostnames.txt").read_text().split()
    assert (*slurm.parse_node_list("node[1-2]"), *slurm.parse_node_list("gpu[08-10,12]-rack[1-2]")) == tuple(names)


@pytest.fixture
def grid_engine_job():
    return {**recorded("gridengine_job.env"), "PE_HOSTFILE": str(RECORDED / "pe_hostfile.txt")}


def test_grid_engine_job(grid_engine_job):
    found = schedulers.find_nodes(ClusterSettings(num_nodes=2), grid_engine_job)
    assert (found.source, found.hosts, found.job_id) == ("gridengine", ("node1", "node2"), "1")
    assert (found.gpus, found.slots) == (None, None)
    assert "PE_HOSTFILE's slots, 2 on each node" in found.notes[0]


def test_a_task_of_a_grid_engine_job_is_not_the_job():
    """qrsh -inherit gives NHOSTS=1 and no PE_HOSTFILE on the second node of a job of two."""
    with pytest.raises(
        UserError, match=r"job 1 has a parallel environment .mpi., but no PE_HOSTFILE: this is one of its"
    ):
        schedulers.find_nodes(ClusterSettings(), recorded("gridengine_qrsh_inherit.env"))


@pytest.mark.parametrize("name", ["openmpi_rank0", "openmpi_rank3", "openmpi_in_gridengine_rank0"])
def test_ranks_of_mpirun_are_copies(name):
    with pytest.raises(UserError, match=r"mpirun started 4 copies of this launcher on several nodes \(2 on this one"):
        schedulers.find_nodes(ClusterSettings(), recorded(f"{name}.env"))
