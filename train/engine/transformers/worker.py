"""What runs in each rank of the transformers engine. prepare.py starts it; people do not.

python -m torch.distributed.run ... -m train.engine.transformers.worker --recipe RESOLVED.yaml
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import deepspeed_ops, early_end, outcome, rank_end, settings
from train.checkpoint_folders import remove_leftovers
from train.data.blend import read_blend
from train.data.gpt_dataset import GPTDataset
from train.engine.transformers import compilation
from train.monitor import step_profile, wandb_run
from train.monitor.progress import Progress
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the recipe and reports how it ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    recipe = settings.build(PretrainRecipe, settings.read_yaml(parser.parse_args(argv).recipe))
    run_folder = RunFolder.of(recipe)
    leads = os.environ.get("RANK", "0") == "0"

    def body() -> None:
        try:
            pretrain(recipe, run_folder)
        except early_end.EndedEarlyError:
            raise
        except Exception:
            if leads:  # on a full disk this makes room for the report of it
                remove_leftovers(run_folder.checkpoint_dir)
            raise

    return outcome.record(run_folder.outcome, body, leads=leads)


def pretrain(recipe: PretrainRecipe, run_folder: RunFolder) -> None:
    """Trains from the newest whole checkpoint, or from scratch, to the last step.

    Raises:
        EndedEarlyError: it was asked to end early, and has saved.
    """
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from train.early_end_callback import SaveAndEnd
    from train.engine.transformers.model import build_model, read_vocabulary
    from train.engine.transformers.trainer import PretrainTrainer, ProgressCallback, TokenSequences
    from train.monitor.step_profile_callback import RecordStep

    transformers_logging.disable_progress_bar()
    arguments = training_arguments(recipe, run_folder)
    if arguments.deepspeed:
        deepspeed_ops.prepare_rank(arguments.device.type)
    leads = arguments.process_index == 0
    early = early_end.begin(os.environ)
    start = run_folder.latest_step()
    train_set, evaluation_set = datasets(recipe)
    model = build_model(recipe, read_vocabulary(recipe.data.input_tokenizer_file))
    if leads:
        parameters = sum(weight.numel() for weight in model.parameters())
        print(f"{recipe.model_name}: {parameters:,} parameters, {recipe.train_steps:,} steps", flush=True)
    is_compiled, note = compilation.settle(recipe)
    if note and leads:
        print(note, flush=True)
    elif note and not is_compiled and arguments.local_process_index == 0:  # the others wait for such a node's ranks
        print(f"{socket.gethostname()}: {note}", flush=True)
    progress = None
    if leads:
        progress = Progress(
            run_folder.metrics,
            total_steps=recipe.train_steps,
            tokens_per_step=recipe.tokens_per_step,
            first_step=start or 0,
        )
    watched = wandb_run.start(
        recipe.logging,
        run_name=recipe.model_name,
        kind="pretrain",
        config=settings.to_plain(recipe),
        dir=run_folder.root,
    )
    profile = step_profile.of_this_rank(run_folder.profile_dir, recipe.logging.profile_step)
    pause = progress.pause if progress is not None else lambda _: None
    trainer = PretrainTrainer(
        recipe=recipe,
        run_folder=run_folder,
        model=model,
        args=arguments,
        train_dataset=TokenSequences(train_set),
        eval_dataset=None if evaluation_set is None else TokenSequences(evaluation_set),
        callbacks=[
            ProgressCallback(run_folder, progress, watched),
            *([RecordStep(profile, pause)] if profile else []),
            SaveAndEnd(early),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if start is None else str(run_folder.step_dir(start)))
    if watched is not None:
        watched.finish()
    if early.reason is not None:
        raise early_end.EndedEarlyError(trainer.state.global_step, early.reason)


def datasets(recipe: PretrainRecipe) -> tuple[GPTDataset, GPTDataset | None]:
    """The training sequences of the whole run, and the held-out ones of one evaluation (None when switched off)."""
    batch, checkpoint = recipe.training.global_batch_size, recipe.checkpoint
    assert batch is not None
    parts = read_blend(recipe.data.data_path)

    def sequences(subset: str, sample_count: int) -> GPTDataset:
        return GPTDataset(
            parts,
            split=recipe.data.split,
            subset=subset,
            sequence_length=recipe.model.sequence_length,
            sample_count=sample_count,
            seed=recipe.training.seed,
        )

    evaluates = checkpoint.eval_interval > 0 and checkpoint.eval_iters > 0
    held_out = sequences("valid", checkpoint.eval_iters * batch) if evaluates else None
    return sequences("train", recipe.train_steps * batch), held_out


def training_arguments(recipe: PretrainRecipe, run_folder: RunFolder) -> Any:
    """The recipe as transformers' TrainingArguments, for this rank."""
    from transformers import TrainingArguments

    training, parallel, checkpoint = recipe.training, recipe.parallel, recipe.checkpoint
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    assert training.global_batch_size is not None and training.lr is not None
    evaluates = checkpoint.eval_interval > 0 and checkpoint.eval_iters > 0
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_folder.tensorboard_dir)
    return TrainingArguments(
        output_dir=str(run_folder.checkpoint_dir),
        max_steps=recipe.train_steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.global_batch_size // (training.micro_batch_size * world_size),
        learning_rate=training.lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.clip_grad,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        activation_checkpointing=bool(parallel.activation_checkpoint),
        activation_checkpointing_kwargs={"use_reentrant": parallel.zero_stage == 3},
        torch_compile=compilation.settle(recipe)[0],
        use_cpu=os.environ.get("DS_ACCELERATOR") == "cpu",
        deepspeed=str(run_folder.deepspeed_config) if parallel.zero_stage else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        seed=training.seed,
        logging_steps=recipe.logging.log_interval,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would show NaN as 0
        save_steps=checkpoint.save_interval,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=checkpoint.eval_interval if evaluates else None,
        report_to=["tensorboard"],
        disable_tqdm=True,
    )


if __name__ == "__main__":
    rank_end.run(main)
