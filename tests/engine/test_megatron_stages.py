"""Pipeline stages of different depth, by the real engine: whole checkpoints, and the same losses in other stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from megatron_tiny_run import VOCABULARY, flags

pytestmark = [pytest.mark.slow, pytest.mark.megatron, pytest.mark.xdist_group("megatron_engine")]
SHAPE = {"num_layers": 3, "zero_stage": 1, "eval_interval": 0, "split": "100"}
PP2 = {"pipeline_parallel_size": 2, "num_processes": 2}


def losses(output: Path, job_name: str) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics" / f"{job_name}.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_uneven_stages_train_save_and_go_on_in_others(launch: Any, corpus: Path, output: Path, tmp_path: Path) -> None:
    def pretrain(job_name: str, *further: object) -> str:
        words = flags(corpus, output, job_name=job_name, **SHAPE, **PP2)
        done = launch("step2_pretrain_model/pretrain.sh", *words, *further)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return str(done.stdout)

    assert "layers of each pipeline stage: 2 1" in pretrain("staged")
    expected = losses(output, "staged")
    assert len(expected) == 8 and expected[8] < expected[1]

    job = output / "checkpoint" / "staged"
    shutil.rmtree(job / "global_step8")
    said = pretrain("staged", "--layers_per_stage", 1, 2, "--save_interval", 2)
    assert "layers of each pipeline stage: 1 2" in said
    assert "global_step4 was saved in TP 1 x PP 2 x DP 1, ZeRO 1, goes on in TP 1 x PP 2 x DP 1" in said
    assert "universal" in said
    assert losses(output, "staged") == pytest.approx(expected, rel=1e-6)

    shutil.rmtree(job / "global_step8")
    said = pretrain("staged")
    assert "layers of each pipeline stage: 1 2" in said and "universal form" not in said  # it keeps what it has
    assert losses(output, "staged") == pytest.approx(expected, rel=1e-6)

    checked = launch("common/check_checkpoint.sh", "--input_model_dir", job, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = json.loads(checked.stdout)["checkpoints"]
    assert [record["notes"] for record in found] == [[], [], []] and all(record["whole"] for record in found)

    from train.checkpoint.megatron.export import export

    for number in (4, 8):  # of both kinds of stages
        folder = tmp_path / f"hf{number}"
        folder.mkdir()
        export(job / f"global_step{number}", folder, vocab_size=VOCABULARY, model_max_length=32)
        assert len(list(folder.glob("*.safetensors"))) == 1
