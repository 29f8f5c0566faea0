"""Files of prompts in, files of answers out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from train import cli
from train.finetune.generate import GenerateSettings, generate


def _call(*argv: object) -> int:
    return cli.run(GenerateSettings, generate, [str(word) for word in argv], description="", example="")


def _ask(base_model: Path, *argv: object) -> int:
    return _call("--model_name_or_path", base_model, "--device", "cpu", "--max_new_tokens", 4, *argv)


def test_records_keep_their_keys(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, written = tmp_path / "asked.jsonl", tmp_path / "out" / "said.jsonl"
    records = [{"id": 7, "prompt": "the cat\n二行"}, {"prompt": "犬\u2028は", "more": [1]}]
    given.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    assert _ask(base_model, "--prompt_file", given, "--output_file", written, "--batch_size", 2) == 0
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").split("\n") if line]
    assert [{key: line[key] for key in record} for line, record in zip(lines, records, strict=True)] == records
    assert [set(line) for line in lines] == [{*record, "answer", "tokens", "ended"} for record in records]
    assert _ask(base_model, "--prompt_file", given, "--json") == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line.startswith("{")]
    assert [one["answer"] for one in shown] == [line["answer"] for line in lines]


def test_lines_of_text_become_records(base_model: Path, tmp_path: Path) -> None:
    given, written = tmp_path / "asked.txt", tmp_path / "said.jsonl"
    given.write_text("the cat\r\n\n犬\n", encoding="utf-8")
    assert _ask(base_model, "--prompt_file", given, "--output_file", written) == 0
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat", "犬"]


def test_an_existing_file_is_kept(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "said.jsonl"
    written.write_text("mine")
    assert _ask(base_model, "--prompt", "the cat", "--output_file", written) == 2
    assert "said.jsonl exists already: pass --overwrite" in capsys.readouterr().err
    assert written.read_text() == "mine"
    assert _ask(base_model, "--prompt", "the cat", "--output_file", written, "--overwrite") == 0
    assert json.loads(written.read_text())["prompt"] == "the cat"


def test_a_failure_leaves_nothing(base_model: Path, tmp_path: Path) -> None:
    given = tmp_path / "asked.txt"
    given.write_text("the cat\n" + "the cat " * 100)
    assert _ask(base_model, "--prompt_file", given, "--output_file", tmp_path / "said.jsonl") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["asked.txt"]


def test_all_bad_lines_are_told_at_once(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "{": "broken JSON",
        "[1]": 'an object with "prompt" or "messages" is expected',
        '{"text": "x"}': 'an object with "prompt" or "messages" is expected',
        '{"prompt": " "}': '"prompt" must be a text that is not blank',
        '{"prompt": "x", "answer": "y"}': "the key 'answer' is where the answer goes",
        '{"messages": []}': '"messages" must be a list',
        '{"messages": [{"role": "assistant", "content": "x"}]}': "whose last one is by the user",
    }
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join([*bad, *["{"] * 5]))
    assert _ask(base_model, "--prompt_file", file) == 2
    said = capsys.readouterr().err
    for number, message in enumerate(bad.values(), start=1):
        assert any(f"line {number}: " in line and message in line for line in said.splitlines()), message
    assert "2 more records are no prompts" in said


def test_messages_need_a_chat_template(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    assert _ask(base_model, "--prompt_file", file) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["asked.json", "asked.jsonl.gz"])
def test_a_list_and_a_compressed_file(base_model: Path, tmp_path: Path, name: str) -> None:
    records = [{"id": 1, "prompt": "the cat"}, {"id": 2, "prompt": "犬"}]
    given, written = tmp_path / name, tmp_path / "said.jsonl"
    if name.endswith(".json"):
        given.write_text(json.dumps(records, indent=1))
    else:
        given.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    assert _ask(base_model, "--prompt_file", given, "--output_file", written) == 0
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["prompt"]) for line in lines] == [(1, "the cat"), (2, "犬")]


@pytest.mark.parametrize("name", ["asked.parquet", "asked.txt.gz", "asked.zip"])
def test_what_is_no_text_is_not_read_as_lines(
    base_model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("the cat")
    assert _ask(base_model, "--prompt_file", tmp_path / name) == 2
    assert f"{name}: prompts come in .jsonl, .json" in capsys.readouterr().err


def test_records_without_a_prompt(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "asked.json").write_text("[]")
    assert _ask(base_model, "--prompt_file", tmp_path / "asked.json") == 2
    assert "has no prompt" in capsys.readouterr().err


def test_a_system_prompt_needs_a_chat_template(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ask(base_model, "--prompt", "the cat", "--system_prompt", "Be brief.") == 2
    assert "--system_prompt: the model has no chat template" in capsys.readouterr().err
