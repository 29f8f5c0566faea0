"""What keeps Megatron-DeepSpeed from training a recipe on an allocation: all of it, before anything starts.

problems(recipe, allocation)          one line each, with the arithmetic and the way out
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from train.checkpoint.megatron import stages
from train.cluster.allocation import Allocation
from train.engine import whole_batches
from train.engine.megatron_deepspeed import float8_checks
from train.engine.megatron_deepspeed.patches import balanced_stages
from train.recipe import ModelSettings, PretrainRecipe


def problems(recipe: PretrainRecipe, allocation: Allocation) -> list[str]:
    """What does not fit between model, layout, batch and machine; empty when all does."""
    return [
        *_ranks(recipe, allocation),
        *_shares(recipe),
        *_layout(recipe),
        *_engine(recipe),
        *_machine(recipe, allocation),
        *float8_checks.problems(recipe, allocation),
    ]


def _ranks(recipe: PretrainRecipe, allocation: Allocation) -> Iterator[str]:
    """World size = TP x PP x DP, and the batch over DP."""
    training, parallel, world = recipe.training, recipe.parallel, allocation.world_size
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    equation = f"world size {world} = {tensor} tensor x {pipeline} pipeline x {world / (tensor * pipeline):g} data"
    wanted = parallel.data_parallel_size
    if wanted and world != tensor * pipeline * wanted:
        yield (
            f"{equation} parallel, but --data_parallel_size {wanted} needs {tensor * pipeline * wanted} ranks: start"
            " so many (a larger allocation, or --num_processes), or leave --data_parallel_size out."
        )
    if world % (tensor * pipeline):
        yield (
            f"{equation} parallel: data parallel must be whole; use --num_processes {tensor * pipeline} or a multiple."
        )
        return
    yield from whole_batches.problems(training, world // (tensor * pipeline))


def _shares(recipe: PretrainRecipe) -> Iterator[str]:
    """Every tensor rank and every pipeline stage needs a whole share of the model."""
    model, parallel = recipe.model, recipe.parallel
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    assert model.num_layers is not None
    for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "ffn_hidden_size"):
        value = getattr(model, name)
        if value % tensor and not (name == "num_key_value_heads" and value == model.num_attention_heads):
            yield (
                f"--{name} {value} / --tensor_parallel_size {tensor} = {value / tensor:g}: each tensor rank needs a"
                " whole share; change one of them."
            )
    yield from stages.problems(parallel.layers_per_stage, layers=model.num_layers, stages=pipeline)
    if balanced_stages.is_switched_off(os.environ) and (parallel.layers_per_stage or model.num_layers % pipeline):
        yield (
            f"TRAIN_DISABLED_PATCHES: without balanced-stages each of the {pipeline} pipeline stages has as many of the"
            f" {model.num_layers} layers, whole ones: leave the patch on, or change the layout."
        )
    if parallel.sequence_parallel and model.sequence_length % tensor:
        yield (
            f"--sequence_parallel: --sequence_length {model.sequence_length} / --tensor_parallel_size {tensor} ="
            f" {model.sequence_length / tensor:g}: each tensor rank needs a whole share of the sequence."
        )


def _layout(recipe: PretrainRecipe) -> Iterator[str]:
    training, parallel = recipe.training, recipe.parallel
    pipeline = parallel.pipeline_parallel_size
    if parallel.no_pipeline_parallel and pipeline > 1:
        yield f"--no_pipeline_parallel contradicts --pipeline_parallel_size {pipeline}: leave one of them out."
    if parallel.sequence_parallel and parallel.tensor_parallel_size == 1:
        yield "--sequence_parallel splits over the tensor ranks, and there is one: leave it out."
    if parallel.sequence_parallel and parallel.no_pipeline_parallel:
        yield (
            "--sequence_parallel --no_pipeline_parallel: upstream cuts the sequence twice there; leave one of them out"
            " (the pipeline module also runs with one stage)."
        )
    if parallel.zero_stage == 2 and not parallel.no_pipeline_parallel:
        yield (
            "--zero_stage 2: DeepSpeed's pipeline module sums gradients itself, which ZeRO-2 does too; add"
            " --no_pipeline_parallel, or use --zero_stage 1."
        )
    if parallel.zero_stage == 3:
        yield (
            "--zero_stage 3: this engine spreads layers by tensor and pipeline ranks instead; use --zero_stage 1, or"
            " --engine transformers."
        )
    if training.precision == "bf16" and parallel.zero_stage == 0:
        yield (
            "--precision bf16 --zero_stage 0: DeepSpeed accumulates bf16 gradients in fp32 only under ZeRO; use"
            " --zero_stage 1."
        )


def _engine(recipe: PretrainRecipe) -> Iterator[str]:
    """What only the other engine does."""
    model, parallel = recipe.model, recipe.parallel
    if parallel.offload != "none":
        yield f"--offload {parallel.offload}: only --engine transformers offloads."
    if parallel.torch_compile:
        yield "--torch_compile: only --engine transformers compiles the whole model; this one compiles its parts."
    if model.architecture == "gpt2" and model.rope_theta != ModelSettings.rope_theta:
        yield f"--rope_theta {model.rope_theta:g}: GPT-2 has learned positions, not rotary ones; leave it out."
    if not float(model.rope_theta).is_integer():
        yield f"--rope_theta {model.rope_theta}: Megatron-DeepSpeed takes whole numbers."


def _machine(recipe: PretrainRecipe, allocation: Allocation) -> Iterator[str]:
    if allocation.device == "cpu":
        if recipe.model.dropout > 0:
            yield (
                f"--dropout {recipe.model.dropout}: on a CPU the tensor ranks would drop different values and drift"
                " apart; use --dropout 0."
            )
        if recipe.training.precision == "fp16":
            yield "--precision fp16: on a CPU use fp32, or bf16 with --zero_stage 1."
        if recipe.parallel.attention == "flash_attention_2":
            yield "--attention flash_attention_2 needs a GPU: on a CPU leave --attention at sdpa."
    elif recipe.parallel.attention == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            yield (
                "--attention flash_attention_2: flash-attn is not installed; leave --attention at sdpa, which is"
                " torch's own flash attention, or run scripts/common/install_megatron_deepspeed.sh --with_flash_attn."
            )
        if recipe.training.precision == "fp32":
            yield "--attention flash_attention_2 computes in bf16 or fp16 only: use --attention sdpa with fp32."
