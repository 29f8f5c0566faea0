"""The special tokens that a model's configurations name: those of its tokenizer, so that generation stops.

ids = special_ids.of(tokenizer)
special_ids.agree(model, ids)
"""

from __future__ import annotations

from typing import Any

_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def of(tokenizer: Any) -> dict[str, int | None]:
    """The tokenizer's own, before a trainer has touched it."""
    return {name: getattr(tokenizer, name) for name in _NAMES}


def agree(model: Any, ids: dict[str, int | None]) -> None:
    """Makes the model's configurations name the tokenizer's special tokens: generation stops where training did.

    TRL writes its padding token into the configuration; and base models are found whose files disagree.
    """
    for name, token_id in ids.items():
        setattr(model.config, name, token_id)
        former = getattr(model.generation_config, name)
        if name == "eos_token_id" and isinstance(former, list):
            setattr(model.generation_config, name, former if token_id in former else [token_id, *former])
        else:
            setattr(model.generation_config, name, token_id)
