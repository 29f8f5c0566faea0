"""Which weights a finetuning trains: all of them, those of chosen modules, or a LoRA adapter.

    method = methods.of(settings)  # "full", "partial" or "lora"

--method says it, or other flags imply it: --trainables names modules, and llm-jp-sft's --use_peft and --peft_... mean
LoRA, as a quantized base does, whose own weights cannot be trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.finetune.settings import FinetuneSettings

NAMES = ("full", "partial", "lora")
_LORA_FLAGS = ("peft_target_model", "peft_target_modules", "peft_lora_r", "peft_lora_alpha", "peft_lora_dropout")
_QUANTIZED_FLAGS = ("load_in_8bit", "load_in_4bit")


def of(settings: FinetuneSettings) -> str:
    """One of `NAMES`."""
    if settings.method is not None:
        return settings.method
    if settings.use_peft or (settings.use_peft is None and any(_given(settings, (*_LORA_FLAGS, *_QUANTIZED_FLAGS)))):
        return "lora"
    return "partial" if settings.trainables else "full"


def problems(settings: FinetuneSettings) -> Iterator[str]:
    """What contradicts itself, or cannot be, whatever the model."""
    method = of(settings)
    if (settings.use_peft and method != "lora") or (settings.use_peft is False and method == "lora"):
        yield f"--method {method} and --use_peft {settings.use_peft} contradict each other: leave one out."
    if method != "lora":
        for flag in _given(settings, (*_LORA_FLAGS, *_QUANTIZED_FLAGS, "merge")):
            yield f"--{flag} has no effect with --method {method}: leave it out, or use --method lora."
    if method == "partial" and not settings.trainables:
        yield "--method partial needs --trainables: name the modules to train, such as lm_head or 'layers.*.mlp'."
    if method != "partial" and settings.trainables:
        yield f"--trainables has no effect with --method {method}: leave it out, or use --method partial."
    if "" in (*settings.trainables, *settings.peft_target_modules):
        yield "--trainables and --peft_target_modules: a name is empty; name modules, or leave the flag out."
    if settings.peft_target_model is not None and settings.peft_target_modules:
        yield "--peft_target_model and --peft_target_modules exclude each other: name a model or modules."
    for flag in ("peft_lora_r", "peft_lora_alpha"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            yield f"--{flag} {value}: it must be at least 1."
    if settings.peft_lora_dropout is not None and not 0 <= settings.peft_lora_dropout < 1:
        yield f"--peft_lora_dropout {settings.peft_lora_dropout}: it must be at least 0 and below 1."
    yield from _memory_problems(settings)
    yield from _best_problems(settings)


def model_problems(settings: FinetuneSettings, model_dir: Path) -> Iterator[str]:
    """What the base model has no module for. Builds the model without its weights."""
    method = of(settings)
    if method == "full":
        return
    from train.finetune import lora, modules

    model = modules.empty_model(model_dir)
    if method == "partial":
        yield from modules.unmatched(settings.trainables, model)
    else:
        yield from lora.target_problems(settings, model)


def added_token_problems(settings: FinetuneSettings, model_dir: Path, added: int) -> Iterator[str]:
    """New tokens whose embeddings would stay as chance made them."""
    method = of(settings)
    if not added or method == "full":
        return
    from train.finetune import modules

    model = modules.empty_model(model_dir)
    embeddings = model.get_input_embeddings().weight
    if method == "lora" or not any(weight is embeddings for weight in modules.trained(settings.trainables, model)):
        yield (
            f"--additional_special_tokens adds {added} rows to the embeddings, which --method {method} as given does "
            "not train: use --method full, or partial with the embeddings among --trainables."
        )


def _memory_problems(settings: FinetuneSettings) -> Iterator[str]:
    if settings.load_in_8bit and settings.load_in_4bit:
        yield "--load_in_8bit and --load_in_4bit exclude each other: choose one."
    has_deepspeed = settings.deepspeed is not None or bool(settings.zero_stage)
    for flag in _given(settings, _QUANTIZED_FLAGS):
        if settings.zero_stage == 3:
            yield f"--{flag} and --zero_stage 3 exclude each other: ZeRO-3 cuts weights that bitsandbytes has packed."
    if settings.device_map is not None:
        if has_deepspeed:
            yield "--device_map and DeepSpeed exclude each other: both spread the model. Choose one."
        if settings.num_processes > 1:
            yield f"--device_map {settings.device_map} takes one process; --num_processes asks for more: leave it out."
    if settings.offload != "none":
        if not settings.zero_stage:
            yield f"--offload {settings.offload} has no effect without --zero_stage 2 or 3: add it."
        elif settings.offload == "all" and settings.zero_stage != 3:
            yield "--offload all keeps weights in the CPU's memory, which only --zero_stage 3 can; use optimizer."


def _best_problems(settings: FinetuneSettings) -> Iterator[str]:
    if settings.early_stopping_patience < 0:
        yield f"--early_stopping_patience {settings.early_stopping_patience}: it must not be negative."
    if not settings.keeps_best:
        return
    flag = "--early_stopping_patience" if settings.early_stopping_patience else "--keep_best"
    if not settings.evaluates:
        yield f"{flag} compares held-out losses: add --eval_data_files or --eval_size."
    if not settings.save_steps:
        yield f"{flag} goes back to the best checkpoint, and --save_steps 0 saves none: leave it out."
    elif settings.eval_steps and settings.save_steps % settings.eval_steps:
        yield (
            f"{flag}: --save_steps {settings.save_steps} is no multiple of --eval_steps {settings.eval_steps}, so the "
            "checkpoints would have no held-out loss: make it one."
        )


def _given(settings: FinetuneSettings, flags: tuple[str, ...]) -> Iterator[str]:
    """Those of `flags` that were given: a rank of 0 was, too."""
    for flag in flags:
        value = getattr(settings, flag)
        if value is not None and value is not False and value != ():
            yield flag
