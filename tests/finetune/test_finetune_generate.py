"""Answers: the chat template around the prompt, the end at the end token, and one clear message for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train import cli
from train.finetune.generate import GenerateSettings, generate, prompt_ids


def _call(*argv: object) -> int:
    return cli.run(GenerateSettings, generate, [str(word) for word in argv], description="", example="")


def test_one_prompt_a_file_and_json(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n\n犬 は\n", encoding="utf-8")
    model = ["--model_name_or_path", base_model, "--device", "cpu", "--max_new_tokens", 5]
    assert _call(*model, "--prompt_file", file, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [record["prompt"] for record in records] == ["the cat", "犬 は"]
    assert all(
        0 < record["tokens"] <= 5 and set(record) == {"prompt", "answer", "tokens", "ended"} for record in records
    )
    assert _call(*model, "--prompt_file", file) == 0
    assert "> the cat\n" in capsys.readouterr().out


def test_a_seed_gives_the_same_answer_and_another_one_another(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for seed in (1, 1, 2):
        words = [
            "--model_name_or_path",
            base_model,
            "--prompt",
            "the cat",
            "--temperature",
            1,
            "--seed",
            seed,
            "--json",
        ]
        assert _call(*words, "--max_new_tokens", 20, "--device", "cpu") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_what_the_model_is_given(tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], add_generation_prompt=True)
    assert prompt_ids(tokenizer, "the cat", raw=False) == chat["input_ids"]
    assert prompt_ids(tokenizer, "the cat", raw=True) == tokenizer("the cat")["input_ids"]
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, "the cat", raw=False) == tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "name either --prompt or --prompt_file or --chat"),
        (["--prompt", "x", "--prompt_file", "x"], "name either --prompt or --prompt_file or --chat"),
        (["--prompt", "x", "--chat"], "name either --prompt or --prompt_file or --chat"),
        (["--prompt", "x", "--top_p", 0], "--top_p 0.0: it must be above 0 and at most 1"),
        (["--prompt", "x", "--top_k", -1], "--top_k -1: it must not be negative"),
        (["--prompt", "x", "--top_k", 5], "have no effect at --temperature 0"),
        (["--prompt", "x", "--num_beams", 0], "--num_beams 0: it must be at least 1"),
        (["--prompt", "x", "--batch_size", 0], "--batch_size 0: it must be at least 1"),
        (["--prompt", "x", "--repetition_penalty", 0], "--repetition_penalty 0.0: it must be above 0"),
        (["--prompt", "x", "--raw", "--system_prompt", "s"], "--raw leaves the chat template out"),
        (["--chat", "--num_beams", 2], "--num_beams 2: --chat shows words"),
        (["--chat", "--json"], "--chat is for the terminal"),
        (["--chat"], "the model has no chat template"),
        (["--prompt", "x", "--adapter", "./none"], "--adapter ./none has no adapter_config.json"),
        (["--prompt", " "], "--prompt is blank"),
        (["--prompt", "x", "--max_new_tokens", 0], "--max_new_tokens 0: it must be at least 1"),
        (["--prompt", "x", "--temperature", -1], "--temperature -1.0: it must not be negative"),
        (["--prompt_file", "none.txt"], "none.txt is not a file"),
        (["--prompt", "the cat " * 100], "the model 128 positions: shorten it"),
        (["--prompt", "x", "--model_name_or_path", "./none"], "./none: there is no such folder"),
    ],
)
def test_bad_calls(base_model: Path, changes: list[object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("--model_name_or_path", base_model, "--device", "cpu", *changes) == 2
    assert message in capsys.readouterr().err


def test_bad_prompt_files(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    for content, message in ((b"\xff", "is not UTF-8"), (b" \n", "has no prompt")):
        file.write_bytes(content)
        assert _call("--model_name_or_path", base_model, "--prompt_file", file) == 2
        assert message in capsys.readouterr().err


def test_no_gpu(base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _call("--model_name_or_path", base_model, "--prompt", "x", "--device", "cuda") == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_what_ends_an_answer() -> None:
    from train.finetune.generate import end_ids

    assert end_ids([7, 2], 2) == [2, 7]
    assert end_ids(None, 2) == [2]
    assert end_ids(7, None) == [7]


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("--model_name_or_path", "m", "--prompt", "x", "--dry_run") == 0
    assert "would let m answer the prompt" in capsys.readouterr().out
