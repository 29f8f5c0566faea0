"""Tokenizers and model folders for evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluate_samples import byte_tokenizer, save, tiny_model, word_tokenizer  # type: ignore[import-not-found]


@pytest.fixture(scope="session")
def words() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="session")
def bytes_() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model_folder(tmp_path: Path, bytes_: Any) -> Path:
    return save(tmp_path / "models" / "tiny", tiny_model(bytes_), bytes_)


@pytest.fixture
def other_folder(tmp_path: Path, bytes_: Any) -> Path:
    return save(tmp_path / "models" / "base", tiny_model(bytes_, seed=2), bytes_)
