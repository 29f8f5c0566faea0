"""The launcher: numbers of a model and its base in evaluation.json and the card, and one message for what is wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_samples import tiny_model  # type: ignore[import-not-found]

from train import cli, manifest
from train.evaluate import harness, record
from train.evaluate.evaluate import evaluate
from train.evaluate.measures import distinct_names
from train.evaluate.settings import EvaluateSettings
from train.hub.card import model_card


def call(*argv: object) -> int:
    return cli.run(EvaluateSettings, evaluate, [str(word) for word in argv], description="", example="")


def likeliest(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    said: list[int] = []
    while len(said) < count and (not said or said[-1] != 2):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "held out.jsonl"
    texts = ["the cat sees", "犬は猫", "", "x" * 50]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def question_file(tmp_path: Path, bytes_: Any) -> Path:
    """Two questions that the model answers rightly, one that the base does, one that nobody does."""
    model, base = tiny_model(bytes_), tiny_model(bytes_, seed=2)
    asked = [(model, "cat"), (model, "dog"), (base, "sun"), (None, "moon")]
    file = tmp_path / "qa.jsonl"
    records = [{"question": q, "answer": likeliest(of, bytes_, q, 5) if of else "no such answer"} for of, q in asked]
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    return file


def test_before_and_after(
    model_folder: Path, other_folder: Path, text_file: Path, question_file: Path, bytes_: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = (model_folder / "manifest.json").read_bytes()
    argv = ["--model_name_or_path", model_folder, "--base_model", other_folder, "--device", "cpu"]
    argv += ["--text_files", text_file, "--question_files", question_file, "--squad_files", question_file]
    assert call(*argv, "--max_new_tokens", 5, "--squad_prompt", "{question}", "--normalisation", "none") == 0
    shown = capsys.readouterr().out
    found = json.loads((model_folder / "evaluation.json").read_text())
    assert found["step"] == "evaluate_model"
    assert {"path": str(question_file), "bytes": question_file.stat().st_size} in [
        {key: one[key] for key in ("path", "bytes")} for one in found["inputs"]
    ]
    measured = found["results"]["measured"]
    assert list(measured) == ["perplexity: held out.jsonl", "SQuAD: qa.jsonl", "exact match: qa.jsonl"]

    exact = measured["exact match: qa.jsonl"]
    assert (exact["model"]["exact_match"], exact["base"]["exact_match"]) == (50.0, 25.0)
    assert exact["normalisation"] == "none" and exact["base_name"] == "base"
    assert exact["model"]["questions"] == 4 and exact["model"]["chat_template"] is False
    assert measured["SQuAD: qa.jsonl"]["model"]["exact_match"] >= 50.0

    perplexity = measured["perplexity: held out.jsonl"]
    for role, seed in (("model", 1), ("base", 2)):  # a token is a byte, and each has its place in one window or two
        numbers = perplexity[role]
        assert numbers["tokens"] == numbers["bytes"] == 12 + 9 + 50
        assert numbers["perplexity_per_token"] == numbers["perplexity_per_byte"]
        model = tiny_model(bytes_, seed=seed)
        ids = torch.tensor([[4, *bytes_("the cat sees")["input_ids"]]])
        with torch.no_grad():
            nats = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        short = model_folder.parent / "short.txt"
        short.write_text("the cat sees\n")
        folder = model_folder if role == "model" else other_folder
        assert call("--model_name_or_path", folder, "--text_files", short, "--device", "cpu") == 0
        own = json.loads((folder / "evaluation.json").read_text())["results"]["measured"]["perplexity: short.txt"]
        assert own["model"]["perplexity_per_token"] == pytest.approx(math.exp(float(nats) / 12), rel=1e-4)
        assert own["model"]["window"] == 32 and own["model"]["document_start"] == "<EOD>"

    answers = model_folder / "evaluation" / "exact_match_qa.jsonl_model.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["exact_match"] for line in lines] == [100.0, 100.0, 0.0, 0.0]
    assert lines[3]["answers"] == ["no such answer"] and lines[3]["prompt"] == "moon"
    assert (model_folder / "evaluation" / "SQuAD_qa.jsonl_base.jsonl").is_file()
    assert re.search(r"exact match \(%\) +25\.0000 +50\.0000\n", shown) and re.search(r" before +after\n", shown)
    assert (
        model_folder / "manifest.json"
    ).read_bytes() == before  # what is made of a model later, knows it by its hash

    card = model_card(model_folder, repository="me/tiny")
    assert "## Evaluation" in card and "| | base model | this model |" in card
    assert "| exact match: qa.jsonl, exact match (%) | 25.0000 | 50.0000 |" in card
    assert f"| perplexity: short.txt, perplexity per token |  | {own_number(model_folder)} |" in card
    assert str(model_folder.parent) not in card


def own_number(folder: Path) -> str:
    found = json.loads((folder / "evaluation.json").read_text())["results"]["measured"]["perplexity: short.txt"]
    return f"{found['model']['perplexity_per_token']:,.4f}"


def test_measurements_join_until_the_model_changes(model_folder: Path, text_file: Path, question_file: Path) -> None:
    argv = ["--model_name_or_path", model_folder, "--device", "cpu"]
    assert call(*argv, "--text_files", text_file) == 0
    assert call(*argv, "--question_files", question_file, "--max_new_tokens", 2) == 0
    assert len(record.of_model(model_folder)) == 2
    config = model_folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, 9]}))
    assert record.of_model(model_folder) == {}
    assert "## Evaluation" not in model_card(model_folder, repository="me/tiny")
    assert call(*argv, "--question_files", question_file, "--max_new_tokens", 2) == 0
    assert list(record.of_model(model_folder)) == ["exact match: qa.jsonl"]


def test_an_output_of_its_own(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (model_folder / "manifest.json").unlink()
    before = {file.name for file in model_folder.iterdir()}
    out = tmp_path / "numbers"
    assert (
        call("--model_name_or_path", model_folder, "--text_files", text_file, "--output_dir", out, "--device", "cpu")
        == 0
    )
    assert manifest.read(out / "evaluation.json")["results"]["model"] == "tiny"
    assert {file.name for file in model_folder.iterdir()} == before


def test_files_of_one_name_are_told_apart_by_their_folders(
    model_folder: Path, text_file: Path, question_file: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(text_file.read_bytes())
        (tmp_path / name / "qa.jsonl").write_bytes(question_file.read_bytes())
    argv = ["--model_name_or_path", model_folder, "--device", "cpu", "--max_new_tokens", 2]
    argv += ["--text_files", tmp_path / "a" / "*x.jsonl", tmp_path / "b" / "*x.jsonl"]
    assert call(*argv, "--question_files", tmp_path / "a" / "qa.jsonl", tmp_path / "b" / "qa.jsonl") == 0
    titles = ["perplexity: a/*x.jsonl", "perplexity: b/*x.jsonl", "exact match: a/qa.jsonl", "exact match: b/qa.jsonl"]
    assert list(record.of_model(model_folder)) == titles
    assert sorted(file.name for file in (model_folder / "evaluation").iterdir()) == [
        "exact_match_a_qa.jsonl_model.jsonl", "exact_match_b_qa.jsonl_model.jsonl",
    ]  # fmt: skip


def test_names() -> None:
    assert distinct_names(["/d/a/x", "/d/b/x", "y"]) == ["a/x", "b/x", "y"]
    assert distinct_names([Path("x"), Path("a/x"), Path("b/a/x")]) == ["x", "a/x", "b/a/x"]


def test_the_record_says_how_it_was_measured(model_folder: Path, text_file: Path, question_file: Path) -> None:
    argv = ["--model_name_or_path", model_folder, "--device", "cpu", "--text_files", text_file, "--json_key", "text"]
    argv += ["--squad_files", question_file, "--question_files", question_file, "--max_documents", 2]
    argv += ["--max_new_tokens", 3, "--stop_at", "\\n", "--squad_prompt", "{question}?", "--raw", "--max_questions", 2]
    assert call(*argv) == 0
    measured = record.of_model(model_folder)
    perplexity = {"ends_scored": False, "json_key": "text", "on_error": "stop", "max_documents": 2}
    assert perplexity.items() <= measured["perplexity: held out.jsonl"].items()
    asked = {"max_new_tokens": 3, "stop_at": "\\n", "raw": True, "max_questions": 2, "data_format": "auto"}
    assert (asked | {"normalisation": "blanks"}).items() <= measured["exact match: qa.jsonl"].items()
    assert (asked | {"squad_prompt": "{question}?"}).items() <= measured["SQuAD: qa.jsonl"].items()


def test_the_end_token_of_a_text_is_no_part_of_its_answer(model_folder: Path, tmp_path: Path, bytes_: Any) -> None:
    said = likeliest(tiny_model(bytes_), bytes_, "cat", 5)
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"text": f"#Q: cat#A: {said}</s>"}) + "\n")
    argv = ["--model_name_or_path", model_folder, "--question_files", file, "--device", "cpu", "--max_new_tokens", 5]
    assert call(*argv, "--instruction_template", "#Q:", "--response_template", "#A:") == 0
    assert record.of_model(model_folder)["exact match: chats.jsonl"]["model"]["exact_match"] == 100.0


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    model_folder: Path, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("train.generate.model.load", lambda *args, **more: pytest.fail("a model was loaded"))
    argv = ["--model_name_or_path", model_folder, "--question_files", question_file, "--device", "cpu"]
    (tmp_path / "file").write_text("")
    assert call(*argv, "--output_dir", tmp_path / "file" / "below") == 2
    assert "below" not in [file.name for file in tmp_path.rglob("*")]
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "evaluation").write_text("a file where the answers' folder would be")
    assert call(*argv, "--output_dir", tmp_path / "numbers") == 2
    assert "evaluation is a file, a folder was expected" in capsys.readouterr().err


def test_trying_an_output_leaves_no_folder(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "numbers"
    argv = ["--model_name_or_path", model_folder, "--text_files", text_file, "--device", "cpu", "--window", 64]
    assert call(*argv, "--output_dir", out) == 2
    assert not (tmp_path / "new").exists()


def test_where_an_answer_ends(model_folder: Path, question_file: Path, bytes_: Any) -> None:
    said = likeliest(tiny_model(bytes_), bytes_, "cat", 5)
    argv = ["--model_name_or_path", model_folder, "--question_files", question_file, "--device", "cpu"]
    assert call(*argv, "--max_new_tokens", 5, "--stop_at", said[2]) == 0
    file = model_folder / "evaluation" / "exact_match_qa.jsonl_model.jsonl"
    assert json.loads(file.read_text().splitlines()[0])["prediction_text"] == said.partition(said[2])[0].strip()


def test_bfloat16(model_folder: Path, text_file: Path) -> None:
    argv = ["--model_name_or_path", model_folder, "--text_files", text_file, "--device", "cpu", "--precision"]
    found = []
    for precision in ("fp32", "bf16"):
        assert call(*argv, precision) == 0
        found.append(record.of_model(model_folder)["perplexity: held out.jsonl"]["model"])
    assert [one["precision"] for one in found] == ["float32", "bfloat16"]
    assert found[0]["bits_per_byte"] != found[1]["bits_per_byte"] == pytest.approx(found[0]["bits_per_byte"], rel=0.05)


def test_all_problems_of_the_data_at_once(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", model_folder, "--text_files", "no.jsonl", "--squad_files", "no.json"]
    assert call(*argv, "--question_files", "none.jsonl") == 2
    said = capsys.readouterr().err
    assert "3 problems" in said and "no.jsonl" in said and "--squad_files no.json" in said and "none.jsonl" in said
    assert not (model_folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure"),
        (["--text_files", "x", "--window", 0], "--window 0: it must be at least 1"),
        (["--text_files", "x", "--window", 4, "--stride", 4], "--stride 4: it must be below --window 4"),
        (["--text_files", "x", "--batch_size", 0], "--batch_size 0"),
        (["--text_files", "x", "--max_documents", -1], "--max_documents -1: it must not be negative"),
        (["--question_files", "x", "--stop_at", ""], "--stop_at is empty"),
        (["--squad_files", "x", "--squad_prompt", "Q"], "has no {question}"),
        (["--text_files", "a/x.txt", "./a/x.txt"], "--text_files names a/x.txt more than once"),
        (["--question_files", "x", "--instruction_template", " "], "--instruction_template is empty"),
        (["--text_files", "x", "--stop_at", "x"], "--stop_at has no effect without --squad_files or --question_files"),
        (["--text_files", "x", "--raw", "true"], "--raw has no effect without --squad_files or --question_files"),
        (["--text_files", "x", "--max_questions", 3], "--max_questions has no effect without --squad_files or"),
        (["--squad_files", "x", "--normalisation", "nfkc"], "--normalisation has no effect without --question_files"),
        (["--question_files", "x", "--squad_prompt", "{question}"], "--squad_prompt has no effect without --squad_fi"),
        (["--question_files", "x", "--max_documents", 3], "--max_documents has no effect without --text_files"),
        (["--question_files", "x", "--lm_eval_num_fewshot", 3], "has no effect without --lm_eval_tasks"),
    ],
)
def test_bad_settings(words: list[object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--model_name_or_path", "m", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", 64], "--window 64: the model has 32 positions"),
        (["--stride", 32], "--stride 32: it must be below the window of 32"),
        (["--document_start", "<x>"], "--document_start '<x>' is no token"),
        (["--json_key", "body"], "no key 'body'"),
        (["--base_model", "./none"], "--base_model ./none: there is no such folder"),
        (["--adapter", "./none"], "has no adapter_config.json"),
        (["--output_dir", "{file}"], "is a file, a folder is expected"),
    ],
)
def test_what_cannot_be_measured(
    model_folder: Path, text_file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(word).format(file=text_file) for word in words]
    assert call("--model_name_or_path", model_folder, "--text_files", text_file, "--device", "cpu", *words) == 2
    assert message in capsys.readouterr().err
    assert not (model_folder / "evaluation.json").exists()


def test_nothing_is_written_into_a_folder_of_others(
    model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "manifest.json").unlink()
    assert call("--model_name_or_path", model_folder, "--text_files", text_file, "--device", "cpu") == 2
    assert "pass --output_dir" in capsys.readouterr().err


def test_the_harness_is_refused_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert call("--model_name_or_path", "m", "--lm_eval_tasks", "hellaswag") == 2
    assert "lm-evaluation-harness is not installed: pip install lm-eval" in capsys.readouterr().err


def test_what_the_harness_says() -> None:
    """As version 0.4 gives it."""
    given = {"hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.5},
             "gsm8k": {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": "N/A"}}  # fmt: skip
    assert harness.parse_results(given) == {
        "hellaswag": {"acc": 0.25, "acc_norm": 0.5},
        "gsm8k": {"exact_match (strict-match)": 1.0},
    }


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--model_name_or_path", "m", "--base_model", "b", "--text_files", "x", "--dry_run") == 0
    assert "would measure m and b:\n  perplexity: x\n" in capsys.readouterr().out


def test_what_tables_show_of_the_harness() -> None:
    numbers = {"arc, acc": 0.5, "arc, f1": None, "precision": "float32"}
    taken = {"lm-evaluation-harness: arc": {"measure": "lm-evaluation-harness", "model": numbers}}
    assert list(record.rows(taken)) == [
        ("lm-evaluation-harness: arc", "arc, acc", "", "0.5000"),
        ("lm-evaluation-harness: arc", "arc, f1", "", "not finite"),
    ]


def test_an_adapter_is_measured_against_its_base(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = tmp_path / "adapter"
    wanted = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    live = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), wanted)
    for name, weight in live.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    live.save_pretrained(adapter)
    (adapter / "manifest.json").write_bytes((model_folder / "manifest.json").read_bytes())
    argv = ["--model_name_or_path", adapter, "--base_model", model_folder, "--text_files", text_file, "--device", "cpu"]
    assert call(*argv) == 0
    measured = record.of_model(adapter)["perplexity: held out.jsonl"]
    assert measured["base_name"] == "tiny"
    assert measured["model"]["bits_per_byte"] != measured["base"]["bits_per_byte"]
    assert call("--model_name_or_path", model_folder, "--text_files", text_file, "--device", "cpu") == 0
    alone = record.of_model(model_folder)["perplexity: held out.jsonl"]["model"]
    assert alone["bits_per_byte"] == measured["base"]["bits_per_byte"]
