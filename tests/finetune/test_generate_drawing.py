"""Answers as they are drawn: held against transformers and plain loops, alone and in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import verify
from train.finetune.generate import GenerateSettings, answers_with, prompt_ids
from train.generate.decode import Drawing, batches, decode, up_to_end
from train.generate.prompts import Prompt

QUESTIONS = ["the cat", "犬 は 猫 を 見る。 " * 4, "a", "東京 sees 12,345 cats and the dog"]


@pytest.fixture
def loaded(base_model: Path) -> tuple[Any, Any]:
    return verify.load(base_model)


def likeliest(model: Any, ids: list[int], count: int, ends: set[int]) -> list[int]:
    """Greedy decoding without a cache: the whole text at each step."""
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in ends):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_likeliest_tokens_are_taken_in_batches_too(loaded: Any, batch_size: int) -> None:
    model, tokenizer = loaded
    ids = [prompt_ids(tokenizer, question, raw=True) for question in QUESTIONS]
    expected = [likeliest(model, one, 12, {2}) for one in ids]
    drawing = Drawing(max_new_tokens=12, batch_size=batch_size)
    assert list(decode(model, ids, drawing, ends=[2], pad_id=3)) == expected
    assert len({len(one) for one in ids}) > 2  # or nothing was padded


def test_an_answer_ends_at_its_end_token_also_beside_longer_ones(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = [prompt_ids(tokenizer, question, raw=True) for question in QUESTIONS]
    free = [likeliest(model, one, 12, set()) for one in ids]
    end = free[0][3]  # makes the first answer end early
    expected = [up_to_end(one, [end]) for one in free]
    assert len({len(one) for one in expected}) > 1
    drawing = Drawing(max_new_tokens=12, batch_size=4)
    assert list(decode(model, ids, drawing, ends=[end], pad_id=end)) == expected  # padded with the end token itself


def test_a_long_prompt_does_not_shorten_the_others_answers() -> None:
    drawing = Drawing(max_new_tokens=10, batch_size=2)
    assert list(batches([5, 95, 5, 5, 5], drawing, 100)) == [[0], [1], [2, 3], [4]]
    assert list(batches([5, 95, 5], drawing, None)) == [[0, 1], [2]]


def test_up_to_end() -> None:
    assert up_to_end([5, 2, 3, 3], [2, 9]) == [5, 2]
    assert up_to_end([5, 6], [2]) == [5, 6]
    assert up_to_end([], [2]) == []


def test_beams_find_what_is_likelier_as_a_whole(loaded: Any) -> None:
    """Of 600 x 600 two-token answers, beams as wide as the vocabulary find the likeliest: all are tried here."""
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, "the cat", raw=True)
    model.lm_head.weight.data *= 8  # or all tokens are about as likely
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        second = model(torch.tensor([[*ids, token] for token in range(600)])).logits[:, -1].log_softmax(-1)
    best = divmod(int((first[:, None] + second).argmax()), 600)
    (said,) = decode(model, [ids], Drawing(max_new_tokens=2, num_beams=600), ends=[], pad_id=3)
    assert tuple(said) == best


def test_drawing_keeps_to_the_likeliest_tokens(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, "the cat", raw=True)
    with torch.no_grad():
        likely = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True)[:3].tolist()
    drawn = {
        next(decode(model, [ids], Drawing(max_new_tokens=1, temperature=5.0, top_k=3, seed=seed), ends=[], pad_id=3))[0]
        for seed in range(40)
    }
    assert drawn == set(likely)
    narrow = Drawing(max_new_tokens=1, temperature=5.0, top_p=1e-6, seed=1)
    assert next(decode(model, [ids], narrow, ends=[], pad_id=3)) == likely[:1]


def test_a_repetition_penalty_avoids_what_was_said(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, "the cat", raw=True)
    (said,) = decode(model, [ids], Drawing(max_new_tokens=100, repetition_penalty=1e6), ends=[], pad_id=3)
    assert len(set(said)) == 100 and not set(said) & set(ids)
    (plain,) = decode(model, [ids], Drawing(max_new_tokens=100), ends=[], pad_id=3)
    assert len(set(plain)) < 100


OWN_SETTINGS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 9.0, "top_k": 600, "repetition_penalty": 5.0, "num_beams": 2},
    {"no_repeat_ngram_size": 1},
    {"max_time": 1e-9},
    {"stop_strings": ["a"]},
    {"num_beams": 2, "num_return_sequences": 2},
    {"bad_words_ids": [[token] for token in range(10, 500)]},
    {"min_new_tokens": 60, "suppress_tokens": list(range(10, 300))},
]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: next(iter(own)))
def test_the_models_own_generation_settings_have_no_say(loaded: Any, own: dict[str, Any], num_beams: int) -> None:
    model, tokenizer = loaded
    settings = GenerateSettings("m", prompt="the cat", max_new_tokens=60, num_beams=num_beams)
    before = [one.answer for one in answers_with(model, tokenizer, settings, ["the cat"])]
    model.generation_config.update(**own)
    kept = model.generation_config.to_dict()
    assert [one.answer for one in answers_with(model, tokenizer, settings, ["the cat"])] == before
    assert model.generation_config.to_dict() == kept


def test_nor_have_those_of_a_model_within_an_adapter(loaded: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base, tokenizer = loaded
    model: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    settings = GenerateSettings("m", prompt="the cat", max_new_tokens=60)
    before = [one.answer for one in answers_with(model, tokenizer, settings, ["the cat"])]
    base.generation_config.update(stop_strings=["a"], no_repeat_ngram_size=1)
    assert [one.answer for one in answers_with(model, tokenizer, settings, ["the cat"])] == before
    assert base.generation_config.stop_strings == model.generation_config.stop_strings == ["a"]


def test_a_conversation_and_a_system_message_reach_the_template(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    given = prompt_ids(tokenizer, Prompt("c", tuple(turns)), raw=False, system="Be brief.")
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *turns], tokenize=False, add_generation_prompt=True
    )
    assert given == tokenizer(text, add_special_tokens=False)["input_ids"]
    own = Prompt("c", ({"role": "system", "content": "Mine."}, *turns))
    assert own.turns("Be brief.")[0]["content"] == "Mine."
