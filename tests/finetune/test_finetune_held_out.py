"""The held-out loss is that of the tokens, whatever the batches, the processes and the packing they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import argv, call  # type: ignore[import-not-found]

pytestmark = pytest.mark.slow
ANSWERS = ["no", "the cat sees a dog " * 4, "猫", "a dog", "東京 は 猫 を 見る。", "yes " * 9, "a"]


@pytest.fixture
def held_out(write_jsonl: Callable[..., Path]) -> Path:
    """Seven conversations, whose answers are of very different lengths: no batch of any size is like another."""
    records = [{"prompt": f"what is {n}?", "completion": answer} for n, answer in enumerate(ANSWERS)]
    return write_jsonl(records, "held_out.jsonl")


def of_all_tokens(model_dir: Path, tokenizer_dir: Path) -> float:
    """The mean by hand: one conversation at a time, the sum over all answers divided by their tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    nats, tokens = 0.0, 0
    for number, answer in enumerate(ANSWERS):
        question = [{"role": "user", "content": f"what is {number}?"}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        chat = [*question, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        nats -= float(sum(chances[place - 1, ids[place]] for place in range(len(prompt), len(ids))))
        tokens += len(ids) - len(prompt)
    return nats / tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 3},
        {"per_device_eval_batch_size": 8},
        {"per_device_eval_batch_size": 2, "num_processes": 2},
        {"per_device_eval_batch_size": 3, "num_processes": 2, "packing": True},
        {"per_device_eval_batch_size": 2, "trainer_arguments": "dataloader_drop_last=true"},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_it_is_the_mean_of_the_tokens(
    files: dict[str, Any], held_out: Path, base_model: Path, changes: dict[str, Any]
) -> None:
    assert (
        call(*argv(files, eval_data_files=held_out, max_steps=1, learning_rate=1e-2, show_examples=0, **changes)) == 0
    )
    out = files["output_dir"]
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    expected = {0: of_all_tokens(base_model, out), 1: of_all_tokens(out, out)}
    assert found == pytest.approx(expected, rel=1e-5)
