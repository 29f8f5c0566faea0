"""Which tensors a finetuning changed, and which it left alone: the output's files against the base's, bit by bit.

record = changes.compare(base_dir, model_dir, trained={"lm_head.weight"})
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from train.checkpoint.safetensors_folder import SafetensorsFolder
from train.errors import VerificationError

_NAMED = 10


def compare(base_dir: Path, model_dir: Path, trained: Collection[str]) -> dict[str, Any]:
    """What changed. A base in another type is taken as training took it: rounded to the output's.

    Embeddings that grew by added tokens are compared in the rows that were there.

    Args:
        base_dir: the base model's folder; names without the architecture's prefix are found, too.
        model_dir: what came out.
        trained: the names of the tensors that training was to change.

    Returns:
        Counts, and the first names of trained tensors that are as they were and of those that the base has not.

    Raises:
        VerificationError: a tensor that was not to be trained is not what it was.
    """
    base, out = SafetensorsFolder(base_dir), SafetensorsFolder(model_dir)
    known = {name: name for name in base.names}
    known |= {name: short for name in out.names if name not in known and (short := name.partition(".")[2]) in known}
    changed, same, frozen, new, wrong = 0, [], 0, [], []
    for name in out.names:
        if name not in known:
            new.append(name)
            continue
        after = out.read(name)
        before = base.read(known[name]).to(after.dtype)
        is_same = before.shape[1:] == after.shape[1:] and before.equal(after[: len(before)])
        if name not in trained:
            frozen += 1
            wrong += [] if is_same else [f"{name} was not to be trained, and differs from the base's."]
        elif is_same:
            same.append(name)
        else:
            changed += 1
    if wrong:
        raise VerificationError(wrong[:_NAMED])
    record: dict[str, Any] = {
        "compared_with": f"the base's files, bit by bit in the output's type: {len(known)} tensors",
        "trained_and_changed": changed,
        "trained_and_unchanged": len(same),
        "not_trained_and_unchanged": frozen,
    }
    record |= {"unchanged": same[:_NAMED]} if same else {}
    return record | ({"not_in_the_base": new[:_NAMED]} if new else {})


def summary(record: dict[str, Any]) -> str:
    """The record as a line for the terminal; a training that changed nothing is told."""
    changed, same = record["trained_and_changed"], record["trained_and_unchanged"]
    line = f"changed    {changed} tensors; {record['not_trained_and_unchanged']} that were not trained are as they were"
    if same and not changed:
        return f"note: no weight changed at all: --learning_rate is too small for this type of weights.\n{line}"
    return line + (f", {same} that were trained, too, first {record['unchanged'][0]}" if same else "")
