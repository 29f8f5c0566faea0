"""Whether a checkpoint of the transformers engine is whole. Called by train/checkpoint/check.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from train.checkpoint.findings import Ability, Findings, inner_damage, is_finite
from train.checkpoint_folders import GOLDEN_LOGITS

_NEEDED = ("config.json", "trainer_state.json", "scheduler.pt")


def inspect(folder: Path) -> Findings:
    """Looks at everything but the recorded checksums, which are the caller's."""
    spread = any(folder.glob("global_step*"))  # DeepSpeed keeps its own state in a folder below
    problems = [*_missing(folder, spread=spread), *_weights(folder)]
    for file in sorted([*folder.rglob("*.pt"), *folder.rglob("*.pth")]):
        problems += inner_damage(folder, str(file.relative_to(folder)))
    notes = [] if (folder / GOLDEN_LOGITS).is_file() else [f"no {GOLDEN_LOGITS}: an export is not held against it"]
    ranks = "by as many ranks as before, whose state ZeRO has spread" if spread else "by any number of ranks"
    abilities = (
        Ability("resume", True, f"weights, optimizer and random state, {ranks}"),
        Ability(
            "reshape", not spread, "ZeRO's state of this engine is not reshaped" if spread else "nothing is spread"
        ),
        Ability("export", True, "it is in Hugging Face's form already"),
    )
    return Findings("transformers engine" + (", ZeRO" if spread else ""), tuple(problems), tuple(notes), abilities)


def _missing(folder: Path, *, spread: bool) -> Iterator[str]:
    yield from (f"{name}: missing" for name in _NEEDED if not (folder / name).is_file())
    if not spread and not (folder / "optimizer.pt").is_file():
        yield "optimizer.pt: missing"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            yield f"{index.name}: damaged ({error!r})"
            return
        yield from (f"{name}: missing" for name in sorted(shards) if not (folder / name).is_file())


def _weights(folder: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a dictionary
                    tensor = stored.get_tensor(name)
                    if tensor.is_floating_point() and not is_finite(tensor):
                        yield f"{file.name}: {name} has NaN or infinite values"
        except (SafetensorError, OSError) as error:
            yield f"{file.name}: truncated or damaged ({error})"
