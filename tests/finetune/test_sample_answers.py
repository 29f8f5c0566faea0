"""Samples during training: what the model says at each checkpoint, without touching the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from train.checkpoint import verify
from train.finetune.generate import GenerateSettings, answers_with
from train.finetune.sample_answers import SampleAnswers
from train.monitor import samples

PROMPTS = ["the cat", "犬 は", "the cat " * 200]


def train(base_model: Path, output: Path, callbacks: list[Any], **more: Any) -> Any:
    """Four steps with dropout, so that the random numbers matter."""
    model, _ = verify.load(base_model)
    model.config.attention_dropout = 0.5
    examples = [{"input_ids": [5, 6, 7, n], "labels": [5, 6, 7, n]} for n in range(10, 18)]
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=4, save_steps=2, learning_rate=0.05, per_device_train_batch_size=2,
        use_cpu=True, report_to="none", disable_tqdm=True, seed=1, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=callbacks)
    trainer.train(**more)
    return trainer


def test_samples_are_what_the_model_says_and_training_is_the_same(base_model: Path, tmp_path: Path) -> None:
    _, tokenizer = verify.load(base_model)
    file = tmp_path / "samples.jsonl"
    asked = train(base_model, tmp_path / "a", [SampleAnswers(file, tokenizer, PROMPTS, max_new_tokens=6)])
    plain = train(base_model, tmp_path / "b", [])
    for name, weight in asked.model.named_parameters():
        assert torch.equal(weight, plain.model.get_parameter(name)), name
    assert asked.model.training == plain.model.training

    found = list(samples.read(file))
    assert [(one["step"], one["prompt"]) for one in found] == [
        (2, "the cat"),
        (2, "犬 は"),
        (4, "the cat"),
        (4, "犬 は"),
    ]
    settings = GenerateSettings("m", max_new_tokens=6)
    for step, model in (
        (2, verify.load(with_tokenizer(tmp_path / "a" / "checkpoint-2", base_model))[0]),
        (4, asked.model),
    ):
        expected = [one.answer for one in answers_with(model.eval(), tokenizer, settings, PROMPTS[:2])]
        assert [one["answer"] for one in found if one["step"] == step] == expected


def with_tokenizer(checkpoint: Path, base_model: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((base_model / name).read_bytes())
    return checkpoint


def test_a_resumed_run_has_each_sample_once(base_model: Path, tmp_path: Path) -> None:
    _, tokenizer = verify.load(base_model)
    file = tmp_path / "samples.jsonl"
    train(base_model, tmp_path / "a", [SampleAnswers(file, tokenizer, PROMPTS[:1], max_new_tokens=6)])
    before = list(samples.read(file))
    again = [SampleAnswers(file, tokenizer, PROMPTS[:1], max_new_tokens=6)]
    train(base_model, tmp_path / "a", again, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert [one["step"] for one in samples.read(file)] == [2, 4]
    assert list(samples.read(file)) == before
