"""Megatron-DeepSpeed's launch: checks, the rendered command, and one worker per rank."""

from __future__ import annotations

import importlib.util
import json

from train import settings
from train.cluster.allocation import Allocation
from train.cluster.ranks import rank_environment, torchrun
from train.engine.megatron_deepspeed import checkout
from train.engine.megatron_deepspeed.arguments import megatron_arguments
from train.engine.megatron_deepspeed.deepspeed_config import deepspeed_config
from train.errors import UserError, refuse
from train.process import Command
from train.recipe import ModelSettings, ParallelSettings, PretrainRecipe
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
    files = {
        run_folder.recipe: settings.to_yaml(recipe),
        run_folder.deepspeed_config: json.dumps(deepspeed_config(recipe), indent=2) + "\n",
    }
    argv = torchrun("train.engine.megatron_deepspeed.worker", allocation)
    argv += ["--recipe", str(run_folder.recipe), "--engine_commit", found.commit, "--", *arguments]
    return Command(tuple(argv), _environment(allocation, run_folder, found), files=files)


def layout(recipe: PretrainRecipe, allocation: Allocation) -> str:
    """How ranks and batch divide, as an equation."""
    training, parallel, world = recipe.training, recipe.parallel, allocation.world_size
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    data = world / (tensor * pipeline)
    steps = (training.global_batch_size or 0) / (training.micro_batch_size * data)
    return (
        f"world size {world} = {tensor} tensor x {pipeline} pipeline x {data:g} data parallel; global batch"
        f" {training.global_batch_size} = {training.micro_batch_size} micro batch x {data:g} data parallel x {steps:g}"
        " accumulation steps"
    )


def problems(recipe: PretrainRecipe, allocation: Allocation) -> list[str]:
    """What does not fit between model, layout, batch and machine; empty when all does."""
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    tensor, pipeline, world = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, allocation.world_size
    assert model.num_attention_heads and model.hidden_size and model.ffn_hidden_size and model.num_layers
    found = []
    if model.architecture != "gpt2":
        found.append(f"--architecture {model.architecture}: this engine trains gpt2 here; use --engine transformers.")
    if world % (tensor * pipeline):
        found.append(
            f"world size {world} = {tensor} tensor x {pipeline} pipeline x {world / (tensor * pipeline):g} data"
            f" parallel: data parallel must be whole; use --num_processes {tensor * pipeline} or a multiple."
        )
    else:
        per_pass = training.micro_batch_size * (world // (tensor * pipeline))
        assert training.global_batch_size is not None
        if training.global_batch_size % per_pass:
            found.append(
                f"--global_batch_size {training.global_batch_size} is not a multiple of --micro_batch_size"
                f" {training.micro_batch_size} x {world // (tensor * pipeline)} data parallel ranks = {per_pass}:"
                " change one of them."
            )
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("hidden_size", model.hidden_size),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tensor:
            found.append(
                f"--{name} {value} / --tensor_parallel_size {tensor} = {value / tensor:g}: each tensor rank needs a"
                " whole share; change one of them."
            )
    if model.num_layers % pipeline:
        found.append(
            f"--num_layers {model.num_layers} / --pipeline_parallel_size {pipeline} = {model.num_layers / pipeline:g}:"
            " each pipeline stage needs a whole number of layers; change one of them."
        )
    if parallel.no_pipeline_parallel and pipeline > 1:
        found.append(f"--no_pipeline_parallel contradicts --pipeline_parallel_size {pipeline}: leave one of them out.")
    if parallel.sequence_parallel:
        found.append(
            "--sequence_parallel: upstream at the pinned commit looks positions up beyond each rank's share of its"
            " learned position embedding; leave it out."
        )
    if parallel.zero_stage > 1:
        found.append(f"--zero_stage {parallel.zero_stage}: this engine runs 0 or 1 here.")
    if parallel.offload != "none":
        found.append(f"--offload {parallel.offload}: only --engine transformers offloads.")
    if parallel.attention != ParallelSettings.attention:
        found.append(f"--attention {parallel.attention}: only --engine transformers has a choice of attention kernels.")
    if model.architecture == "gpt2" and model.rope_theta != ModelSettings.rope_theta:
        found.append(f"--rope_theta {model.rope_theta:g}: GPT-2 has learned positions, not rotary ones; leave it out.")
    if parallel.torch_compile:
        found.append("--torch_compile: only --engine transformers compiles the model.")
    if training.precision == "bf16" and parallel.zero_stage == 0:
        found.append(
            "--precision bf16 --zero_stage 0: DeepSpeed accumulates bf16 gradients in fp32 only under ZeRO; use"
            " --zero_stage 1."
        )
    return found + _machine_problems(recipe, allocation)


def _machine_problems(recipe: PretrainRecipe, allocation: Allocation) -> list[str]:
    found = []
    if allocation.device == "cpu":
        if recipe.model.dropout > 0:
            found.append(
                f"--dropout {recipe.model.dropout}: on a CPU the tensor ranks would drop different values and drift"
                " apart; use --dropout 0."
            )
        if recipe.training.precision == "fp16":
            found.append("--precision fp16: on a CPU use fp32, or bf16 with --zero_stage 1.")
    elif importlib.util.find_spec("apex") is None:
        found.append(
            "on CUDA this engine needs apex, which is not installed: install it, or use --engine transformers or"
            " --device cpu."
        )
    return found


def _data_path(recipe: PretrainRecipe) -> tuple[str, ...]:
    """Megatron's --data-path: one prefix, or weights and prefixes in turn."""
    if recipe.dry_run:  # the data need not exist yet
        return recipe.data.data_path
    from train.data.blend import read_blend

    parts = read_blend(recipe.data.data_path)
    if len(parts) == 1:
        return (str(parts[0].prefix),)
    return tuple(word for part in parts for word in (f"{part.weight:.8g}", str(part.prefix)))


def _environment(allocation: Allocation, run_folder: RunFolder, found: checkout.Checkout) -> dict[str, str]:
    environment = rank_environment(allocation, extensions_dir=run_folder.extensions_dir)
    environment["PYTHONPATH"] = checkout.python_path(found.path)
    if allocation.device == "cpu":
        # DeepSpeed's CPU accelerator takes this for the number of devices; its own launcher sets it, torchrun does not
        environment["LOCAL_SIZE"] = str(allocation.processes_per_host)
    return environment
