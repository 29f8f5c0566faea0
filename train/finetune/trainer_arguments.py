"""The settings as TRL's SFTConfig has them, and --trainer_arguments, which hands it more.

    SFTConfig(**own(settings, folder, device="cpu", deepspeed_config=None, is_resumed=False), **given(settings))

Every argument has one source: what a setting or the launcher decides is refused in --trainer_arguments.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.errors import UserError, first_line
from train.finetune import methods
from train.finetune.folder import FinetuneFolder
from train.finetune.settings import FinetuneSettings

# The launcher's own affair by their meaning, though it leaves them as they are: where from and where to, what the data
# is, how the model is loaded and spread, and the Hub, whose token would stand in files and logs.
_NOT_TO_SET = (
    *("hub_", "push_to_hub", "dataset_", "fsdp", "do_", "deepspeed", "ddp_", "accelerator_config", "ignore_data_skip"),
    *("model_init_kwargs", "trust_remote_code", "chat_template_path", "eos_token", "pad_token", "truncation_mode"),
    *("run_name", "project", "trackio_", "resume_from_checkpoint", "save_only_model", "save_on_each_node"),
    *("remove_unused_columns", "label_names", "data_seed", "padding_free", "shuffle_dataset"),
)
# What their owner is called here.
_OUR_NAMES = {"warmup_steps": "warmup_ratio", "max_length": "max_seq_length", "use_cpu": "device"}
_OF_THE_GPU = ("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")  # a login node has none
_OF_BITSANDBYTES = re.compile("bnb|^adamw_8bit|^ademamix|^lion|^paged")  # optimizers
_OUR_NAMES |= {"load_best_model_at_end": "keep_best"}


def own(
    settings: FinetuneSettings, folder: FinetuneFolder, *, device: str, deepspeed_config: Path | None, is_resumed: bool
) -> dict[str, Any]:
    """The arguments that settings and launcher decide."""
    eval_strategy = ("steps" if settings.eval_steps else "epoch") if settings.evaluates else "no"
    save_strategy = "steps" if settings.save_steps else "no"
    return {
        "output_dir": str(folder.checkpoint_dir),
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup_ratio,  # a number below 1 is a part of all steps
        "lr_scheduler_type": settings.lr_scheduler_type,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "bf16": settings.bf16,
        "fp16": settings.fp16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": _needs_reentrant(settings)},
        "max_length": settings.max_seq_length,
        "packing": settings.packing,
        "eval_packing": False,
        # Tokenized, masked and cut already; only packing is left to do.
        "dataset_kwargs": None if settings.packing else {"skip_prepare_dataset": True},
        "completion_only_loss": False,
        "assistant_only_loss": False,
        "use_cpu": device == "cpu",
        "deepspeed": str(deepspeed_config) if deepspeed_config else None,
        "ddp_find_unused_parameters": False,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the filter would show NaN as 0
        "eval_strategy": eval_strategy,
        "eval_on_start": eval_strategy != "no" and not is_resumed,
        "eval_steps": settings.eval_steps or None,
        "save_strategy": eval_strategy if settings.keeps_best else save_strategy,
        "save_steps": settings.save_steps or 500,
        "save_total_limit": settings.save_total_limit,
        "load_best_model_at_end": settings.keeps_best,
        "metric_for_best_model": "eval_loss" if settings.keeps_best else None,
        "greater_is_better": False if settings.keeps_best else None,
        "restore_callback_states_from_checkpoint": settings.early_stopping_patience > 0,
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
    }


def _needs_reentrant(settings: FinetuneSettings) -> bool:
    """Whether checkpointing must be of the re-entrant kind, which computes each layer to its end once more.

    Under ZeRO-3 the other kind meets weights that were let go of meanwhile, if they are not trained. TRL has the same
    rule for adapters. A DeepSpeed file of the user's counts as ZeRO-3.
    """
    return methods.of(settings) != "full" and (settings.zero_stage == 3 or settings.deepspeed is not None)


def given(settings: FinetuneSettings) -> dict[str, Any]:
    """--trainer_arguments as SFTConfig's types have them, once `problems` has found none. Imports TRL for any."""
    import yaml

    pairs = [word.partition("=") for word in settings.trainer_arguments]
    return {name: _converted(name, yaml.safe_load(text)) for name, _, text in pairs}


