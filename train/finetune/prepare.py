"""Tokenizer, chat template, examples and plan, written to the unfinished folder before any rank starts."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from train import settings as settings_module
from train.cluster.allocation import Allocation
from train.errors import refuse
from train.finetune import base_model, batch, command, data_settings, methods, tokenizer_files
from train.finetune.account import Account
from train.finetune.find_inputs import Inputs
from train.finetune.folder import FinetuneFolder, Plan
from train.finetune.settings import FinetuneSettings
from train.monitor import wandb_run


@dataclass(frozen=True)
class Prepared:
    """What is ready for the ranks.

    Attributes:
        plan: what they read.
        account: what became of the records that are trained on.
        eval_account: the same of the held-out ones; None without any.
    """

    plan: Plan
    account: Account
    eval_account: Account | None


def prepare(
    settings: FinetuneSettings, found: Inputs, where: Allocation, folder: FinetuneFolder, resume_from: Path | None
) -> Prepared:
    """Tokenizer, chat template, examples and plan, in the unfinished folder. What is wrong with the data ends here."""
    from transformers.utils import logging

    from train.finetune import chat_template, examples, masks

    logging.set_verbosity_error()  # it warns of long examples, which are cut and counted here
    tokenizer_files.copy(found.tokenizer_dir, folder.tokenizer_dir)
    tokenizer = tokenizer_files.load(folder.tokenizer_dir)
    added = 0
    if settings.additional_special_tokens:
        added = tokenizer_files.add_tokens(folder.tokenizer_dir, settings.additional_special_tokens)
        tokenizer = tokenizer_files.load(folder.tokenizer_dir)
    refuse(
        base_model.fit_problems(found.model_dir, tokenizer, max_seq_length=settings.max_seq_length, added_tokens=added)
    )
    refuse(methods.added_token_problems(settings, found.model_dir, added))
    template, notice = chat_template.choose(
        tokenizer,
        instruction_template=settings.instruction_template,
        response_template=settings.response_template,
        prompt=data_settings.prompt_of(settings),
    )
    tokenizer.chat_template = template
    (folder.tokenizer_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    foreign = tokenizer_files.foreign_note(tokenizer, found.model_dir) if settings.tokenizer_name_or_path else None
    for note in filter(None, (foreign, notice)):
        print(f"note: {note}")
    account, eval_account = examples.prepare_all(
        tokenizer, found.sources, settings, folder.train_examples, folder.eval_examples
    )
    if not settings.packing:  # how many sequences packing makes, only the ranks know
        refuse(batch.problems(settings, where.world_size, account.examples))
    print(account.summary())
    if account.shown:
        masks.print_examples(tokenizer, account.shown, stream=sys.stdout)
    if found.eval_files:
        eval_account = examples.prepare(tokenizer, found.eval_files, settings, folder.eval_examples)
    if eval_account is not None:
        print(f"held out: {eval_account.summary()}")
    if small := batch.small_set_note(settings, where.world_size, account.examples):
        print(f"note: {small}")
    if found.deepspeed is not None:
        shutil.copyfile(found.deepspeed, folder.deepspeed_config)
    plan = Plan(
        finetune=_with_wandb_group(settings),
        model_dir=found.model_dir,
        device=where.device,
        base_name=settings.model_name_or_path if found.base_model_on_hub else str(found.model_dir),
        deepspeed_config=command.deepspeed_file(settings, folder),
        zero_stage=settings.zero_stage if found.deepspeed is None else command.zero_stage(found.deepspeed),
        resume_from=resume_from,
        added_tokens=added,
    )
    folder.plan.write_text(settings_module.to_yaml(plan), encoding="utf-8")
    folder.recipe.write_text(settings_module.to_yaml(settings), encoding="utf-8")
    return Prepared(plan, account, eval_account)


def _with_wandb_group(settings: FinetuneSettings) -> FinetuneSettings:
    """Names the W&B group here, once, so that all nodes land in the same one."""
    if not settings.use_wandb or settings.wandb_group:
        return settings
    name = Path(settings.model_name_or_path).name
    return dataclasses.replace(settings, wandb_group=wandb_run.group_name("finetune", name, socket.gethostname()))
