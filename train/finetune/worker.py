"""What runs in each rank of a finetuning. `train.finetune.launch` starts it; people do not.

python -m train.finetune.worker --output_dir OUTPUT          (or through torch.distributed.run)

It reads `plan.yaml` in the run's unfinished folder and leaves the model, the live model's logits on a fixed batch, and
an outcome there.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, cast

from train import deepspeed_ops, early_end, outcome, rank_end
from train import settings as settings_module
from train.errors import UserError, first_line, refuse
from train.finetune import batch, lora, methods, modules, trainer_arguments
from train.finetune.folder import FinetuneFolder, Plan
from train.monitor import step_profile, wandb_run


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
        with folder.named_in_errors():
            train(plan, folder)
    except early_end.EndedEarlyError:
        raise
    except ImportError as error:
        if not plan.finetune.trainer_arguments:
            raise
        given = " ".join(plan.finetune.trainer_arguments)
        raise UserError(f"--trainer_arguments {given}: {first_line(error)}") from error
    except Exception:
        folder.remove_half_written()  # on a full disk the report needs room itself
        raise


def train(plan: Plan, folder: FinetuneFolder) -> None:
    """Trains, from the plan's checkpoint if it names one, and saves.

    Raises:
        EndedEarlyError: it was asked to end early. There is a checkpoint, and no model yet.
    """
    import datasets
    from transformers import AutoTokenizer, EarlyStoppingCallback, PrinterCallback
    from transformers.utils import logging

    from train.early_end_callback import SaveAndEnd
    from train.finetune import special_ids
    from train.finetune import trainer as trainers
    from train.finetune.progress import Reporting
    from train.finetune.sample_answers import SampleAnswers
    from train.monitor.step_profile_callback import RecordStep

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters is checked, counted or raised here, in words that name our flags
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' affair: hundreds under DeepSpeed
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard_dir)
    arguments = trainer_arguments.build(
        plan.finetune,
        folder,
        device=plan.device,
        deepspeed_config=plan.deepspeed_config,
        is_resumed=plan.resume_from is not None,
    )
    if plan.deepspeed_config is not None:
        deepspeed_ops.prepare_rank(plan.device)
    early = early_end.begin(os.environ)
    tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer_dir, local_files_only=True)
    special = special_ids.of(tokenizer)
    model = load_model(plan, tokenizer)
    wandb = wandb_run.start(
        plan.finetune,
        run_name=Path(plan.finetune.model_name_or_path).name,
        kind="finetune",
        config=settings_module.to_plain(plan.finetune),
        dir=folder.root,
    )
    prompts = plan.finetune.sample_prompts
    reporting = Reporting(folder.metrics, wandb)
    profile = step_profile.of_this_rank(folder.profile_dir, plan.finetune.profile_step)
    trainer = trainers.FinetuneTrainer(
        folder=folder,
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=_examples(folder.train_examples),
        eval_dataset=_examples(folder.eval_examples) if plan.finetune.evaluates else None,
        callbacks=[
            *([RecordStep(profile, reporting.pause)] if profile else []),
            reporting,
            *([EarlyStoppingCallback(patience)] if (patience := plan.finetune.early_stopping_patience) else []),
            *([SampleAnswers(folder.samples, tokenizer, prompts)] if prompts else []),
            SaveAndEnd(early, at_last_step=True),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    rows = len(cast(Sized, trainer.train_dataset))  # packing has made fewer of them
    refuse(batch.problems(plan.finetune, trainer.accelerator.num_processes, rows))
    trainer.train(resume_from_checkpoint=None if plan.resume_from is None else str(plan.resume_from))
    if early.reason is not None:
        if wandb is not None:
            wandb.finish()
        raise early_end.EndedEarlyError(trainer.state.global_step, early.reason)
    if plan.finetune.evaluates and _is_unevaluated(trainer):
        trainer.evaluate()
    trainers.write_golden_logits(trainer, folder.golden_logits)
    trainers.save(trainer, folder, special)
    if wandb is not None:
        wandb.finish()


def load_model(plan: Plan, tokenizer: Any) -> Any:
    """The base model, spread over the ranks under ZeRO-3, of which the chosen weights are trained.

    DeepSpeed keeps its own float32 copy of the 16-bit weights it trains; without it trained weights themselves stay
    float32 and only the computation is in 16 bits. The base of a LoRA is not trained: it takes half the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings, method = plan.finetune, methods.of(plan.finetune)
    dtype = torch.float32
    if (plan.deepspeed_config is not None or method == "lora") and (settings.bf16 or settings.fp16):
        dtype = torch.bfloat16 if settings.bf16 else torch.float16
    quantization = lora.quantization(settings)
    device_map: Any = settings.device_map
    if quantization is not None and device_map is None:
        device_map = {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        plan.model_dir,
        dtype=dtype,
        attn_implementation="flash_attention_2" if settings.use_flash_attention_2 else None,
        local_files_only=True,
        **({} if device_map is None else {"device_map": device_map}),
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    if plan.added_tokens and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if method == "partial":
        modules.train_only(settings.trainables, model)
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()  # re-entrant checkpointing asks its input for gradients
    if method == "lora":
        model = lora.wrap(model, settings, base_name=plan.base_name, zero_stage=plan.zero_stage)
    return model


def _is_unevaluated(trainer: Any) -> bool:
    """Whether the weights that come out have no held-out loss yet; the best ones had theirs at an earlier step."""
    last = trainer.state.log_history[-1].get("step")
    return last != trainer.state.global_step or trainer.state.best_global_step not in (None, last)


def _examples(file: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(file))


if __name__ == "__main__":
    rank_end.run(main)
