"""How much memory may be taken: never more than the machine has, nor than a control group leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from train import free_memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where control groups stand; this process is in none yet."""
    monkeypatch.setattr(free_memory, "_MOUNT", tmp_path)
    monkeypatch.setattr(free_memory, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_least_that_a_group_around_us_leaves(groups: Path) -> None:
    write(groups, membership="0::/slurm/job_7/step_0")
    write(groups / "slurm", memory__max="max", memory__current=9 * GIB, memory__stat="inactive_file 0")
    write(
        groups / "slurm" / "job_7",
        memory__max=3 * GIB,
        memory__current=2 * GIB,
        memory__stat=f"anon 5\ninactive_file {GIB // 2}",
    )
    write(groups / "slurm" / "job_7" / "step_0", memory__max="max", memory__current=GIB, memory__stat="inactive_file 0")
    assert free_memory.free_bytes() == GIB + GIB // 2


def test_the_first_version_of_control_groups(groups: Path) -> None:
    write(groups, membership="8:cpu,cpuacct:/job\n7:memory:/job")
    files = {
        "memory__limit_in_bytes": 2 * GIB,
        "memory__usage_in_bytes": GIB,
        "memory__stat": "cache 9\ntotal_inactive_file 4096",
    }
    write(groups / "memory" / "job", **files)
    assert free_memory.free_bytes() == GIB + 4096


@pytest.mark.parametrize("membership", [None, "0::/", "0::/gone"])
def test_without_a_limit_it_is_the_machines(groups: Path, membership: str | None) -> None:
    if membership is not None:
        write(groups, membership=membership)
    found, machine = free_memory.free_bytes(), psutil.virtual_memory().available
    assert found == pytest.approx(machine, rel=0.2)


def test_a_group_that_is_full_leaves_nothing(groups: Path) -> None:
    write(groups, membership="0::/job")
    write(groups / "job", memory__max=GIB, memory__current=GIB + 4096, memory__stat="inactive_file 0")
    assert free_memory.free_bytes() == 0


def test_this_machine_tells() -> None:
    assert 0 < free_memory.free_bytes() <= psutil.virtual_memory().total
