#!/usr/bin/env python3
"""Finetuning with TRL alone, as its documentation writes it: what `finetune_throughput.py` holds step 4 against.

Needs nothing of this project. For several processes: torchrun --nproc_per_node N plain_trl.py ...

The DeepSpeed configuration is the ZeRO-3 example of https://huggingface.co/docs/transformers/deepspeed without offload
and, as in TRL's own deepspeed_zero3.yaml, without an optimizer block, so that both sides use torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ZERO_3 = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes a JSON object for each line that the trainer logs, and one for the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder with a tokenizer and a chat template")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl file with `messages`")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for metrics.jsonl and the trainer")
    parser.add_argument("--max_length", type=int, required=True, help="longest example, in tokens")
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--per_device_train_batch_size", type=int, required=True)
    parser.add_argument("--gradient_accumulation_steps", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--logging_steps", type=int, required=True)
    parser.add_argument("--gradient_checkpointing", choices=("True", "False"), required=True)
    parser.add_argument("--dtype", required=True, help="of the weights as loaded: float32 or bfloat16")
    parser.add_argument("--lora_rank", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--lora_alpha", type=int, default=0)
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--zero_stage", type=int, choices=(0, 3), default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    train(parser.parse_args(argv))
    return 0


def train(wanted: argparse.Namespace) -> None:
    """SFTTrainer with what the flags say, and defaults for all else."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if wanted.device == "cuda" and torch.cuda.device_count() <= int(os.environ.get("LOCAL_RANK", "0")):
        raise SystemExit(f"torch finds {torch.cuda.device_count()} GPUs, too few for the processes: see nvidia-smi.")
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=wanted.lora_rank,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        target_modules="all-linear",
    )
    arguments = SFTConfig(
        output_dir=str(wanted.output_dir / "trainer"),
        max_length=wanted.max_length,
        max_steps=wanted.max_steps,
        per_device_train_batch_size=wanted.per_device_train_batch_size,
        gradient_accumulation_steps=wanted.gradient_accumulation_steps,
        learning_rate=wanted.learning_rate,
        bf16=True,
        gradient_checkpointing=wanted.gradient_checkpointing == "True",
        assistant_only_loss=True,
        model_init_kwargs={"dtype": wanted.dtype},
        deepspeed=ZERO_3 if wanted.zero_stage == 3 else None,
        use_cpu=wanted.device == "cpu",
        logging_steps=wanted.logging_steps,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=str(wanted.model),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(wanted.data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(wanted.model),
        peft_config=adapter if wanted.lora_rank else None,
        callbacks=[measuring(wanted.output_dir / "metrics.jsonl")],
    )
    trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measuring(metrics: Path) -> Any:
    """A callback that writes what the trainer logs, with the seconds since it last did, and each time the memory."""
    from transformers import TrainerCallback

    class Measuring(TrainerCallback):
        began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            now = time.monotonic()  # the trainer has just read the loss: all that went before is computed
            memory = peak_memory(args.device)
            if state.is_world_process_zero:
                record = {"step": state.global_step, "loss": logs["loss"], "tokens": int(logs["num_tokens"])}
                with metrics.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({**record, "seconds": now - self.began, **memory}) + "\n")
            self.began = time.monotonic()

    return Measuring()


def peak_memory(device: Any) -> dict[str, float]:
    """The most GPU memory that any rank has reserved and allocated so far, in GiB; empty on a CPU."""
    import torch

    if device.type != "cuda":
        return {}
    peaks = [torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()]
    if torch.distributed.is_initialized():
        of_all = torch.tensor(peaks, device=device)
        torch.distributed.all_reduce(of_all, op=torch.distributed.ReduceOp.MAX)
        peaks = of_all.tolist()
    reserved, allocated = (round(value / 2**30, 2) for value in peaks)
    return {"gpu_memory_gib": reserved, "gpu_memory_allocated_gib": allocated}


if __name__ == "__main__":
    raise SystemExit(main())
