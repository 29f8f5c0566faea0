"""What one step hands to the next, as flags, so that a recipe of all steps states each path and number once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.data.preprocess import PreprocessSettings
from train.recipe import PretrainRecipe
from train.tokenizer.train import TrainTokenizerSettings

_LATER = "made-by-an-earlier-step"  # stands for what an earlier section would name, had it no problems of its own


def find(name: str, parsed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What earlier steps hand to this one, by flag.

    Args:
        name: the step.
        parsed: settings of the earlier ones; None for one with problems of its own.
    """

    def of(step: str, value: Callable[[Any], Any]) -> Any:
        return _LATER if parsed[step] is None else value(parsed[step])

    tokenizer = next(
        (
            of(step, _tokenizer_file)
            for step in ("train_tokenizer", "preprocess_data", "pretrain_model")
            if step in parsed
        ),
        None,
    )
    if name in ("preprocess_data", "pretrain_model", "convert_model") and tokenizer is not None:
        yield "input_tokenizer_file", tokenizer
    if name == "preprocess_data" and "train_tokenizer" in parsed:
        yield "input", of("train_tokenizer", lambda before: list(before.input))
    if name == "pretrain_model" and "preprocess_data" in parsed:
        yield "data_path", of("preprocess_data", _data_path)
    if name == "convert_model" and "pretrain_model" in parsed:
        yield "input_model_dir", of("pretrain_model", _checkpoint_dir)
        yield (
            "input_model_max_length",
            2 if parsed["pretrain_model"] is None else (parsed["pretrain_model"].model.sequence_length),
        )
    if name in ("upload_pretrained_model", "finetune_model") and "convert_model" in parsed:
        flag = "model_name_or_path" if name == "finetune_model" else "input_tokenizer_and_model_dir"
        yield flag, of("convert_model", lambda before: str(before.output_tokenizer_and_model_dir))
    if name == "upload_finetuned_model" and "finetune_model" in parsed:
        yield "input_tokenizer_and_model_dir", of("finetune_model", lambda before: str(before.output_dir))


def _tokenizer_file(before: Any) -> str:
    if isinstance(before, TrainTokenizerSettings):
        return f"{before.model_prefix}.model"
    if isinstance(before, PretrainRecipe):
        return str(before.data.input_tokenizer_file)
    return str(before.input_tokenizer_file)


def _data_path(before: PreprocessSettings) -> str:
    if before.output_prefix is None:
        return str(before.output_file_dir)
    return f"{before.output_prefix}_{before.json_key}_document"


def _checkpoint_dir(before: PretrainRecipe) -> str:
    assert before.checkpoint.job_name is not None, "resolved() comes first"
    return str(before.checkpoint.output_model_dir / "checkpoint" / before.checkpoint.job_name)
