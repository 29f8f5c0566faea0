"""Several sources are mixed by their weights, the same way by the same seed, and a part can be held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.finetune import examples, mixture
from train.finetune.settings import FinetuneSettings
from train.finetune.sources import find_sources


@pytest.mark.parametrize(
    ("weights", "sizes", "expected"),
    [
        ([2, 1], [100, 500], [400, 200]),
        ([1, 1], [3, 4], [4, 3]),  # of two equal remainders the first gets the odd one
        ([0.7, 0.2, 0.1], [10, 10, 10], [21, 6, 3]),
        ([1, 1e-9], [5, 5], [10, 1]),
        ([3], [7], [7]),
    ],
)
def test_one_pass_has_as_many_examples_as_there_are(
    weights: list[float], sizes: list[int], expected: list[int]
) -> None:
    assert mixture.take_counts(weights, sizes=sizes) == expected


def test_which_examples_are_taken() -> None:
    assert mixture.choose(3, 6, seed=1, source=0) == [0, 0, 1, 1, 2, 2]
    some = mixture.choose(100, 30, seed=1, source=0)
    assert len(set(some)) == 30 and some == sorted(some)
    assert some == mixture.choose(100, 30, seed=1, source=0)
    assert some != mixture.choose(100, 30, seed=2, source=0) != mixture.choose(100, 30, seed=2, source=1)
    counted = Counter(mixture.choose(100, 130, seed=1, source=0))
    assert sorted(counted.values()) == [1] * 70 + [2] * 30


@pytest.fixture
def data(write_jsonl: Callable[..., Path]) -> tuple[Path, Path]:
    """Ten and thirty records, which can be told apart by their answers."""
    few = [{"prompt": "Q", "completion": f"few {n}"} for n in range(10)]
    many = [{"instruction": "Q", "output": f"many {n}"} for n in range(30)]
    return write_jsonl(few, "few.jsonl"), write_jsonl(many, "many.jsonl")


def _settings(data: tuple[Path, ...], **given: Any) -> FinetuneSettings:
    return FinetuneSettings("owner/name", Path("out"), tuple(map(str, data)), max_seq_length=128, **given)


def _prepared(tokenizer: Any, settings: FinetuneSettings, folder: Path) -> tuple[Any, Any, list[str], list[str]]:
    """The two accounts, and the texts that are trained on and held out."""
    from datasets import Dataset

    sources = find_sources(settings.data_files, settings.data_weights, flag="--data_files")
    train, held_out = folder / "train.arrow", folder / "eval.arrow"
    account, eval_account = examples.prepare_all(tokenizer, sources, settings, train, held_out)
    texts: list[list[str]] = []
    for file, counted in ((train, account), (held_out, eval_account)):
        rows: Any = Dataset.from_file(str(file)) if counted else []
        if counted:
            assert counted.examples == len(rows)
            assert counted.tokens == sum(len(row["input_ids"]) for row in rows)
            assert counted.trained_tokens == sum(n != -100 for row in rows for n in row["labels"])
        texts.append([tokenizer.decode(row["input_ids"]).split(": ")[-1] for row in rows])
    return account, eval_account, *texts


def _kinds(texts: list[str]) -> dict[str, int]:
    return dict(Counter(text.split()[0] for text in texts))


def test_weights_are_kept_and_told(tokenizer: Any, data: tuple[Path, Path], tmp_path: Path) -> None:
    account, held_out, texts, _ = _prepared(tokenizer, _settings(data, data_weights=(3.0, 1.0)), tmp_path)
    assert held_out is None and _kinds(texts) == {"few": 30, "many": 10}
    assert sorted(Counter(text for text in texts if text.startswith("few")).values()) == [3] * 10
    assert len({text for text in texts if text.startswith("many")}) == 10
    told = account.summary()
    assert f"{data[0]}: 10 prompt_completion; weight 3: 30 of 10 examples (3.00x)" in told
    assert f"{data[1]}: 30 instruction; weight 1: 10 of 30 examples (0.33x)" in told
    assert account.as_dict()["sources"][1] == {
        "name": str(data[1]),
        "weight": 1.0,
        "formats": {"instruction": 30},
        "examples": 30,
        "taken": 10,
    }


def test_the_seed_decides_and_nothing_else(tokenizer: Any, data: tuple[Path, Path], tmp_path: Path) -> None:
    def texts(seed: int) -> list[str]:
        given = {"data_weights": (1.0, 1.0), "eval_size": 5.0, "seed": seed}
        _, _, trained, held_out = _prepared(tokenizer, _settings(data, **given), tmp_path)
        return [*trained, "|", *held_out]

    assert texts(1) == texts(1) != texts(2)


def test_without_weights_all_is_taken_in_order(tokenizer: Any, data: tuple[Path, Path], tmp_path: Path) -> None:
    account, held_out, texts, _ = _prepared(tokenizer, _settings(data), tmp_path)
    assert held_out is None
    assert texts == [f"few {n}</s>" for n in range(10)] + [f"many {n}</s>" for n in range(30)]
    assert f"{data[0]}: 10 prompt_completion\n" in account.summary()


@pytest.mark.parametrize(("size", "expected"), [(8.0, 8), (0.25, 10), (0.001, 1)])
def test_a_part_is_held_out(
    tokenizer: Any, data: tuple[Path, Path], tmp_path: Path, size: float, expected: int
) -> None:
    account, held_out, texts, others = _prepared(tokenizer, _settings(data, eval_size=size, show_examples=40), tmp_path)
    assert held_out.examples == len(others) == expected
    assert [tokenizer.decode(list(example.input_ids)).split(": ")[-1] for example in account.shown] == texts
    assert sorted([*texts, *others]) == sorted(
        [f"few {n}</s>" for n in range(10)] + [f"many {n}</s>" for n in range(30)]
    )


def test_what_is_held_out_is_not_trained_on_by_weight(tokenizer: Any, data: tuple[Path, Path], tmp_path: Path) -> None:
    given = {"data_weights": (5.0, 1.0), "eval_size": 0.5}
    account, _, texts, others = _prepared(tokenizer, _settings(data, **given), tmp_path)
    assert len(others) == 20 and not set(texts) & set(others)
    assert account.examples == 20 and _kinds(texts) == {"few": 17, "many": 3}


def test_a_record_that_is_too_long_does_not_count(tokenizer: Any, write_jsonl: Callable[..., Path]) -> None:
    file = write_jsonl(
        [{"prompt": "Q", "completion": "long " * 999}, {"prompt": "Q", "completion": "few 1"}], "l.jsonl"
    )
    account, _, texts, _ = _prepared(tokenizer, _settings((file,), too_long="drop", data_weights=(1.0,)), file.parent)
    assert texts == ["few 1</s>"] and account.dropped_too_long == 1


def test_what_cannot_be_mixed(tokenizer: Any, data: tuple[Path, Path], write_jsonl: Callable[..., Path]) -> None:
    long = write_jsonl([{"prompt": "Q", "completion": "long " * 999}], "long.jsonl")
    settings = _settings((data[0], long), data_weights=(1.0, 1.0), too_long="drop")
    with pytest.raises(UserError, match=r"long\.jsonl: no example, its weight cannot be met"):
        _prepared(tokenizer, settings, long.parent)
    with pytest.raises(UserError, match="--eval_size 40: there are 40 examples; some must be left"):
        _prepared(tokenizer, _settings(data, eval_size=40.0), long.parent)
    pattern = str(data[0].parent / "few*.jsonl")
    with pytest.raises(UserError, match="an entry before it names the same files"):
        find_sources([str(data[0]), pattern], [1, 1], flag="--data_files")
    assert [len(source.files) for source in find_sources([str(data[0]), pattern], [], flag="-")] == [1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_weights": (1.0,)}, "--data_weights has 1 numbers, --data_files 2 entries"),
        ({"data_weights": (1.0, 0.0)}, "--data_weights 0.0: a weight is above 0"),
        ({"data_weights": (1.0, float("nan"))}, "--data_weights nan: a weight is above 0"),
        ({"eval_size": -1.0}, "--eval_size -1.0: it is a number of examples, or a share below 1"),
        ({"eval_size": 1.5}, "--eval_size 1.5: it is a number of examples"),
        ({"eval_size": 0.5, "eval_data_files": ("x",)}, "--eval_size and --eval_data_files exclude each other"),
    ],
)
def test_bad_settings(data: tuple[Path, Path], given: dict[str, Any], message: str) -> None:
    (problem,) = _settings(data, **given).problems()
    assert message in problem


def test_the_account_is_plain_data(tokenizer: Any, data: tuple[Path, Path], tmp_path: Path) -> None:
    account, _, _, _ = _prepared(tokenizer, _settings(data), tmp_path)
    assert json.loads(json.dumps(account.as_dict()))["examples"] == 40
