"""Lets a model speak before it is published, as generate.py lets it: a model that says nothing is not uploaded."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserError
from train.finetune.generate import GenerateSettings, answers_of
from train.tokenizer.special_tokens import USER_DEFINED_SYMBOLS

_NEW_TOKENS = 50
_SEEDS = (1, 2, 3)


def answer(folder: Path, prompt: str) -> str:
    """What the model in `folder` says after `prompt`: up to 50 tokens, the likeliest at each place.

    Where that is only white space (a small model's likeliest is often a line end for ever), it may draw its words
    instead, three times with fixed seeds. A model with a chat template is asked as it was finetuned: the prompt is the
    user's turn.

    Raises:
        UserError: the prompt is too long, the model cannot be loaded, or it says nothing but special tokens and
            white space.
    """
    for temperature, seed in ((0.0, 0), *((1.0, seed) for seed in _SEEDS)):
        settings = GenerateSettings(
            str(folder), prompt=prompt, max_new_tokens=_NEW_TOKENS, device="cpu", temperature=temperature, seed=seed
        )
        (said,) = answers_of(folder, settings, [prompt])
        text = said.answer
        for token in USER_DEFINED_SYMBOLS:  # those that are no special tokens to transformers
            text = text.replace(token, "")
        if text.strip():
            return text
    raise UserError(
        f"the model in {folder} says nothing to --test_prompt_text {prompt!r}: it is not uploaded. Try another "
        "prompt, or train it longer."
    )
