"""What runs in each rank of a finetuning. `train.finetune.launch` starts it; people do not.

python -m train.finetune.worker --output_dir OUTPUT          (or through torch.distributed.run)

It reads `plan.yaml` in the run's unfinished folder and leaves the model, the live model's logits on a fixed batch, and
an outcome there.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import deepspeed_ops, early_end, outcome
from train import settings as settings_module
from train.finetune.folder import FinetuneFolder, Plan
from train.monitor import wandb_run


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the plan says and reports how it ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    folder = FinetuneFolder(parser.parse_args(argv).output_dir)
    plan = settings_module.build(Plan, settings_module.read_yaml(folder.plan))
    leads = os.environ.get("RANK", "0") == "0"
    return outcome.record(folder.outcome, lambda: _train(plan, folder), leads=leads)


def _train(plan: Plan, folder: FinetuneFolder) -> None:
    try:
        train(plan, folder)
    except early_end.EndedEarlyError:
        raise
    except Exception:
        folder.remove_half_written()  # on a full disk the report needs room itself
        raise


def train(plan: Plan, folder: FinetuneFolder) -> None:
    """Trains, from the plan's checkpoint if it names one, and saves.

    Raises:
        EndedEarlyError: it was asked to end early. There is a checkpoint, and no model yet.
    """
    import datasets
    from transformers import AutoTokenizer, PrinterCallback
    from transformers.utils import logging

    from train.early_end_callback import SaveAndEnd
    from train.finetune import trainer as trainers
    from train.finetune.progress import Reporting

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' affair: hundreds under DeepSpeed
    arguments = training_arguments(plan, folder)
    if plan.deepspeed_config is not None:
        deepspeed_ops.prepare_rank(plan.device)
    early = early_end.begin(os.environ)
    tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer_dir, local_files_only=True)
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = load_model(plan, tokenizer)
    wandb = wandb_run.start(
        plan.finetune,
        run_name=Path(plan.finetune.model_name_or_path).name,
        kind="finetune",
        config=settings_module.to_plain(plan.finetune),
        dir=folder.root,
    )
    trainer = trainers.FinetuneTrainer(
        folder=folder,
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=_examples(folder.train_examples),
        eval_dataset=_examples(folder.eval_examples) if plan.finetune.eval_data_files else None,
        callbacks=[Reporting(folder.metrics, wandb), SaveAndEnd(early, at_last_step=True)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if plan.resume_from is None else str(plan.resume_from))
    if early.reason is not None:
        if wandb is not None:
            wandb.finish()
        raise early_end.EndedEarlyError(trainer.state.global_step, early.reason)
    if plan.finetune.eval_data_files and trainer.state.log_history[-1].get("step") != trainer.state.global_step:
        trainer.evaluate()
    _agree_on_special_tokens(trainer.model, special_ids)
    trainers.write_golden_logits(trainer, folder.golden_logits)
    trainers.save(trainer, folder)
    if wandb is not None:
        wandb.finish()


def training_arguments(plan: Plan, folder: FinetuneFolder) -> Any:
    """The settings as TRL has them, for this rank."""
    from trl import SFTConfig

    settings = plan.finetune
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard_dir)
    eval_strategy = ("steps" if settings.eval_steps else "epoch") if settings.eval_data_files else "no"
    return SFTConfig(
        output_dir=str(folder.checkpoint_dir),
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,  # a number below 1 is a part of all steps
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True} if plan.deepspeed_config else {"use_reentrant": False},
        max_length=settings.max_seq_length,
        packing=settings.packing,
        eval_packing=False,
        # Tokenized, masked and cut already; only packing is left to do.
        dataset_kwargs=None if settings.packing else {"skip_prepare_dataset": True},
        completion_only_loss=False,
        assistant_only_loss=False,
        use_cpu=plan.device == "cpu",
        deepspeed=str(plan.deepspeed_config) if plan.deepspeed_config else None,
        ddp_find_unused_parameters=False,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would show NaN as 0
        eval_strategy=eval_strategy,
        eval_on_start=eval_strategy != "no" and plan.resume_from is None,
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_total_limit,
        report_to=["tensorboard"],
        disable_tqdm=True,
    )


def load_model(plan: Plan, tokenizer: Any) -> Any:
    """The base model, spread over the ranks under ZeRO-3.

    DeepSpeed keeps its own float32 copy of 16-bit weights; without it the weights themselves stay float32 and only the
    computation is in 16 bits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = plan.finetune
    dtype = torch.float32
    if plan.deepspeed_config is not None and (settings.bf16 or settings.fp16):
        dtype = torch.bfloat16 if settings.bf16 else torch.float16
    model: Any = AutoModelForCausalLM.from_pretrained(
        plan.model_dir,
        dtype=dtype,
        attn_implementation="flash_attention_2" if settings.use_flash_attention_2 else None,
        local_files_only=True,
    )
    if plan.added_tokens and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return model


def _examples(file: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(file))


def _agree_on_special_tokens(model: Any, special_ids: dict[str, int | None]) -> None:
    """Makes the model's configurations name the tokenizer's special tokens: generation stops where training did.

    TRL writes its padding token into the configuration; and base models are found whose files disagree.
    """
    for name, token_id in special_ids.items():
        setattr(model.config, name, token_id)
        former = getattr(model.generation_config, name)
        if name == "eos_token_id" and isinstance(former, list):
            setattr(model.generation_config, name, former if token_id in former else [token_id, *former])
        else:
            setattr(model.generation_config, name, token_id)


if __name__ == "__main__":
    raise SystemExit(main())
