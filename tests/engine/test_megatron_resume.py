"""Killed at any moment and started again, the real engine's losses are those of an uninterrupted run; in any layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from megatron_tiny_run import flags

pytestmark = [pytest.mark.slow, pytest.mark.megatron, pytest.mark.xdist_group("megatron_engine")]
SHAPE = {"zero_stage": 1, "save_interval": 2, "eval_interval": 0, "split": "100"}
TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_processes": 4}
PP2 = {"pipeline_parallel_size": 2, "num_processes": 2}  # two processes start twice as fast as four

# Put before a rank's own code: ends it by SIGKILL at the nth time that Python is about to do a certain thing.
KILLER = r"""
import os, re, signal, sys
rank, event, pattern, nth = os.environ.get("TEST_KILL_AT", "none x x 0").split(" ")
seen = []
def hook(name, arguments):
    if name == event and any(re.search(pattern, str(word)) for word in arguments):
        seen.append(name)
        if len(seen) == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == rank:
    sys.addaudithook(hook)
"""
# While saving: the folder has just been made; files are written and being summed; `latest` is about to be moved on.
MOMENTS = (
    r"1 os.mkdir \.global_step2\.unfinished-save$ 1",
    r"1 open \.global_step2\.unfinished-save/.*\.pt$ 1",
    r"0 os.rename /latest$ 2",
)
TRAINING = r"0 open /metrics/killed\.jsonl$ 3"  # a progress line


@pytest.fixture(scope="module")
def start(project_root: Path, corpus: Path, output: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts pretrain.sh with the tiny recipe; flags win over it. `kill_at` is one of MOMENTS."""
    killer = tmp_path_factory.mktemp("killer")
    (killer / "sitecustomize.py").write_text(KILLER)

    def begin(job_name: str, *, kill_at: str | None = None, **more: object) -> Run:
        environment = {**os.environ, "TRAIN_PYTHON": sys.executable}
        if kill_at:
            searched = [str(killer), os.environ.get("PYTHONPATH", "")]
            environment |= {"PYTHONPATH": os.pathsep.join(filter(None, searched)), "TEST_KILL_AT": kill_at}
        script = project_root / "scripts" / "step2_pretrain_model" / "pretrain.sh"
        words = ["bash", str(script), *flags(corpus, output, job_name=job_name, **(SHAPE | more))]
        said = killer / f"{job_name}.log"  # not a pipe, which would be full before anybody reads it
        with said.open("w") as stream:
            process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
        return Run(process, said)

    return begin


class Run(NamedTuple):
    """A launch, and the file that holds what it says."""

    process: subprocess.Popen[bytes]
    said: Path


def finish(run: Run, status: int = 0) -> str:
    """Waits for the end, and returns what was said."""
    found = run.process.wait(timeout=600)
    assert found == status, run.said.read_text()[-5000:]
    return run.said.read_text()


def losses(output: Path, job_name: str) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics" / f"{job_name}.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def ranks(output: Path, job_name: str) -> list[int]:
    """The processes that carry the run's recipe in their command line, in order of birth."""
    found = subprocess.run(
        ["pgrep", "-f", f"{output}/recipe/{job_name}.yaml"], capture_output=True, text=True, check=False
    )
    return sorted(pid for pid in map(int, found.stdout.split()) if Path(f"/proc/{pid}").exists())


def test_killed_while_saving_and_while_training(start: Any, output: Path) -> None:
    finish(start("whole", **PP2))
    job = output / "checkpoint" / "killed"
    for moment in MOMENTS:
        finish(start("killed", kill_at=moment, **PP2), 128 + signal.SIGKILL)
        assert not ranks(output, "killed")
    # killed before `latest` was moved on: the checkpoint is whole, and the pointers are behind
    assert (job / "global_step4").is_dir() and (job / "latest").read_text() == "global_step2"

    said = finish(start("killed", kill_at=TRAINING, **PP2), 128 + signal.SIGKILL)
    assert max(losses(output, "killed")) in (5, 6, 7)
    assert "resume: latest names 'global_step2'" in said and "going on from global_step4" in said
    assert not ranks(output, "killed")

    finish(start("killed", **PP2))
    assert losses(output, "killed") == losses(output, "whole")
    assert sorted(path.name for path in job.iterdir() if path.is_dir()) == [f"global_step{n}" for n in (2, 4, 6, 8)]
    assert not ranks(output, "killed")


def test_another_layout_goes_on_with_the_same_losses(start: Any, output: Path, launch: Any) -> None:
    """TP2 x PP2 to one process, whose checkpoint goes on in TP2; between the two a checkpoint is damaged."""
    finish(start("base", **TP2_PP2))
    job = output / "checkpoint" / "moved"
    shutil.copytree(job.with_name("base") / "global_step4", job / "global_step4")
    identity = (output / "recipe" / "base.identity.json").read_text()
    (output / "recipe" / "moved.identity.json").write_text(identity.replace('"base"', '"moved"'))
    shutil.copy(output / "metrics" / "base.jsonl", output / "metrics" / "moved.jsonl")

    said = finish(start("moved", num_processes=1))
    assert "global_step4 was saved in TP 2 x PP 2 x DP 1, ZeRO 1, goes on in TP 1 x PP 1 x DP 1" in said
    expected = losses(output, "base")
    assert losses(output, "moved") == pytest.approx(expected, rel=1e-6)
    assert not list(job.glob("*universal*"))

    weights = job / "global_step8" / "layer_02-model_00-model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    shutil.copy(job / "global_step8" / "files.json", output / "list")
    (output / "manifest" / "moved.json").unlink()  # a run that is over would be over in any layout
    said = finish(start("moved", tensor_parallel_size=2, num_processes=2, micro_batch_size=1))
    assert "resume: global_step8 is damaged (layer_02-model_00-model_states.pt: other contents" in said
    assert "global_step6 was saved in TP 1 x PP 1 x DP 1, ZeRO 1, goes on in TP 2 x PP 1 x DP 1" in said
    assert losses(output, "moved") == pytest.approx(expected, rel=1e-6)
    assert (job / "global_step8.damaged" / "files.json").read_bytes() == (output / "list").read_bytes()
    stretches = json.loads((output / "manifest" / "moved.json").read_text())["results"]["stretches"]
    assert [(stretch["after_step"], stretch["world_size"]) for stretch in stretches] == [(0, 4), (4, 1), (6, 2)]

    checked = launch("common/check_checkpoint.sh", "--input_model_dir", job, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = json.loads(checked.stdout)["checkpoints"]
    assert [record["notes"] for record in found] == [[]] * 3 and all(record["whole"] for record in found)
