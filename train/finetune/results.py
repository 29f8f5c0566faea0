"""A finetuning in numbers, for its manifest and for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from train import manifest
from train.checkpoint import lineage
from train.cluster.allocation import Allocation
from train.finetune import batch, command, methods
from train.finetune.find_inputs import Inputs
from train.finetune.folder import FinetuneFolder
from train.finetune.prepare import Prepared
from train.finetune.settings import FinetuneSettings
from train.monitor import progress


def of(
    settings: FinetuneSettings,
    found: Inputs,
    where: Allocation,
    prepared: Prepared,
    checks: Mapping[str, Any],
    folder: FinetuneFolder,
) -> dict[str, Any]:
    """The run in numbers, read from its own metrics."""
    records = list(progress.records(folder.metrics))
    return {
        "method": methods.of(settings),
        "base_model": settings.model_name_or_path,
        "base_model_on_hub": found.base_model_on_hub,
        "examples": prepared.account.as_dict(),
        "eval_examples": prepared.eval_account.as_dict() if prepared.eval_account else None,
        "layout": {
            "world_size": where.world_size,
            "device": where.device,
            "zero_stage": command.zero_stage(folder.deepspeed_config),
            "examples_per_step": batch.per_step(settings, where.world_size),
        },
        "parameters": checks["weights"]["parameters"],
        "best": checks["best"],
        "steps": json.loads(folder.saved.read_text(encoding="utf-8"))["steps"],  # not each one is among the records
        "tokens": max((record.get("tokens", 0) for record in records), default=0),
        **progress.summary(records),
        "first_eval_loss": next((record["eval_loss"] for record in records if "eval_loss" in record), None),
        "lineage": lineage.trace(file for file in found.files() if file.name != manifest.FILE_NAME),
    }


def summary(run: Mapping[str, Any]) -> str:
    """The losses for the terminal. A finetuning that the base model does better than is told."""
    lines = [f"loss {run['first_loss']:.4f} -> {run['last_loss']:.4f} in {run['steps']:,} steps"]
    before, after = run["first_eval_loss"], run["eval_loss"]
    if before is not None and after is not None and not after < before:
        what = f"the best checkpoint, of step {run['best']['step']:,}," if run["best"] else "the finetuned model"
        lines.append(
            f"note: held-out loss {before:.4f} -> {after:.4f}: {what} is no better than the base model on the held-out "
            "data. Lower --learning_rate, or train on other data or on more."
        )
    return "\n".join(lines)
