"""From the ids of prompts to the ids of answers: batches, drawing, and the end token.

for said in decode(model, [[5, 6], [7]], Drawing(max_new_tokens=20), ends=[2], pad_id=3):
    said[-1] in ends
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from train.generate import model as models


@dataclass(frozen=True)
class Drawing:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        top_p, top_k: draw among the likeliest tokens only; 1 and 0 leave them all.
        num_beams: answers followed side by side.
        repetition_penalty: above 1 makes tokens that stood before less likely.
        seed: of each batch.
        batch_size: prompts answered at once.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int = 42
    batch_size: int = 1

    def arguments(self) -> dict[str, Any]:
        """What transformers calls these."""
        sampling = self.temperature > 0
        return {
            "do_sample": sampling,
            "temperature": self.temperature if sampling else None,
            "top_p": self.top_p if sampling and self.top_p < 1 else None,
            "top_k": self.top_k if sampling and self.top_k > 0 else None,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
        }


def decode(
    model: Any, prompts: Sequence[Sequence[int]], drawing: Drawing, *, ends: Sequence[int], pad_id: int | None,
    streamer: Any = None,
) -> Iterator[list[int]]:  # fmt: skip
    """The tokens of each answer, in order, up to its end token, which is included.

    Args:
        model: a causal language model.
        prompts: token ids; none empty, none longer than the model's positions leave room for.
        drawing: how.
        ends: ids that end an answer.
        pad_id: fills the left of shorter prompts, masked; any id will do.
        streamer: is handed the ids as they come; one prompt and one beam at a time.
    """
    import torch
    from transformers import GenerationConfig, set_seed

    for numbers in batches([len(prompt) for prompt in prompts], drawing, models.positions(model)):
        rows = [list(prompts[number]) for number in numbers]
        longest = max(map(len, rows))
        fill = pad_id if pad_id is not None else next(iter(ends), 0)
        input_ids = torch.tensor([[fill] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        if drawing.temperature > 0:  # else nothing is drawn, and a training that asks its model keeps its own numbers
            set_seed(drawing.seed)
        config = GenerationConfig(
            max_new_tokens=room(longest, drawing, models.positions(model)),
            pad_token_id=fill,
            eos_token_id=list(ends) or None,
            **drawing.arguments(),
        )
        with torch.no_grad(), _only(config, model):
            output = model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=config, streamer=streamer
            )
        for row in output[:, longest:].tolist():
            yield up_to_end(row, ends)


@contextmanager
def _only(config: Any, model: Any) -> Iterator[None]:
    """Takes the model's own generation configuration out of the way: it fills in whatever `config` leaves open, such as
    stop strings, time limits or the number of answers, and a model's maker chose it for other callers.
    """
    own = {
        module: vars(module)["generation_config"] for module in model.modules() if "generation_config" in vars(module)
    }
    for module in own:  # the model, or the one within an adapter
        module.generation_config = config
    try:
        yield
    finally:
        for module, former in own.items():
            module.generation_config = former


def batches(lengths: Sequence[int], drawing: Drawing, positions: int | None) -> Iterator[list[int]]:
    """The numbers of the prompts that are answered together, in order.

    A prompt that leaves less room than `max_new_tokens` is answered alone: it must not shorten the others' answers.
    """
    together: list[int] = []
    for number, length in enumerate(lengths):
        if room(length, drawing, positions) < drawing.max_new_tokens:
            if together:
                yield together
            yield [number]
            together = []
            continue
        together.append(number)
        if len(together) == drawing.batch_size:
            yield together
            together = []
    if together:
        yield together


def room(length: int, drawing: Drawing, positions: int | None) -> int:
    """The longest answer to a prompt of `length` tokens."""
    return drawing.max_new_tokens if positions is None else min(drawing.max_new_tokens, positions - length)


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """`ids` up to the first end token, which is included; what follows it in a batch only fills the row."""
    end = next((place for place, token_id in enumerate(ids) if token_id in ends), len(ids) - 1)
    return list(ids[: end + 1])
