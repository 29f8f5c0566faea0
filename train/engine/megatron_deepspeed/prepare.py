"""Megatron-DeepSpeed's launch: checks, the rendered command, and one worker per rank."""

from __future__ import annotations

import json
import os

from train import settings
from train.cluster.allocation import Allocation
from train.cluster.ranks import rank_argv, rank_environment
from train.engine.megatron_deepspeed import checkout, other_versions, pass_through
from train.engine.megatron_deepspeed.arguments import megatron_arguments
from train.engine.megatron_deepspeed.checks import problems
from train.engine.megatron_deepspeed.deepspeed_config import deepspeed_config
from train.errors import UserError, refuse
from train.process import Command
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder


def prepare(recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder) -> Command:
    """The command that trains `recipe` on `allocation`, with the files it reads.

    Raises:
        UserError: layout, batch and ranks do not fit each other, or no checkout is installed.
    """
    refuse(problems(recipe, allocation))
    found = checkout.find_checkout()
    if found is None:
        raise UserError(checkout.why_missing())
    arguments = megatron_arguments(recipe, allocation, run_folder, _data_path(recipe))
    further, known = recipe.parallel.megatron_arguments, pass_through.known_flags(found.path)
    refuse(other_versions.broken_shapes(recipe, known, found))
    refuse(pass_through.problems(further, arguments, known) if further else [])
    arguments = other_versions.fitted(arguments, known, found) + pass_through.words(further, arguments)
    files = {
        run_folder.recipe: settings.to_yaml(recipe),
        run_folder.deepspeed_config: json.dumps(deepspeed_config(recipe), indent=2) + "\n",
    }
    argv = rank_argv("train.engine.megatron_deepspeed.worker")
    argv += ["--recipe", str(run_folder.recipe), "--engine_commit", found.commit, "--", *arguments]
    return Command(tuple(argv), _environment(recipe, allocation, run_folder, found), files=files)


def layout(recipe: PretrainRecipe, allocation: Allocation) -> str:
    """How ranks and batch divide, as an equation."""
    training, parallel, world = recipe.training, recipe.parallel, allocation.world_size
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    data = world / (tensor * pipeline)
    steps = (training.global_batch_size or 0) / (training.micro_batch_size * data)
    return (
        f"world size {world} = {tensor} tensor x {pipeline} pipeline x {data:g} data parallel; global batch"
        f" {training.global_batch_size} = {training.micro_batch_size} micro batch x {data:g} data parallel x {steps:g}"
        f" accumulation steps{'; sequence parallel' if parallel.sequence_parallel else ''}"
    )


def _data_path(recipe: PretrainRecipe) -> tuple[str, ...]:
    """Megatron's --data-path: one prefix, or weights and prefixes in turn."""
    if recipe.dry_run:  # the data need not exist yet
        return recipe.data.data_path
    from train.data.blend import read_blend

    parts = read_blend(recipe.data.data_path)
    if len(parts) == 1:
        return (str(parts[0].prefix),)
    return tuple(word for part in parts for word in (f"{part.weight:.8g}", str(part.prefix)))


def _environment(
    recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder, found: checkout.Checkout
) -> dict[str, str]:
    environment = rank_environment(allocation, extensions_dir=run_folder.extensions_dir)
    environment["PYTHONPATH"] = checkout.python_path(found.path)
    if recipe.parallel.sequence_parallel:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # upstream refuses to overlap communication otherwise
    if allocation.device == "cuda" and recipe.parallel.tensor_parallel_size > 1:
        # what tensor ranks exchange is what the next kernels wait for: it goes first
        environment["TORCH_NCCL_HIGH_PRIORITY"] = os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "1")
    if recipe.checkpoint.async_save:
        # torch's large pages: the first touch of a checkpoint's copies takes less than half as long
        environment["THP_MEM_ALLOC_ENABLE"] = os.environ.get("THP_MEM_ALLOC_ENABLE", "1")
    if allocation.device == "cpu":
        # DeepSpeed's CPU accelerator takes this for the number of devices; its own launcher sets it, no other does
        environment["LOCAL_SIZE"] = str(allocation.processes_per_host)
    return environment
