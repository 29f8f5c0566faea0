"""A model has to say something before it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.finetune import generate
from train.hub import prompt


def always_says(folder: Path, token_id: int) -> None:
    """Makes the model answer everything with one token."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[token_id] * 1000)
    model.save_pretrained(folder, max_shard_size="2MB")


def test_a_model_speaks(model_folder: Path) -> None:
    always_says(model_folder, 10)
    assert prompt.answer(model_folder, "Once upon").split() == ["word5"] * 50


@pytest.mark.parametrize("token_id", [2, 3, 4])  # the end, padding, and the end of a document, which is not named
def test_a_model_that_says_nothing_is_refused(token_id: int, model_folder: Path) -> None:
    always_says(model_folder, token_id)
    with pytest.raises(UserError, match="says nothing to --test_prompt_text 'Once upon'"):
        prompt.answer(model_folder, "Once upon")


def test_a_chat_template_makes_the_prompt_a_users_turn(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_says(model_folder, 10)
    template = (
        "{% for m in messages %}word7 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}word8{% endif %}"
    )
    (model_folder / "chat_template.jinja").write_text(template)
    seen: list[list[int]] = []
    true_ids = generate.prompt_ids
    monkeypatch.setattr(generate, "prompt_ids", lambda *a, **b: seen.append(true_ids(*a, **b)) or seen[-1])
    prompt.answer(model_folder, "Once upon")
    assert seen == [[12, 64, 65, 13]]


def test_what_is_tested_is_what_users_get(model_folder: Path) -> None:
    """An end token that only generation_config.json names ends the answer at both doors."""
    always_says(model_folder, 10)
    file = model_folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 10]}))
    said = prompt.answer(model_folder, "Once upon")
    settings = generate.GenerateSettings(str(model_folder), prompt="Once upon", max_new_tokens=50, device="cpu")
    (users,) = generate.answers_of(model_folder, settings, ["Once upon"])
    assert said == users.answer == "word5"
    assert users.ended


def test_a_prompt_without_tokens_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "prompt_ids", lambda *_, **__: [])
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        prompt.answer(model_folder, "\u200b")


def test_a_prompt_beyond_the_models_positions_is_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match="has 64 tokens, the model 64 positions"):
        prompt.answer(model_folder, "Once upon " * 32)


def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        prompt.answer(tmp_path, "Once upon")
