"""lm-evaluation-harness itself, where it is installed, on a task of our own: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_samples import tiny_model  # type: ignore[import-not-found]

from train import cli
from train.evaluate import record
from train.evaluate.evaluate import evaluate
from train.evaluate.settings import EvaluateSettings

QUESTIONS = [("the cat", ["sees", "a dog", "sun"]), ("sun and", ["moon", "cat", "x"]), ("a", ["b", "cc", "ddd"])]


def call(*argv: object) -> int:
    return cli.run(EvaluateSettings, evaluate, [str(word) for word in argv], description="", example="")


def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """log p(continuation | context), with the blank between them."""
    before = tokenizer(context)["input_ids"]
    ids = tokenizer(f"{context} {continuation}")["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(len(before), len(ids)))


@pytest.mark.slow
def test_a_task_of_our_own(
    model_folder: Path, bytes_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = tiny_model(bytes_)
    best = []
    for context, choices in QUESTIONS:
        scores = [likelihood(model, bytes_, context, choice) for choice in choices]
        best.append(scores.index(max(scores)))
    labels = [best[0], best[1], (best[2] + 1) % 3]  # the model is wrong once
    data = tmp_path / "data.jsonl"
    records = [{"q": q, "choices": c, "label": one} for (q, c), one in zip(QUESTIONS, labels, strict=True)]
    data.write_text("".join(json.dumps(one) + "\n" for one in records))
    task = {
        "task": "own_task", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    file = tmp_path / "own_task.yaml"
    file.write_text(json.dumps(task))  # JSON is YAML
    assert (
        call("--model_name_or_path", model_folder, "--lm_eval_tasks", file, "--device", "cpu", "--batch_size", 2) == 0
    )
    measured = record.of_model(model_folder)["lm-evaluation-harness: own_task"]
    assert measured["model"]["own_task, acc"] == pytest.approx(2 / 3)
    assert "own_task, acc" in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_that_is_not_there(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    assert call("--model_name_or_path", model_folder, "--lm_eval_tasks", "no_such_task", "--device", "cpu") == 2
    assert "--lm_eval_tasks no_such_task: " in capsys.readouterr().err
