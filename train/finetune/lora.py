"""LoRA by PEFT: which modules get an adapter, and the model with one.

    problems = target_problems(settings, empty_model(folder))
    model = wrap(model, settings, base_name="owner/name", zero_stage=3)

Flags and their defaults are those of llm-jp-sft: https://github.com/llm-jp/llm-jp-sft/blob/main/train.py
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from train.finetune.modules import shortened
from train.finetune.settings import FinetuneSettings

RANK, ALPHA, DROPOUT = 8, 32, 0.05
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GPT2 = ("c_attn", "c_proj", "c_fc")
# llm-jp-sft's names for lists of modules. Its `llama-all` adds the output head, which TRL does not train.
TARGET_MODELS: dict[str, tuple[str, ...]]
TARGET_MODELS = {"llm-jp": _GPT2, "gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA}


def targets(settings: FinetuneSettings, model: Any) -> tuple[str, ...]:
    """The last names of the modules that get an adapter. By default all linear ones but the output head.

    That is c_attn, c_proj and c_fc in a GPT-2, and the four of attention and the three behind it in a Llama or Mistral.
    """
    if settings.peft_target_modules:
        return settings.peft_target_modules
    if settings.peft_target_model is not None:
        return TARGET_MODELS[settings.peft_target_model]
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def target_problems(settings: FinetuneSettings, model: Any) -> Iterator[str]:
    """A message for each target that this model has not, or that can have no adapter."""
    flag = "--peft_target_modules" if settings.peft_target_modules else "--peft_target_model"
    modules = dict(model.named_modules())
    able = shortened(name for name, module in modules.items() if _is_able(module, model))
    for target in targets(settings, model):
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if not found:
            yield f"{flag}: {target!r} is the name of no module of this model; there are {able}."
        elif not all(_is_able(module, model) for module in found):
            yield f"{flag}: {target!r} can have no adapter in this model; these can: {able}."


def machine_problems(settings: FinetuneSettings) -> Iterator[str]:
    """Why a quantized base is not to be had here."""
    for flag in ("load_in_8bit", "load_in_4bit"):
        if getattr(settings, flag) and find_spec("bitsandbytes") is None:
            yield f"--{flag} needs the package bitsandbytes: pip install bitsandbytes, or leave it out."


def quantization(settings: FinetuneSettings) -> Any:
    """How bitsandbytes packs the base's weights; None leaves them as they are."""
    if not (settings.load_in_8bit or settings.load_in_4bit):
        return None
    import torch
    from transformers import BitsAndBytesConfig

    # each product of 8 bits would say that it rounds its input to float16, a few hundred times a step; before 0.50 as a
    # warning of Python's
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    return BitsAndBytesConfig(
        load_in_8bit=settings.load_in_8bit,
        load_in_4bit=settings.load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else torch.float32,
    )


def wrap(model: Any, settings: FinetuneSettings, *, base_name: str, zero_stage: int) -> Any:
    """The model with an adapter to train, the same on every rank.

    Args:
        model: the base, loaded; under ZeRO-3 spread over the ranks.
        settings: rank, alpha, dropout and targets.
        base_name: what adapter_config.json calls the base: a name on the Hub, or an absolute folder.
        zero_stage: under 3 the adapter has the base's type: DeepSpeed gathers both in one buffer.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    set_seed(settings.seed)  # the adapter's first values are drawn
    if settings.load_in_8bit or settings.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    names = targets(settings, model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK if settings.peft_lora_r is None else settings.peft_lora_r,
        lora_alpha=ALPHA if settings.peft_lora_alpha is None else settings.peft_lora_alpha,
        lora_dropout=DROPOUT if settings.peft_lora_dropout is None else settings.peft_lora_dropout,
        target_modules=list(names),
        fan_in_fan_out=_is_gpt2(model, names),
        base_model_name_or_path=base_name,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=zero_stage != 3)
    adapted.peft_config["default"].base_model_name_or_path = base_name  # get_peft_model writes the folder it came from
    return adapted


def _is_gpt2(model: Any, names: tuple[str, ...]) -> bool:
    """Whether the targets keep their weights the other way round, as GPT-2's Conv1D does."""
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.rpartition(".")[2] in names}
    return kinds == {"Conv1D"}


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _is_able(module: Any, model: Any) -> bool:
    """Linear modules but the output head, which TRL computes by itself, without an adapter.

    PEFT has adapters for embeddings, too, but saves the whole embeddings with them; and where the output head is tied
    to them, a merge would change that as well, so that it is not what was trained.
    """
    return module is not model.get_output_embeddings() and _is_linear(module)
