"""Lets a model speak before it is published, as generate.py lets it: a model that says nothing is not uploaded."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserError
from train.finetune.generate import GenerateSettings, answers_of
from train.tokenizer.special_tokens import USER_DEFINED_SYMBOLS

_NEW_TOKENS = 50


def answer(folder: Path, prompt: str) -> str:
    """What the model in `folder` says after `prompt`: up to 50 tokens, the likeliest at each place.

    A model with a chat template is asked as it was finetuned: the prompt is the user's turn.

    Raises:
        UserError: the prompt is too long, the model cannot be loaded, or it says nothing but special tokens and
            white space.
    """
    settings = GenerateSettings(str(folder), prompt=prompt, max_new_tokens=_NEW_TOKENS, device="cpu")
    (said,) = answers_of(folder, settings, [prompt])
    text = said.answer
    for token in USER_DEFINED_SYMBOLS:  # those that are no special tokens to transformers
        text = text.replace(token, "")
    if not text.strip():
        raise UserError(
            f"the model in {folder} says nothing to --test_prompt_text {prompt!r}: it is not uploaded. Try another "
            "prompt, or train it longer."
        )
    return text
