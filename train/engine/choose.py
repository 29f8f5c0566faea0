"""Which engine trains a recipe, and why. The engines are neighbours behind one function:

prepare(recipe, allocation, run_folder) -> Command
"""

from __future__ import annotations

from collections.abc import Callable

from train.cluster.allocation import Allocation
from train.errors import UserError, refuse
from train.process import Command
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

_INSTALLER = "scripts/common/install_megatron_deepspeed.sh"
Prepare = Callable[[PretrainRecipe, Allocation, RunFolder], Command]


def choose(recipe: PretrainRecipe) -> tuple[str, str]:
    """The engine's name and the reason for it. A named engine wins.

    Raises:
        UserError: the named engine is not installed, or cannot train this recipe.
    """
    from train.engine.megatron_deepspeed import install

    wanted = recipe.parallel.engine
    objections = tuple(_objections_to_transformers(recipe))
    if wanted == "transformers":
        refuse(objections)
        return wanted, "asked for"
    checkout = install.find_checkout()
    unsuited = tuple(_objections_to_megatron(recipe))
    if wanted == "megatron-deepspeed":
        refuse(unsuited)
        if checkout is None:
            raise UserError(
                f"--engine megatron-deepspeed: no checkout is installed; run {_INSTALLER} or use --engine transformers"
            )
        return wanted, "asked for"
    if checkout is not None and not unsuited:
        return "megatron-deepspeed", f"installed at {checkout.path}"
    reason = unsuited[0] if unsuited else f"no Megatron-DeepSpeed checkout is installed ({_INSTALLER})"
    refuse(objections)
    return "transformers", reason


def preparer(engine: str) -> Prepare:
    """The `prepare` function of an engine."""
    if engine == "megatron-deepspeed":
        from train.engine.megatron_deepspeed.prepare import prepare as prepare_megatron

        return prepare_megatron
    from train.engine.transformers.prepare import prepare as prepare_transformers

    return prepare_transformers


def layout(engine: str) -> Callable[[PretrainRecipe, Allocation], str]:
    """The function that writes an engine's division of ranks and batch as an equation."""
    if engine == "megatron-deepspeed":
        from train.engine.megatron_deepspeed.prepare import layout as layout_megatron

        return layout_megatron
    from train.engine.transformers.prepare import layout as layout_transformers

    return layout_transformers


def uses_deepspeed(engine: str, recipe: PretrainRecipe) -> bool:
    """Whether the ranks will start DeepSpeed."""
    return engine == "megatron-deepspeed" or recipe.parallel.zero_stage > 0


def commit(engine: str) -> str | None:
    """The engine's commit, where the installed version does not name it."""
    from train.engine.megatron_deepspeed import install

    checkout = install.find_checkout() if engine == "megatron-deepspeed" else None
    return checkout.commit if checkout else None


def _objections_to_transformers(recipe: PretrainRecipe) -> list[str]:
    parallel = recipe.parallel
    wrong = [
        f"--{name} {getattr(parallel, name)} needs --engine megatron-deepspeed."
        for name in ("tensor_parallel_size", "pipeline_parallel_size")
        if getattr(parallel, name) > 1
    ]
    wrong += [
        f"--{name} needs --engine megatron-deepspeed."
        for name in ("no_pipeline_parallel", "sequence_parallel")
        if getattr(parallel, name)
    ]
    return wrong


def _objections_to_megatron(recipe: PretrainRecipe) -> list[str]:
    parallel, model = recipe.parallel, recipe.model
    wrong = []
    if model.architecture != "gpt2":
        wrong.append(f"--architecture {model.architecture}: only the transformers engine trains it in this version.")
    if parallel.zero_stage > 1:
        wrong.append(f"--zero_stage {parallel.zero_stage}: Megatron-DeepSpeed runs 0 or 1 here.")
    if parallel.offload != "none":
        wrong.append(f"--offload {parallel.offload}: only the transformers engine offloads.")
    if parallel.torch_compile:
        wrong.append("--torch_compile: only the transformers engine compiles the model.")
    return wrong
