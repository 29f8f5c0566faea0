"""DeepSpeed's JSON for Megatron-DeepSpeed, rendered from the recipe."""

from __future__ import annotations

from typing import Any

from train.recipe import PretrainRecipe


def deepspeed_config(recipe: PretrainRecipe) -> dict[str, Any]:
    """The configuration of a resolved recipe. Keys: https://www.deepspeed.ai/docs/config-json/.

    There is no optimizer block: Megatron makes the optimizer, whose state DeepSpeed then spreads.
    """
    training = recipe.training
    more: dict[str, Any] = {}
    if training.precision == "bf16":
        # Without immediate_grad_update the last micro batch is added after the gradients were reduced (DeepSpeed 7985).
        more["bf16"] = {"enabled": True, "immediate_grad_update": True}
        more["data_types"] = {"grad_accum_dtype": "fp32"}
        # By default gradients that were added up in fp32 are rounded to bf16 when the ranks reduce them, even one rank.
        more["communication_data_type"] = "fp32"
    elif training.precision == "fp16":
        more["fp16"] = {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2}
        more["fp16"] |= {"min_loss_scale": 1, "initial_scale_power": 11}
    if recipe.parallel.sequence_parallel:
        # By default tensor ranks send a part each of what they all have, which the next stage puts together. With their
        # own shares of the sequence that would mix up positions: no error, and a wrong loss.
        more["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_clipping": training.clip_grad,
        "zero_optimization": {"stage": recipe.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW is one
        "steps_per_print": max(recipe.train_steps, 1),  # its lines say what the progress lines say
        "wall_clock_breakdown": False,
        **more,
    }
