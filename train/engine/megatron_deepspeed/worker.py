"""What runs in each rank: the patches, then upstream's `pretrain_gpt.py` as it is. prepare.py starts it.

python -m torch.distributed.run ... -m train.engine.megatron_deepspeed.worker --recipe RESOLVED.yaml
    --engine_commit HASH -- MEGATRON ARGUMENTS        (the checkout is on PYTHONPATH)
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from train import outcome, rank_end, settings, start_times
from train.deepspeed_ops import quote_library_path
from train.early_end import EndedEarlyError
from train.engine.megatron_deepspeed import pass_through, patches
from train.engine.megatron_deepspeed.saving import Saving
from train.errors import UserError
from train.monitor import step_profile, wandb_run
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the recipe and reports how it ended."""
    start_times.begin()
    # DeepSpeed's launcher has a name of its own for it
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--engine_commit", default="unknown")
    own = parser.parse_args(words[:end])
    recipe = settings.build(PretrainRecipe, settings.read_yaml(own.recipe))
    run_folder = RunFolder.of(recipe)
    leads = os.environ.get("RANK", "0") == "0"
    body = functools.partial(_pretrain_watched, recipe, run_folder, own.engine_commit, words[end + 1 :], leads=leads)
    return outcome.record(run_folder.outcome, body, leads=leads)


def _pretrain_watched(
    recipe: PretrainRecipe, run_folder: RunFolder, engine_commit: str, arguments: Sequence[str], *, leads: bool
) -> None:
    """Trains with this node's W&B run open around it, where one is wanted."""
    watched = wandb_run.start(
        recipe.logging,
        run_name=recipe.model_name,
        kind="pretrain",
        config=settings.to_plain(recipe),
        dir=run_folder.root,
    )
    run = patches.Run(
        metrics=run_folder.metrics,
        train_steps=recipe.train_steps,
        tokens_per_step=recipe.tokens_per_step,
        keep_last=recipe.checkpoint.keep_last,
        saving=Saving(is_async=recipe.checkpoint.async_save, ranks_on_node=int(os.environ["LOCAL_WORLD_SIZE"])),
        engine_commit=engine_commit,
        attention=recipe.parallel.attention,
        float8=recipe.training.float8,
        splits_sequence=recipe.parallel.tensor_parallel_size > 1 and bool(recipe.parallel.sequence_parallel),
        layers_per_stage=recipe.parallel.layers_per_stage,
        forced=patches.forced_names(os.environ),
        profile=step_profile.of_this_rank(run_folder.profile_dir, recipe.logging.profile_step),
        watch=None if watched is None else lambda step, numbers: watched.log(dict(numbers), step=step),
    )
    try:
        with pass_through.refusals_told(recipe.parallel.megatron_arguments):
            pretrain(run, arguments, leads=leads)
    except EndedEarlyError:
        if watched is not None:
            watched.finish()
        raise
    if watched is not None:
        watched.finish()


def pretrain(run: patches.Run, arguments: Sequence[str], *, leads: bool) -> None:
    """Runs upstream's program with `arguments` in this process.

    Raises:
        UserError: the checkout is not on the import path, or the loss became non-finite.
        EndedEarlyError: the run was asked to end early, and has saved.
    """
    script = pretrain_script()
    # four lines a rank about upstream's age, above everything a user wants to see
    for module in (r"megatron\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    for done in patches.apply_all(run, patches.disabled_names(os.environ)):
        if leads:
            print(f"patch {done.patch.name}: {done.state}" + (f" - {done.detail}" if done.detail else ""), flush=True)
    quote_library_path()
    # torchrun says it in the environment, upstream reads the argument that the deepspeed launcher adds
    sys.argv = [str(script), f"--local_rank={os.environ.get('LOCAL_RANK', '0')}", *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    run.saving.wait()


def pretrain_script() -> Path:
    """Upstream's `pretrain_gpt.py`, beside the `megatron` package that is on the import path."""
    package = importlib.util.find_spec("megatron")
    folders = list(package.submodule_search_locations or ()) if package else []
    script = Path(folders[0]).parent / "pretrain_gpt.py" if folders else None
    if script is None or not script.is_file():
        raise UserError("Megatron-DeepSpeed is not on PYTHONPATH: start this through scripts/step2_pretrain_model.")
    return script


if __name__ == "__main__":
    rank_end.run(main)
