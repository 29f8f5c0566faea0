"""Runs on the GPUs of one host: the command, and the way from training to a verified export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import runs  # type: ignore[import-not-found]

from train.engine.megatron_deepspeed import checkout

STEPS, SAVED = 8, 4
SHAPES: dict[str, dict[str, object]] = {
    "gpt": {"model_size": "gpt_0.125B", "lr": 6e-4},
    "llama": {
        "architecture": "llama", "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
        "num_key_value_heads": 4, "ffn_hidden_size": 2048, "lr": 6e-4,
    },
}  # fmt: skip
_CONVERT = "convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh"


def pretrain(corpus: Path, output: Path, **more: object) -> list[str]:
    """The command of a run of 8 steps, saved after 4 and 8; `more` wins over what it is by itself."""
    given: dict[str, Any] = {
        "input_tokenizer_file": corpus / "tok.model", "data_path": corpus / "text_text_document",
        "output_model_dir": output, "job_name": "run", "sequence_length": 1024, "micro_batch_size": 4,
        "global_batch_size": 16, "save_interval": SAVED, "log_interval": 1, "eval_interval": 0, "precision": "bf16",
        "zero_stage": 1, "num_processes": 2, "device": "cuda",
    }  # fmt: skip
    given |= more
    tokens = STEPS * given["global_batch_size"] * given["sequence_length"]
    return ["bash", str(runs.PRETRAIN), *runs.flags({"train_tokens": tokens, **given})]


def run(argv: list[str]) -> str:
    """What a command printed; it must end well."""
    began = time.monotonic()
    done = subprocess.run(
        argv, env={**os.environ, **runs.ENVIRONMENT}, capture_output=True, text=True, timeout=400, check=False
    )
    print(f"{Path(argv[1]).name}: {time.monotonic() - began:.0f} s", flush=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def require_engine() -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())


def train(command: list[str], output: Path, *, says: str = "") -> dict[int, float]:
    """Runs to the end, and says this among the rest; the losses by step."""
    assert says in run(command)
    losses: dict[int, float] = runs.losses(output, "run")
    assert sorted(losses) == list(range(1, STEPS + 1)) and losses[STEPS] < losses[1], losses
    return losses


def go_on(command: list[str], output: Path) -> dict[int, float]:
    """Takes the last checkpoint away and runs again, from the one before; the losses by step, old and new."""
    shutil.rmtree(output / "checkpoint" / "run" / f"global_step{STEPS}")
    (output / "manifest" / "run.json").unlink()
    assert f"goes on from step {SAVED}" in run(command)
    found: dict[int, float] = runs.losses(output, "run")
    return found


def export(corpus: Path, output: Path, *, sequence_length: int = 1024) -> dict[str, Any]:
    """Converts the last checkpoint, which fails unless its logits are the engine's; what was found of them."""
    convert: dict[str, object] = {
        "input_tokenizer_file": corpus / "tok.model", "input_model_max_length": sequence_length,
        "input_model_dir": output / "checkpoint" / "run" / f"global_step{STEPS}",
        "output_tokenizer_and_model_dir": output / "hf", "parity_documents": 50,
    }  # fmt: skip
    run(["bash", str(runs.PRETRAIN.parents[1] / "step3_upload_pretrained_model" / _CONVERT), *runs.flags(convert)])
    logits: dict[str, Any] = json.loads((output / "hf" / "verification.json").read_text())["logits"]
    return logits
