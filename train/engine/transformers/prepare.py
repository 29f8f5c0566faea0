"""What the transformers engine runs in every rank, and what keeps it from it."""

from __future__ import annotations

import importlib.util
import json

from train import settings
from train.cluster.allocation import Allocation
from train.cluster.ranks import rank_argv, rank_environment
from train.engine import whole_batches
from train.engine.transformers.deepspeed_config import deepspeed_config
from train.errors import refuse
from train.process import Command
from train.recipe import ModelSettings, PretrainRecipe
from train.run_folder import RunFolder


def prepare(recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder) -> Command:
    """The command that trains `recipe` on `allocation`, with the files it reads.

    Raises:
        UserError: batch and ranks do not fit each other.
    """
    refuse(problems(recipe, allocation))
    files = {run_folder.recipe: settings.to_yaml(recipe)}
    config = deepspeed_config(recipe, allocation)
    if config is not None:
        files[run_folder.deepspeed_config] = json.dumps(config, indent=2) + "\n"
    argv = [*rank_argv("train.engine.transformers.worker"), "--recipe", str(run_folder.recipe)]
    environment = rank_environment(allocation, extensions_dir=run_folder.extensions_dir)
    return Command(tuple(argv), environment, files=files)


def layout(recipe: PretrainRecipe, allocation: Allocation) -> str:
    """How ranks and batch divide, as an equation."""
    training, world = recipe.training, allocation.world_size
    steps = (training.global_batch_size or 0) / (training.micro_batch_size * world)
    return (
        f"world size {world} = {world} data parallel; global batch {training.global_batch_size} ="
        f" {training.micro_batch_size} micro batch x {world} ranks x {steps:g} accumulation steps"
    )


def problems(recipe: PretrainRecipe, allocation: Allocation) -> list[str]:
    """What this engine cannot do, and what does not fit between batch and ranks; empty when all does."""
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    found = [
        f"--{name} {getattr(parallel, name)} needs --engine megatron-deepspeed."
        for name in ("tensor_parallel_size", "pipeline_parallel_size")
        if getattr(parallel, name) > 1
    ]
    found += [
        f"--{name} needs --engine megatron-deepspeed."
        for name in ("layers_per_stage", "no_pipeline_parallel", "sequence_parallel", "megatron_arguments")
        # tensor ranks on GPUs split the sequence by themselves, so that it may be nobody's choice
        if getattr(parallel, name) and not (name == "sequence_parallel" and parallel.tensor_parallel_size > 1)
    ]
    if training.float8:
        found.append("--float8 needs --engine megatron-deepspeed.")
    if recipe.logging.log_optimizer_state:
        found.append("--log_optimizer_state needs --engine megatron-deepspeed.")
    if model.architecture == "gpt2" and model.rope_theta != ModelSettings.rope_theta:
        found.append(f"--rope_theta {model.rope_theta:g}: GPT-2 has learned positions, not rotary ones; leave it out.")
    if allocation.device == "cpu" and training.precision == "fp16":
        found.append("--precision fp16: on a CPU use fp32 or bf16.")
    if parallel.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        found.append("--attention flash_attention_2 needs the package flash-attn: install it, or use --attention sdpa.")
    if parallel.data_parallel_size not in (0, allocation.world_size):
        found.append(
            f"--data_parallel_size {parallel.data_parallel_size}: there are {allocation.world_size} ranks; start so"
            " many (a larger allocation, or --num_processes), or leave it out."
        )
    found += whole_batches.problems(training, allocation.world_size)
    return found
