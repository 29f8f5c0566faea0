"""Checkpoints beside the training, by the real engine: the same files; and what cannot be written ends the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from megatron_tiny_run import flags  # type: ignore[import-not-found]

from train.checkpoint_files import damage
from train.engine.megatron_deepspeed import checkout
from train.errors import EXIT_USER

pytestmark = [pytest.mark.slow, pytest.mark.megatron, pytest.mark.xdist_group("megatron_engine")]

# as if the disk were full for the second rank's files of step 4
FULL_DISK = """
import errno, os, re, sys
def hook(name, arguments):
    if name == "open" and re.search(r"global_step4\\.unfinished-save/.*01_optim_states\\.pt$", str(arguments[0])):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
if os.environ.get("RANK") == "1":
    sys.addaudithook(hook)
"""
LAYOUT = {"tensor_parallel_size": 2, "num_processes": 2, "zero_stage": 1, "precision": "bf16", "save_interval": 2}


@pytest.fixture(autouse=True)
def _needs_the_engine() -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())


def test_the_files_are_those_that_are_written_at_once(corpus: Path, output: Path, launch: Any) -> None:
    for job, is_async in (("beside", True), ("at_once", False)):
        words = flags(corpus, output, job_name=job, async_save=is_async, **LAYOUT)
        done = launch("step2_pretrain_model/pretrain.sh", *words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(re.findall(r"; training stood still for [0-9.]+ s\n", done.stdout)) == (4 if is_async else 0)
        assert "successfully saved" not in done.stdout
    folders = [output / "checkpoint" / job for job in ("beside", "at_once")]
    for step in (2, 4, 6, 8):
        # the others name the job
        names = sorted(file.name for file in (folders[0] / f"global_step{step}").glob("[!m]*.pt"))
        assert len([name for name in names if "optim_states" in name]) == 2 and len(names) > 4
        for name in names:
            beside, at_once = ((folder / f"global_step{step}" / name).read_bytes() for folder in folders)
            assert beside == at_once, name


def test_a_full_disk_beside_the_training_is_told(corpus: Path, output: Path, launch: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    words = flags(corpus, output, job_name="full", **LAYOUT)
    done = launch("step2_pretrain_model/pretrain.sh", *words, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == EXIT_USER, done.stdout[-3000:] + done.stderr[-3000:]
    assert "01_optim_states.pt: no space left: free some" in done.stderr.splitlines()[-1]
    job = output / "checkpoint" / "full"
    assert [folder.name for folder in job.glob("global_step*")] == ["global_step2"]
    assert list(damage(job / "global_step2", contents=True)) == []
    assert (job / "latest").read_text() == "global_step2"
    records = map(json.loads, (output / "metrics" / "full.jsonl").read_text().splitlines())
    assert max(record["step"] for record in records) < 6  # it did not wait for the next save

    done = launch("step2_pretrain_model/pretrain.sh", *words)
    assert done.returncode == 0 and "goes on from step 2" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(folder.name for folder in job.glob("*global_step*")) == [f"global_step{n}" for n in (2, 4, 6, 8)]
    assert "resume: latest_checkpointed_iteration.txt names '4'" in done.stdout


def test_a_full_disk_at_the_end_ends_all_ranks_at_once(corpus: Path, output: Path, launch: Any, tmp_path: Path) -> None:
    """Nobody waits for a rank that cannot write: torchrun would kill the others half a minute later."""
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK.replace("global_step4", "global_step8"))
    words = flags(corpus, output, job_name="full_at_the_end", starter="torchrun", **LAYOUT)
    done = launch("step2_pretrain_model/pretrain.sh", *words, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == EXIT_USER, done.stdout[-3000:] + done.stderr[-3000:]
    assert "01_optim_states.pt: no space left: free some" in done.stderr.splitlines()[-1]
    assert "SIGKILL" not in done.stdout + done.stderr
    assert not (output / "checkpoint" / "full_at_the_end" / "global_step8").exists()
