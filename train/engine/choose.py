"""Which engine trains a recipe, and why.

The engines are neighbours: each is a folder whose `prepare` module offers

    problems(recipe, allocation) -> list[str]                what keeps it from training this recipe here
    layout(recipe, allocation) -> str                        how ranks and batch divide, as an equation
    prepare(recipe, allocation, run_folder) -> Command       the command, with the files it reads
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from train.cluster.allocation import Allocation
from train.errors import UserError, refuse
from train.process import Command
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

MEGATRON, TRANSFORMERS = "megatron-deepspeed", "transformers"


class Engine(Protocol):
    """What an engine's `prepare` module offers."""

    def problems(self, recipe: PretrainRecipe, allocation: Allocation) -> list[str]: ...

    def layout(self, recipe: PretrainRecipe, allocation: Allocation) -> str: ...

    def prepare(self, recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder) -> Command: ...


def engine(name: str) -> Engine:
    """The engine of that name."""
    if name == MEGATRON:
        from train.engine.megatron_deepspeed import prepare as megatron

        return cast(Engine, megatron)
    from train.engine.transformers import prepare as transformers

    return cast(Engine, transformers)


def choose(recipe: PretrainRecipe, allocation: Allocation) -> tuple[str, str]:
    """The engine's name and the reason for it. A named engine wins.

    Raises:
        UserError: the named engine, or none, can train this recipe here.
    """
    from train.engine.megatron_deepspeed import checkout

    wanted = recipe.parallel.engine
    if wanted != "auto":
        refuse(engine(wanted).problems(recipe, allocation))
        if wanted == MEGATRON and checkout.find_checkout() is None:
            raise UserError(f"{checkout.why_missing()} Or use --engine {TRANSFORMERS}.")
        return wanted, "asked for"
    found = checkout.find_checkout()
    unsuited = engine(MEGATRON).problems(recipe, allocation)
    if found is not None and not unsuited:
        return MEGATRON, f"installed at {found.path}"
    reason = unsuited[0] if found is not None else checkout.why_missing()
    objections = engine(TRANSFORMERS).problems(recipe, allocation)
    refuse(dict.fromkeys([*objections, reason]) if objections else [])  # both may object to the same thing
    return TRANSFORMERS, reason


def commit(name: str) -> str | None:
    """The engine's commit, where no installed version tells it."""
    from train.engine.megatron_deepspeed import checkout

    found = checkout.find_checkout() if name == MEGATRON else None
    return found.commit if found else None


def checkout_dir(name: str) -> Path | None:
    """Where the engine's checkout is, for an engine that has one."""
    from train.engine.megatron_deepspeed import checkout

    found = checkout.find_checkout() if name == MEGATRON else None
    return found.path if found else None


def uses_deepspeed(name: str, recipe: PretrainRecipe) -> bool:
    """Whether the ranks will start DeepSpeed."""
    return name == MEGATRON or recipe.parallel.zero_stage > 0
