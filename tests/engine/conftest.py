"""What the tests of the real engine share: a checkout to run, data for it, and one folder for its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_tiny_run import write_corpus

from train.engine.megatron_deepspeed import checkout


@pytest.fixture(scope="module")
def engine_path() -> str:
    """PYTHONPATH of an installed checkout."""
    found = checkout.find_checkout()
    if found is None:
        pytest.skip(checkout.why_missing())
    return checkout.python_path(found.path)


@pytest.fixture(scope="module")
def corpus(engine_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and data in one folder, where there is an engine to read them."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for all runs of a module."""
    return tmp_path_factory.mktemp("out put")
