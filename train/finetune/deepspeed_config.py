"""DeepSpeed's JSON for finetuning, rendered from the settings.

Keys: https://www.deepspeed.ai/docs/config-json/. "auto" is filled in by transformers from its own arguments, so that
every number is stated once. There is no optimizer block: transformers makes torch's AdamW, and nothing has to be
compiled for it.
"""

from __future__ import annotations

from typing import Any


def build(zero_stage: int, *, device: str, offload: str = "none") -> dict[str, Any]:
    """The configuration of ZeRO 2 or 3 on `device` ("cuda" or "cpu").

    Args:
        zero_stage: 2 or 3.
        device: where the computation is.
        offload: what is kept in the CPU's memory: none, optimizer, or all, which is ZeRO-3's weights too.
    """
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": device == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # without it no weights are saved
        }
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if offload != "none":
        kept = {"device": "cpu", "pin_memory": device == "cuda"}
        zero |= {"offload_optimizer": kept} | ({"offload_param": kept} if offload == "all" else {})
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW does it as well, and wants no compiler
    return config
