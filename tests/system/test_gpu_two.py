"""Two GPUs of one host, over NCCL: layouts train, resume to the same losses, export and verify; every starter works.

Needs two NVIDIA GPUs, and a Megatron-DeepSpeed checkout for the layouts. Takes about a minute each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs  # type: ignore[import-not-found]

from train.cluster.allocation import count_gpus
from train.engine.megatron_deepspeed import checkout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 2, reason="needs two NVIDIA GPUs"),
]
_STEPS, _SAVED = 8, 4
_SHAPES: dict[str, dict[str, object]] = {
    "gpt": {"model_size": "gpt_0.125B", "lr": 6e-4},
    "llama": {
        "architecture": "llama", "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
        "num_key_value_heads": 4, "ffn_hidden_size": 2048, "lr": 6e-4,
    },
}  # fmt: skip
_LAYOUTS: dict[str, dict[str, object]] = {
    "DP2": {},
    "TP2": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel_size": 2},
}


def pretrain(corpus: Path, output: Path, **more: object) -> list[str]:
    given: dict[str, object] = {
        "input_tokenizer_file": corpus / "tok.model", "data_path": corpus / "text_text_document",
        "output_model_dir": output, "job_name": "run", "sequence_length": 1024, "micro_batch_size": 4,
        "global_batch_size": 16, "train_tokens": _STEPS * 16 * 1024, "save_interval": _SAVED, "log_interval": 1,
        "eval_interval": 0, "precision": "bf16", "zero_stage": 1, "num_processes": 2, "device": "cuda",
    }  # fmt: skip
    return ["bash", str(runs.PRETRAIN), *runs.flags({**given, **more})]


def run(argv: list[str]) -> str:
    done = subprocess.run(
        argv, env={**os.environ, **runs.ENVIRONMENT}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shape", _SHAPES)
def test_a_layout_trains_resumes_exports_and_verifies(shape: str, layout: str, corpus: Path, tmp_path: Path) -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    command = pretrain(corpus, tmp_path, engine="megatron-deepspeed", **_SHAPES[shape], **_LAYOUTS[layout])
    run(command)
    before = runs.losses(tmp_path, "run")
    assert sorted(before) == list(range(1, _STEPS + 1)) and before[_STEPS] < before[1]
    job = tmp_path / "checkpoint" / "run"
    shutil.rmtree(job / f"global_step{_STEPS}")
    (tmp_path / "manifest" / "run.json").unlink()
    said = run(command)
    assert f"goes on from step {_SAVED}" in said
    after = runs.losses(tmp_path, "run")
    # reductions over NCCL may differ in their order from run to run
    assert after == pytest.approx(before, rel=2e-3)
    convert: dict[str, object] = {
        "input_tokenizer_file": corpus / "tok.model", "input_model_max_length": 1024,
        "input_model_dir": job / f"global_step{_STEPS}", "output_tokenizer_and_model_dir": tmp_path / "hf",
        "parity_documents": 50,
    }  # fmt: skip
    script = "convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh"
    run(["bash", str(runs.PRETRAIN.parents[1] / "step3_upload_pretrained_model" / script), *runs.flags(convert)])
    logits = json.loads((tmp_path / "hf" / "verification.json").read_text())["logits"]
    print(f"{shape} {layout}: losses {before}, after resuming {after}, logits {logits}")


@pytest.mark.parametrize("starter", ["own", "torchrun", "deepspeed"])
def test_every_starter_starts_nccl(starter: str, corpus: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    run(pretrain(corpus, tmp_path, engine="transformers", starter=starter, **_SHAPES["gpt"]))
    found = runs.losses(tmp_path, "run")
    assert sorted(found) == list(range(1, _STEPS + 1)) and found[_STEPS] < found[1]
    print(f"{starter}: {time.monotonic() - started:.1f} s, losses {found}")


def test_a_rank_killed_over_nccl_ends_the_run_by_its_name(corpus: Path, tmp_path: Path) -> None:
    command = pretrain(corpus, tmp_path, engine="transformers", **{**_SHAPES["gpt"], "lr": 1e-4}, train_tokens="1B")
    running = subprocess.Popen(
        command, env={**os.environ, **runs.ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    runs.wait_for(lambda: len(runs.losses(tmp_path, "run")) > 3, running, 240)
    pattern = f"worker --recipe {tmp_path}"
    victim = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()[-1]
    os.kill(int(victim), signal.SIGKILL)
    started = time.monotonic()
    code, said = runs.finish(running, 120)
    print(f"ended {time.monotonic() - started:.1f} s after the rank was killed", file=sys.stderr)
    assert code == 137 and "rank 1 was killed by SIGKILL" in said, said[-4000:]
