"""The model that is asked: a folder, a name on the Hub, or a base model and the adapter that was trained on it.

sources = find("output/chat_lora")        # a PEFT folder names its base itself
model, tokenizer = load(sources, device="auto", precision="stored")

PEFT's files: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import verification
from train.errors import UserError, VerificationError
from train.finetune import adapter as adapters
from train.finetune import base_model, tokenizer_files

PRECISIONS = {"stored": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Sources:
    """Where a model comes from.

    Attributes:
        base: folder of the weights.
        adapter: folder of the adapter on them; None without one.
    """

    base: Path
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The adapter's own tokenizer, with the chat template it was trained with, where it has one."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if has_own and self.adapter is not None else self.base

    @property
    def files(self) -> list[Path]:
        """The files that make the model."""
        folders = [self.base, *([self.adapter] if self.adapter else [])]
        return [file for folder in folders for file in verification.model_files(folder)]


def find(name: str, adapter: str | None = None, *, flag: str = "--model_name_or_path") -> Sources:
    """The folders that `name` and `adapter` mean.

    Raises:
        UserError: one is missing, unfinished or unproven, or the adapter's base is.
    """
    if adapter is None:
        folder = _adapter_folder(name)
        if folder is None:
            return Sources(base_model.find_model(name, flag=flag))
        return Sources(_base_of(folder), _checked(folder, flag=flag))
    given = _adapter_folder(adapter)
    if given is None:
        raise UserError(f"--adapter {adapter} has no {adapters.CONFIG}: name the folder of a LoRA finetuning.")
    if _adapter_folder(name) is not None:
        raise UserError(f"{flag} {name} is an adapter itself: name its base model, or leave --adapter out.")
    return Sources(base_model.find_model(name, flag=flag), _checked(given, flag="--adapter"))


def load(sources: Sources, *, device: str = "auto", precision: str = "stored") -> tuple[Any, Any]:
    """The model, ready to compute on its device, and its tokenizer.

    Args:
        sources: as `find` gives them.
        device: auto, cuda or cpu.
        precision: a key of `PRECISIONS`: the type of the weights; `stored` leaves it as it is on the disk.

    Raises:
        UserError: there is no such device, or a part cannot be loaded.
        VerificationError: weights are missing, left over, empty, or of another shape.
    """
    import torch
    from transformers import GenerationConfig

    from train.checkpoint import verify

    target = choose_device(device, torch.cuda.is_available())
    model, tokenizer = verify.load(sources.base)
    if sources.adapter is not None:
        if sources.tokenizer != sources.base:
            tokenizer = tokenizer_files.load(sources.adapter)
        model = _with_adapter(model, sources.adapter, rows=len(tokenizer))
        if (sources.adapter / "generation_config.json").is_file():  # it may name more end tokens than the base's
            model.generation_config = GenerationConfig.from_pretrained(sources.adapter)
    if (dtype := PRECISIONS[precision]) is not None:
        model.to(getattr(torch, dtype))
    return model.to(target).eval(), tokenizer


def choose_device(wanted: str, has_gpu: bool) -> str:
    """Where to compute.

    Raises:
        UserError: a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU; use --device cpu.")
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter only, not whole weights."""
    return (folder / adapters.CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def positions(model: Any) -> int | None:
    """The longest sequence the model can take, in tokens; None where its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def _adapter_folder(name: str) -> Path | None:
    """The folder of an adapter; None for all else, a model with whole weights too."""
    folder = Path(name)
    if not folder.exists():
        folder = _hub_adapter(name) or folder
    return folder.absolute() if is_adapter(folder) else None


def _hub_adapter(name: str) -> Path | None:
    """Where the Hub's client keeps the adapter `name`; None when there is no such adapter to be had."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        hf_hub_download(name, adapters.CONFIG)
        return Path(snapshot_download(name, allow_patterns=list(verification.MODEL_FILES)))
    except Exception:  # it is none, or cannot be reached: base_model.find_model says which
        return None


def _checked(adapter: Path, *, flag: str) -> Path:
    if not (adapter / adapters.WEIGHTS).is_file():
        raise UserError(f"{flag} {adapter} has no {adapters.WEIGHTS}: the adapter was not saved whole; train it again.")
    if verification.read(adapter) is not None:
        verification.require(adapter, hash_files=False)
    return adapter


def _base_of(adapter: Path) -> Path:
    file = adapter / adapters.CONFIG
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not an adapter's configuration ({error}): train the adapter again.") from None
    if not named:
        raise UserError(f"{file} names no base model: pass --model_name_or_path BASE --adapter {adapter}.")
    try:
        return base_model.find_model(str(named), flag=f"{file}: base_model_name_or_path")
    except UserError as error:
        where = f"the base model can be named too: --model_name_or_path BASE --adapter {adapter}."
        raise UserError([*error.problems, where[0].upper() + where[1:]]) from None


def _with_adapter(model: Any, folder: Path, *, rows: int) -> Any:
    """The base model with its adapter."""
    if rows > model.get_input_embeddings().weight.shape[0]:  # tokens that were added for the finetuning
        model.resize_token_embeddings(rows)
    try:
        return adapters.attach(model, folder)
    except VerificationError as error:
        raise VerificationError(
            f"{folder}: {len(error.problems)} tensors are missing, empty, left over or of another shape than its base"
            f" model takes, first: {error.problems[0]} Is it the base it was trained on?"
        ) from None
