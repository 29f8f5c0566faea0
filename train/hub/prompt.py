"""Lets a model speak before it is published: a model that says nothing is not uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.errors import UserError
from train.tokenizer.special_tokens import USER_DEFINED_SYMBOLS

_NEW_TOKENS = 50


def answer(folder: Path, prompt: str) -> str:
    """What the model in `folder` says after `prompt`: up to 50 tokens, the likeliest at each place.

    A model with a chat template is asked as it was finetuned: the prompt is the user's turn.

    Raises:
        UserError: the prompt is too long, the model cannot be loaded, or it says nothing but special tokens and
            white space.
    """
    import torch

    from train.checkpoint.verify import load

    model, tokenizer = load(folder)
    input_ids = _input_ids(tokenizer, prompt)
    room = _NEW_TOKENS
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        room = min(room, positions - len(input_ids))
    if not input_ids or room < 1:
        raise UserError(f"--test_prompt_text has {len(input_ids)} tokens, the model {positions} positions: shorten it.")
    prompt_ids = torch.tensor([input_ids])
    with torch.no_grad():
        generated = model.float().generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=room, do_sample=False
        )
    text = str(tokenizer.decode(generated[0, len(input_ids) :], skip_special_tokens=True))
    for token in (*tokenizer.all_special_tokens, *USER_DEFINED_SYMBOLS):
        text = text.replace(str(token), "")
    if not text.strip():
        raise UserError(
            f"the model in {folder} says nothing to --test_prompt_text {prompt!r}: it is not uploaded. Try another "
            "prompt, or train it longer."
        )
    return text


def _input_ids(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [int(number) for number in tokenizer(prompt, add_special_tokens=False)["input_ids"]]
