"""Which engine wrote a checkpoint, and which of a job's checkpoints is meant.

step_dir, how = kind.resolve(Path("output/step2_pretrain_model/checkpoint/JOB"))
found = kind.detect(step_dir)  # Detection(kind="transformers", reason="config.json and model.safetensors", ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train import outputs
from train.checkpoint_folders import GOLDEN_LOGITS, is_checkpoint, whole_checkpoints
from train.errors import UserError

TRANSFORMERS = "transformers"
MEGATRON = "megatron"

_MEGATRON_PATTERNS = ("mp_rank_*_model_states.pt", "layer_*-model_*-model_states.pt")


@dataclass(frozen=True)
class Detection:
    """What a checkpoint folder is.

    Attributes:
        kind: `TRANSFORMERS` or `MEGATRON`.
        reason: the files that say so.
        files: the files a conversion reads, sorted.
    """

    kind: str
    reason: str
    files: tuple[Path, ...]


def resolve(folder: Path) -> tuple[Path, str]:
    """The checkpoint that `folder` means: itself, or the one that a job folder's `latest` file names.

    Returns:
        The checkpoint folder, and one sentence that says how it was chosen.

    Raises:
        UserError: there is no such folder, or a job folder whose `latest` is missing or points at nothing.
    """
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--input_model_dir {folder} {wrong}: name a checkpoint (.../global_stepN) or its job folder.")
    if is_checkpoint(folder):
        return folder, f"checkpoint {folder}"
    latest = folder / "latest"
    steps = [path for _, path in whole_checkpoints(folder)]
    if not latest.is_file():
        if steps:
            names = ", ".join(path.name for path in steps)
            raise UserError(f"{folder} holds {names} and no `latest` file: name one of them in --input_model_dir.")
        return folder, f"checkpoint {folder}"
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    step_dir = folder / name
    if not name or not step_dir.is_dir():
        names = ", ".join(path.name for path in steps) or "no checkpoint"
        raise UserError(f"{latest} names {name!r}, the folder holds {names}: name the checkpoint in --input_model_dir.")
    return step_dir, f"checkpoint {step_dir} (the latest of {folder})"


def detect(checkpoint_dir: Path) -> Detection:
    """Which engine wrote `checkpoint_dir`.

    Raises:
        UserError: it is half-written or is no checkpoint; what was looked for is named.
    """
    if outputs.is_unfinished(checkpoint_dir):
        raise UserError(f"{checkpoint_dir} is half-written: choose a whole checkpoint, or let the run save again.")
    config = checkpoint_dir / "config.json"
    weights = sorted(checkpoint_dir.glob("model*.safetensors")) + sorted(checkpoint_dir.glob("model*.index.json"))
    if config.is_file() and weights:
        golden = [path for path in (checkpoint_dir / GOLDEN_LOGITS,) if path.is_file()]
        return Detection(TRANSFORMERS, f"config.json and {weights[0].name}", (config, *weights, *golden))
    states = sorted({path for pattern in _MEGATRON_PATTERNS for path in checkpoint_dir.glob(pattern)})
    if states:
        return Detection(MEGATRON, f"{states[0].name}", tuple(states))
    if config.is_file():
        missing = "config.json and no model.safetensors"
    elif weights:
        missing = f"{weights[0].name} and no config.json"
    else:
        missing = "neither config.json with model.safetensors (transformers engine) nor *_model_states.pt (Megatron)"
    raise UserError(f"{checkpoint_dir} is not a whole checkpoint: it holds {missing}. Choose another global_stepN.")
