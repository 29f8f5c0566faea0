"""DeepSpeed's JSON for the transformers engine, rendered from the recipe."""

from __future__ import annotations

from typing import Any

from train.cluster.allocation import Allocation
from train.recipe import PretrainRecipe


def deepspeed_config(recipe: PretrainRecipe, allocation: Allocation) -> dict[str, Any] | None:
    """The configuration, or None when plain data parallelism does: ZeRO 0 without offload.

    Keys: https://www.deepspeed.ai/docs/config-json/. There is no optimizer block: transformers makes torch's AdamW,
    whose state DeepSpeed then spreads, and nothing has to be compiled.
    """
    training, parallel = recipe.training, recipe.parallel
    if parallel.zero_stage == 0:
        return None
    assert training.global_batch_size is not None
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": allocation.device == "cuda",
        "contiguous_gradients": True,
    }
    if parallel.zero_stage == 3:
        # without it a ZeRO-3 save holds no weights
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    memory = {"device": "cpu", "pin_memory": allocation.device == "cuda"}
    if parallel.offload != "none":
        zero["offload_optimizer"] = memory
    if parallel.offload == "all":
        zero["offload_param"] = memory
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size
        // (training.micro_batch_size * allocation.world_size),
        "gradient_clipping": training.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW works offloaded too, without compiling DeepSpeed's
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
    }
