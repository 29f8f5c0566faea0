"""The modules and weights of a model by name, and which of them a pattern means.

    model = empty_model(folder)
    weights = trained(["lm_head", "layers.*.mlp"], model)

A pattern is a name, or some parts of one in a row: `lm_head`, `layers.1` (not layers.10), `mlp.down_proj.weight`. In a
part `*`, `?` and `[...]` stand for any letters, as in file names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_SHOWN = 40


def empty_model(model_dir: Path) -> Any:
    """The model in `model_dir`, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def trained(patterns: Sequence[str], model: Any) -> list[Any]:
    """The parameters that `patterns` mean, each once; a tied one by any of its names."""
    found = {id(weight): weight for name, weight in _weights(model) if any(matches(each, name) for each in patterns)}
    return list(found.values())


def train_only(patterns: Sequence[str], model: Any) -> None:
    """Lets the optimizer see the parameters that `patterns` mean, and no others."""
    chosen = {id(weight) for weight in trained(patterns, model)}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in chosen)


def unmatched(patterns: Sequence[str], model: Any) -> Iterator[str]:
    """A message for each pattern that means no weight at all."""
    names = [name for name, _ in _weights(model)]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            there = shortened(name.rpartition(".")[0] for name in names)
            yield f"--trainables {pattern!r} is the name of no module of this model; there are {there}."


def matches(pattern: str, name: str) -> bool:
    """Whether some parts of `name` in a row are those of `pattern`.

    >>> matches("layers.1", "model.layers.1.mlp.up_proj.weight"), matches("layers.1", "model.layers.10.mlp.weight")
    (True, False)
    """
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def shortened(names: Iterable[str]) -> str:
    """Names for people: each once, with * for numbers."""
    found = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters(remove_duplicate=False)
