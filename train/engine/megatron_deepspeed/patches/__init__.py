"""What Megatron-DeepSpeed needs to run on today's libraries: a list of small patches, applied in memory in each rank.

    outcomes = apply_all(Run(...), disabled_names(os.environ))

Each patch has a name, a reason and the versions it is for, decides itself whether it is needed here, and is switched
off by naming it in TRAIN_DISABLED_PATCHES (comma-separated). Upstream's files are never edited.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from train.engine.megatron_deepspeed.saving import Saving
from train.errors import UserError

if TYPE_CHECKING:
    from train.monitor.step_profile import StepProfile

DISABLED_VARIABLE = "TRAIN_DISABLED_PATCHES"
FORCED_VARIABLE = "TRAIN_FORCED_PATCHES"
_FOR_SPEED = "speed"

# Stand-ins for absent modules come first: the others import upstream's code.
_MODULES = (
    "deepspeed_compression",
    "shared_memory_op",
    "torchvision_absent",
    "apex_absent",
    "spare_imports",
    "dataset_helpers",
    "uncounted_ends",
    "environment_report",
    "memory_reports",
    "cpu_layer_norm",
    "decoupled_weight_decay",
    "batch_broadcast",
    "contiguous_attention",
    "cpu_kernels",
    "flash_attention",
    "compiled_fusions",
    "compiled_layers",
    "float8",
    "travelling_products",
    "fused_cross_entropy",
    "balanced_stages",
    "gradient_accumulation",
    "gradient_reduction",
    "early_reduction",
    "last_outputs",
    "rotary_positions",
    "sequence_parallel",
    "universal_notes",
    "golden_logits",
    "whole_checkpoints",
    "progress_lines",
    "start_times",
    "early_end",
)


@dataclass(frozen=True)
class Run:
    """What the patches have to know of the run they are in.

    Attributes:
        metrics: the file that receives progress lines; None writes none.
        train_steps: optimizer steps of the whole run.
        tokens_per_step: tokens of one step over all ranks.
        keep_last: checkpoints to keep; 0 keeps all.
        saving: how this rank saves; by itself all at once.
        engine_commit: upstream's commit, noted beside the golden logits.
        attention: the recipe's attention kernel: "sdpa", "flash_attention_2" or "eager".
        float8: whether the layers' matrix products are to be made in float8.
        splits_sequence: whether several tensor ranks hold a share of the sequence each (`--sequence_parallel`).
        layers_per_stage: layers of each pipeline stage as the recipe has them; empty balances them.
        forced: patches for GPUs that are to run here all the same, without being compiled; for tests.
        profile: records one of the steps on this rank; None records none.
        watch: receives a step and its numbers whenever there is a progress line; None where nobody watches.
    """

    metrics: Path | None = None
    train_steps: int = 1
    tokens_per_step: int = 1
    keep_last: int = 0
    saving: Saving = field(default_factory=Saving)
    engine_commit: str = "unknown"
    attention: str = "sdpa"
    float8: bool = False
    splits_sequence: bool = False
    layers_per_stage: tuple[int, ...] = ()
    forced: frozenset[str] = frozenset()
    profile: StepProfile | None = None
    watch: Callable[[int, Mapping[str, float]], None] | None = None


@dataclass(frozen=True)
class Patch:
    """One change to upstream's behaviour.

    Attributes:
        name: what TRAIN_DISABLED_PATCHES calls it.
        reason: what goes wrong without it.
        affected: the versions or machines it is for.
        apply: changes upstream in memory; returns what it replaced, or "" when nothing had to be.
        is_for_speed: whether it makes a GPU's step faster, and changes nothing else.
    """

    name: str
    reason: str
    affected: str
    apply: Callable[[Run], str]
    is_for_speed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one patch in this process."""

    patch: Patch
    state: str  # "applied", "not needed" or "switched off"
    detail: str


def all_patches() -> tuple[Patch, ...]:
    """Every patch, in the order in which they are applied."""
    return tuple(importlib.import_module(f"{__name__}.{name}").PATCH for name in _MODULES)


def disabled_names(environment: Mapping[str, str]) -> frozenset[str]:
    """The patches that TRAIN_DISABLED_PATCHES switches off; the word `speed` is those that make steps faster.

    Raises:
        UserError: a name is not a patch.
    """
    given = _names(environment, DISABLED_VARIABLE, words=frozenset({_FOR_SPEED}))
    if _FOR_SPEED not in given:
        return given
    return given - {_FOR_SPEED} | {patch.name for patch in all_patches() if patch.is_for_speed}


def forced_names(environment: Mapping[str, str]) -> frozenset[str]:
    """The patches that TRAIN_FORCED_PATCHES applies where they are not by themselves: on trial, or in tests.

    Raises:
        UserError: a name is not a patch.
    """
    return _names(environment, FORCED_VARIABLE)


def _names(environment: Mapping[str, str], variable: str, *, words: frozenset[str] = frozenset()) -> frozenset[str]:
    names = frozenset(name.strip() for name in environment.get(variable, "").split(",") if name.strip())
    known = {patch.name for patch in all_patches()} | words
    unknown = sorted(names - known)
    if unknown:
        near = [name for word in unknown for name in difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)]
        hint = f" did you mean {', '.join(near)}?" if near else ""
        raise UserError(
            f"{variable}: no patch is called {', '.join(unknown)};{hint} There are {', '.join(sorted(known))}."
        )
    return names


def apply_all(run: Run, disabled: frozenset[str] = frozenset()) -> list[Outcome]:
    """Applies every patch that is needed and not switched off, and says what became of each."""
    outcomes = []
    for patch in all_patches():
        if patch.name in disabled:
            outcomes.append(Outcome(patch, "switched off", ""))
            continue
        detail = patch.apply(run)
        outcomes.append(Outcome(patch, "applied" if detail else "not needed", detail))
    return outcomes
