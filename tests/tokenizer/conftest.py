"""A small corpus of this machine's own English and of Japanese, and tokenizers trained on it."""

from __future__ import annotations

import argparse
import inspect
import json
import pathlib
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from train.tokenizer.convert import convert_tokenizer
from train.tokenizer.train import TrainTokenizerSettings, train_tokenizer

JAPANESE = (
    "川は山から海へ流れる。町の人々は朝になると橋をわたり、市場で魚や野菜を買う。",
    "プログラムを書くときは、名前をよく考える。ガギグゲゴ、パピプペポ、１２３、ＡＢＣ。",
    "雨が降る日は本を読む。晴れた日は庭で花を植える。\nそして夜には星を見る。",
)


def sample_documents() -> list[str]:
    """About 150 documents: paragraphs of documented Python code, and Japanese."""
    source = inspect.getsource(argparse) + inspect.getsource(pathlib) + inspect.getsource(textwrap)
    lines = source.splitlines()
    code = ["\n".join(lines[start : start + 40]) for start in range(0, len(lines), 40)]
    return code + [f"{number}. {JAPANESE[number % 3]}" for number in range(30)]


def write_jsonl(file: Path, documents: list[str], *, key: str = "text") -> Path:
    file.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of `sample_documents()`."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", sample_documents())


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained("bpe", "identity")` gives the model file of such a tokenizer; each is trained once."""
    folder = tmp_path_factory.mktemp("models")

    def model(model_type: str = "unigram", normalization: str = "nmt_nfkc") -> Path:
        prefix = folder / f"{model_type}_{normalization}"
        if not prefix.with_suffix(".model").is_file():
            settings = TrainTokenizerSettings(
                input=(str(corpus),),
                model_prefix=prefix,
                vocab_size=1200 if model_type in ("unigram", "bpe") else 400,
                num_threads=1,
                model_type=model_type,
                normalization_rule_name=normalization,
            )
            assert train_tokenizer(settings) == 0
        return prefix.with_suffix(".model")

    return model


@pytest.fixture(scope="session")
def converted(
    trained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """`converted("bpe", "identity")` gives a model file and its Hugging Face folder; do not change the folder."""
    root = tmp_path_factory.mktemp("converted")

    def both(model_type: str = "unigram", normalization: str = "nmt_nfkc") -> tuple[Path, Path]:
        model_file = trained(model_type, normalization)
        folder = root / model_file.stem
        if not folder.is_dir():
            folder.mkdir()
            convert_tokenizer(model_file, folder, model_max_length=512)
        return model_file, folder

    return both


@pytest.fixture
def own_folder(converted: Callable[..., tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """A unigram model and a copy of its Hugging Face folder that a test may damage."""
    model_file, folder = converted()
    return model_file, Path(shutil.copytree(folder, tmp_path / "copy"))
