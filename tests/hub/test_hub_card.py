"""The model card says what the manifests say, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from train import manifest
from train.checkpoint import verification
from train.errors import UserError
from train.hub.card import model_card


def header(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_card_has_data_sizes_layout_losses_software(model_folder: Path) -> None:
    logits = {"compared_with": "the run", "relative_difference": 2.5e-7, "tolerance": 1e-4}
    checks = {
        "weights": {"compared_with": "/x/global_step9", "parameters": 123456, "max_abs_difference": 0.0},
        "logits": logits | {"measure": "max |a| / max |b|"},
        "tokenizer": {"compared_with": "tiny.model", "mismatches": 0, "texts": 5000},
    }
    verification.write(model_folder, checks)
    card = model_card(model_folder, repository="me/tiny", license="apache-2.0")
    assert header(card) == {"library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text-generation"}
    for line in (
        "# tiny",
        "A gpt2 model of 123,456 parameters.",
        "| layers | 2 |",
        "| longest sequence (tokens) | 64 |",
        "| documents | 4,321 |",
        "| inputs | wikipedia.jsonl |",
        "| tokens | 1,234,567 |",
        "| layout: zero stage | 1 |",
        "| global batch size | 1,536 |",
        "| lr | 0.002 |",
        "| 1 | 8.9500 |",
        "| 100 | 4.0000 |",
        "| characters per token | 3.5 |",
        "| weights against global_step9 | largest difference 0 |",
        r"| logits against the run | 2.5e-07, allowed 0.0001 (max \|a\| / max \|b\|) |",
        "| tokenizer against tiny.model | 0 mismatches in 5,000 texts |",
        "| deepspeed | 0.19.8 |",
    ):
        assert line in card.splitlines(), line
    assert card.count("| step | loss |") == 1
    assert len([line for line in card.splitlines() if line.endswith("00 |") and line.count("|") == 3]) <= 20
    assert 'from_pretrained("me/tiny")' in card


def test_no_path_of_this_machine_is_in_the_card(model_folder: Path) -> None:
    card = model_card(model_folder, repository="me/tiny")
    assert "/home" not in card
    assert str(model_folder.parent) not in card
    assert "| checkpoint | global_step100 |" in card


def test_nothing_is_invented(model_folder: Path) -> None:
    (model_folder / "manifest.json").unlink()
    card = model_card(model_folder, repository="me/tiny")
    assert "license" not in card
    assert "base_model" not in card
    for title in ("Training data", "Pretraining", "Software", "Finetuning"):
        assert f"## {title}" not in card


def test_the_card_is_the_same_every_time(model_folder: Path) -> None:
    assert model_card(model_folder, repository="a/b") == model_card(model_folder, repository="a/b")


def finetuned(folder: Path, base: str, inputs: tuple[Path, ...] = (), *, is_on_hub: bool | None = None) -> None:
    origin = {"base_model": base} | ({} if is_on_hub is None else {"base_model_on_hub": is_on_hub})
    manifest.write(
        folder / "manifest.json",
        step="finetune_model",
        settings={"model_name_or_path": base},
        inputs=inputs,
        results=origin | {"examples": 77, "last_loss": 1.5, "loss_curve": [[1, 2.0], [2, 1.5]]},
        started=time.time(),
    )


def test_a_finetuned_models_card_follows_its_base_folder(
    model_folder: Path, model_folder_of_session: Path, tmp_path: Path
) -> None:
    finetuned(model_folder, str(model_folder_of_session), (model_folder_of_session / "config.json",), is_on_hub=False)
    card = model_card(model_folder, repository="me/chat")
    assert "| examples | 77 |" in card
    assert "| documents | 4,321 |" in card  # of the base model's data
    assert card.index("## Pretraining") < card.index("## Finetuning")
    assert "base_model" not in header(card)  # a folder is no name on the Hub
    assert header(model_card(model_folder, repository="me/chat", base_model="me/tiny"))["base_model"] == "me/tiny"


def test_a_base_model_of_the_hub_is_named(model_folder: Path) -> None:
    finetuned(model_folder, "llm-jp/llm-jp-1.3b-v1.0", is_on_hub=True)
    card = model_card(model_folder, repository="me/chat")
    assert header(card)["base_model"] == "llm-jp/llm-jp-1.3b-v1.0"
    assert "finetuned from [llm-jp/llm-jp-1.3b-v1.0](https://huggingface.co/llm-jp/llm-jp-1.3b-v1.0)" in card
    assert "| base model | llm-jp/llm-jp-1.3b-v1.0 |" in card


@pytest.mark.parametrize("is_on_hub", [False, None])  # None: a manifest that does not say
@pytest.mark.parametrize("base", ["secret/base", "./secret/base", "../secret dir/my base", "/secret/a dir/my base"])
def test_a_base_folder_is_no_name_on_the_hub(
    model_folder: Path, base: str, is_on_hub: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetuned(model_folder, base, is_on_hub=is_on_hub)
    monkeypatch.chdir(tmp_path)  # where that folder is not
    card = model_card(model_folder, repository="me/chat")
    assert "base_model" not in header(card)
    assert "secret" not in card
    assert "huggingface.co" not in card
    assert f"| base model | {Path(base).name} |" in card


def test_no_relative_path_is_in_the_card(model_folder: Path) -> None:
    record = json.loads((model_folder / "manifest.json").read_text())
    planted = {"checkpoint": "secret/run 1/global_step100", "parts": {"secret dir/corpus": "../secret/x y"}}
    record["results"]["lineage"][0]["results"] |= planted
    (model_folder / "manifest.json").write_text(json.dumps(record))
    card = model_card(model_folder, repository="me/tiny")
    assert "secret" not in card
    assert "| checkpoint | global_step100 |" in card
    assert "| parts: corpus | x y |" in card


def test_the_manifests_of_inputs_are_followed(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "conversations.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    manifest.write(
        data.parent / "manifest.json",
        step="preprocess_conversations",
        settings={},
        inputs=[],
        results={"conversations": 99},
        started=time.time(),
    )
    finetuned(model_folder, "me/base", (data, model_folder / "config.json"))
    card = model_card(model_folder, repository="me/chat")
    assert "| conversations | 99 |" in card
    assert "| inputs | conversations.jsonl |" in card  # the data, not the base model's files


def test_a_model_without_a_config_is_refused(model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        model_card(model_folder, repository="me/tiny")


def test_a_list_in_a_result_is_no_row(model_folder: Path) -> None:
    record = json.loads((model_folder / "manifest.json").read_text())
    record["results"]["lineage"][0]["results"] |= {"argv": ["--secret", "x"], "eval_loss": None}
    (model_folder / "manifest.json").write_text(json.dumps(record))
    card = model_card(model_folder, repository="me/tiny")
    assert "--secret" not in card
    assert "None" not in card
    assert "sha256" not in card
