"""A conversation in the terminal: the answer appears as it is drawn.

Commands: /new forgets what was said, /exit (or the end of the input, Ctrl-D) ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from train.errors import UserError
from train.finetune import masks
from train.generate import decode
from train.generate import model as models

_UNFINISHED = "\ufffd"  # what a decoder makes of a character whose last bytes are still to come


class Stream:
    """Writes an answer's text as its tokens come; what `model.generate` calls a streamer.

    The whole answer is decoded at each token: decoders drop a leading blank, and join bytes to characters.
    """

    def __init__(self, tokenizer: Any, stream: TextIO) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self._ids: list[int] = []
        self._is_prompt = True
        self._shown = 0

    def put(self, ids: Any) -> None:
        """Takes the prompt first, then a token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += ids.reshape(-1).tolist()
        text = self._text()
        self._show(text[: len(text.rstrip(_UNFINISHED + " \n"))])  # blanks may be the end, which is stripped

    def end(self) -> None:
        """Writes what was held back."""
        self._show(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).strip()

    def _show(self, text: str) -> None:
        self._stream.write(text[self._shown :])
        self._stream.flush()
        self._shown = max(self._shown, len(text))


def chat(
    model: Any, tokenizer: Any, drawing: decode.Drawing, *, ends: list[int], system: str | None = None,
    read: Callable[[str], str] = input, stream: TextIO | None = None,
) -> None:  # fmt: skip
    """Answers what is typed until the input ends.

    Args:
        model, tokenizer: with a chat template.
        drawing: how answers are drawn; one beam.
        ends: ids that end an answer.
        system: leads every conversation.
        read: asks for a line.
        stream: receives the answers; standard output when None.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "--chat: the model has no chat template, so it was not taught to talk: finetune it, or --prompt."
        )
    out = stream or sys.stdout
    opening = [] if system is None else [{"role": "system", "content": system}]
    turns = list(opening)
    while True:
        try:
            said = read("> ").strip()
        except EOFError:
            return
        if said == "/exit":
            return
        if said == "/new":
            turns = list(opening)
            print("(forgotten)", file=out, flush=True)
            continue
        if not said:
            continue
        turns.append({"role": "user", "content": said})
        ids = _fitting(model, tokenizer, turns, keep=len(opening), out=out)
        if ids is None:
            turns.pop()
            continue
        streamer = Stream(tokenizer, out)
        (answer,) = decode.decode(model, [ids], drawing, ends=ends, pad_id=tokenizer.pad_token_id, streamer=streamer)
        print(file=out, flush=True)
        turns.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True).strip()})


def _fitting(model: Any, tokenizer: Any, turns: list[dict[str, str]], *, keep: int, out: TextIO) -> list[int] | None:
    """The conversation's ids, without its oldest turns when it has grown too long; None when the question alone is."""
    limit, left_out = models.positions(model), 0
    while limit is not None and len(masks.prompt_ids(tokenizer, turns)) >= limit:
        if len(turns) < keep + 3:  # only the question is left
            print(f"(too long for the model's {limit} positions: shorten it)", file=out, flush=True)
            return None
        del turns[keep : keep + 2]
        left_out += 1
    if left_out:
        print(f"(the {left_out} oldest turns no longer fit and are forgotten)", file=out, flush=True)
    return masks.prompt_ids(tokenizer, turns)
