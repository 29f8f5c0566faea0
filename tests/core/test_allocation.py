"""Where a run runs, and why; several nodes are refused rather than used in part."""

from __future__ import annotations

import pytest

from train import process
from train.cluster import allocation
from train.errors import UserError


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


def find(num_processes=0, device="auto", **environment):
    return allocation.find(num_processes=num_processes, device=device, environment=environment)


def test_without_gpus_one_process_on_the_cpu():
    found = find(CUDA_VISIBLE_DEVICES="")
    assert (found.device, found.processes_per_host, found.world_size) == ("cpu", 1, 1)
    assert "no GPU; processes: 1, one without GPUs" in found.reason


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


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda: nvidia-smi shows no GPU"):
        find(device="cuda", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("name", ["SLURM_JOB_NUM_NODES", "NHOSTS", "PBS_NUM_NODES"])
def test_several_nodes_are_refused_rather_than_left_idle(name):
    with pytest.raises(UserError, match="gave this job 2 nodes"):
        find(**{name: "2", "CUDA_VISIBLE_DEVICES": ""})
    assert find(**{name: "1", "CUDA_VISIBLE_DEVICES": ""}).world_size == 1