def _converted(name: str, value: Any) -> Any:
    """The value in the argument's own type: to YAML a number such as 1e-8, without a point, is a word.

    Raises:
        ValidationError: pydantic's; it is not of that type.
    """
    import typing

    from pydantic import TypeAdapter
    from trl import SFTConfig

    return TypeAdapter(typing.get_type_hints(SFTConfig)[name]).validate_python(value)


def problems(settings: FinetuneSettings, folder: FinetuneFolder) -> Iterator[str]:
    """What is wrong with --trainer_arguments. Imports TRL when there are any."""
    if not settings.trainer_arguments:
        return
    import dataclasses

    import yaml
    from pydantic import ValidationError
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    found = 0
    decided = own(settings, folder, device="cpu", deepspeed_config=None, is_resumed=False)
    for word in settings.trainer_arguments:
        name, equals, text = word.partition("=")
        found += 1
        if not equals:
            yield f"--trainer_arguments {word!r}: NAME=VALUE was expected, such as neftune_noise_alpha=5."
        elif name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see TRL's documentation of SFTConfig."
            yield f"--trainer_arguments {name}: TRL's SFTConfig has no such argument; {hint}"
        elif name in decided or name.startswith(_NOT_TO_SET):
            ours = _OUR_NAMES.get(name, name)
            is_flag = any(field.name == ours for field in dataclasses.fields(FinetuneSettings))
            advice = f"pass --{ours} instead." if is_flag else "leave it out."
            yield f"--trainer_arguments {name}: the launcher decides it; {advice}"
        else:
            try:
                _converted(name, yaml.safe_load(text))
                found -= 1
            except yaml.YAMLError:
                yield f"--trainer_arguments {word!r}: the value is not YAML; quote it."
            except ValidationError as error:
                told = error.errors(include_url=False)[0]["msg"]
                yield f"--trainer_arguments {name}={text}: {told[0].lower() + told[1:]}."
    if not found:
        yield from _together_problems(settings, decided)


def _together_problems(settings: FinetuneSettings, decided: dict[str, Any]) -> Iterator[str]:
    """What TRL itself refuses, and packages that are missing: known before a model is loaded for it."""
    import warnings

    import torch
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    class OnNoDevice(SFTConfig):
        """Checks its arguments, and leaves GPUs and process groups alone: a launcher is no rank."""

        distributed_state = None
        n_gpu = 0
        device = _setup_devices = torch.device("cpu")

    arguments = {name: value for name, value in given(settings).items() if name not in _OF_THE_GPU}
    optimizer = arguments.get("optim")
    optimizers = [str(each.value) for each in OptimizerNames]
    if optimizer is not None and optimizer not in optimizers:
        near = difflib.get_close_matches(str(optimizer), optimizers, n=1, cutoff=0.5)
        known = f"did you mean {near[0]}?" if near else f"known are {', '.join(optimizers)}."
        yield f"--trainer_arguments optim={optimizer}: there is no such optimizer; {known}"
        return
    for name, package in (("optim", "bitsandbytes"), ("use_liger_kernel", "liger_kernel")):
        value = arguments.get(name)
        is_used = _OF_BITSANDBYTES.search(str(value)) if name == "optim" else value
        if is_used and find_spec(package) is None:
            word, pip = f"{name}={value}", package.replace("_", "-")
            yield f"--trainer_arguments {word} needs the package {pip}: pip install {pip}, or leave it out."
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            OnNoDevice(**decided | {"bf16": False, "fp16": False}, **arguments)
    except (ValueError, TypeError, ImportError) as error:
        yield f"--trainer_arguments {' '.join(settings.trainer_arguments)}: {first_line(error)}"


def build(settings: FinetuneSettings, folder: FinetuneFolder, **where: Any) -> Any:
    """The SFTConfig of a rank. `where` is what `own` asks for.

    Raises:
        UserError: what TRL itself refuses in --trainer_arguments.
    """
    from trl import SFTConfig

    extra = given(settings)
    try:
        return SFTConfig(**own(settings, folder, **where), **extra)
    except (ValueError, TypeError, ImportError) as error:
        if not extra:
            raise
        raise UserError(f"--trainer_arguments {' '.join(settings.trainer_arguments)}: {error}") from None
