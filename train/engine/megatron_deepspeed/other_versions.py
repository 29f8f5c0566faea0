"""Fits rendered arguments to a version of Megatron-DeepSpeed that lacks some of them, such as the fork of early 2024.

    arguments = fitted(arguments, pass_through.known_flags(found.path), found)

What that version does without the argument anyway is left out; anything else is refused before a rank starts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from train.checkpoint_folders import POINTER
from train.engine.megatron_deepspeed.checkout import DIRECTORY_VARIABLE, PINNED_COMMIT, Checkout
from train.errors import refuse
from train.recipe import PretrainRecipe

# Flag -> the values that the versions without it take by themselves.
_IMPLIED = {
    "--rotary-position-embeddings-theta": re.compile("10000"),
    "--load-tag": re.compile(r"global_step\d+"),  # where `latest` names the same: DeepSpeed goes by it
}


def fitted(arguments: Sequence[str], known: Collection[str], found: Checkout) -> tuple[str, ...]:
    """The arguments that this version takes.

    Args:
        arguments: as rendered for the pinned version.
        known: the flags of this version.
        found: this version, for the message.

    Raises:
        UserError: it lacks something that the run cannot do without; all of it at once.
    """
    kept, problems = [], []
    words = list(arguments)
    while words:
        flag, values = words.pop(0), []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if flag in known:
            kept += [flag, *values]
        elif not (
            flag in _IMPLIED
            and len(values) == 1
            and _IMPLIED[flag].fullmatch(values[0])
            and (flag != "--load-tag" or values[0] == _latest(kept))
        ):
            problems.append(
                f"this Megatron-DeepSpeed ({found.path}, commit {found.commit[:8]}) has no {' '.join([flag, *values])},"
                f" which this run needs: use the pinned one ({PINNED_COMMIT[:8]}; leave {DIRECTORY_VARIABLE} unset), or"
                " change the recipe."
            )
    refuse(problems)
    return tuple(kept)


def broken_shapes(recipe: PretrainRecipe, known: Collection[str], found: Checkout) -> list[str]:
    """Shapes that this version trains wrongly or not at all; empty for the pinned one.

    From 676a482c ("FPDT") on the fused projection is cut into thirds whatever the number of key-value heads, and
    without the pipeline module rotary positions cannot be unpacked (the patch `rotary-positions` mends them with it).
    """
    if "--ds-sequence-parallel-fpdt" not in known or recipe.model.architecture == "gpt2":
        return []
    instead = f"use the pinned one ({PINNED_COMMIT[:8]}; leave {DIRECTORY_VARIABLE} unset)."
    version = f"this Megatron-DeepSpeed ({found.path}, commit {found.commit[:8]})"
    problems = []
    groups = recipe.model.num_key_value_heads
    if groups != recipe.model.num_attention_heads:
        problems.append(f"--num_key_value_heads {groups}: {version} cuts grouped queries wrongly; {instead}")
    if recipe.parallel.no_pipeline_parallel:
        problems.append(
            f"--no_pipeline_parallel: {version} has no rotary positions without its pipeline module; {instead}"
        )
    return problems


def _latest(arguments: Sequence[str]) -> str | None:
    """What `latest` names in the folder that is loaded from."""
    file = Path(arguments[arguments.index("--load") + 1]) / POINTER if "--load" in arguments else None
    return file.read_text("utf-8", "replace").strip() if file is not None and file.is_file() else None
