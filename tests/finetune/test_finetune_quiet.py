"""What the libraries say among themselves does not reach people: of what a user can do something about, we tell."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import SCRIPTS, argv  # type: ignore[import-not-found]

from train import process
from train.process import Command

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_best": True, "eval_size": 3, "eval_steps": 1, "save_steps": 1, "learning_rate": 1},
        {"use_peft": True, "merge": True, "num_processes": 2},
    ],
    ids=["best checkpoint of a tied model", "adapter and merge, two processes"],
)
def test_no_library_is_heard(
    files: dict[str, Any],
    changes: dict[str, Any],
    base_model: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
) -> None:
    """With a record that is longer than the tokenizer's own limit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tied = tmp_path / "tied-gpt2"
    shutil.copytree(base_model, tied)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=128, n_embd=32, n_layer=2, n_head=4, **ids)).save_pretrained(
        tied
    )
    data = write_jsonl([{"prompt": "the cat", "completion": "sees a dog " * length} for length in (1, 2, 3, 4, 99)])
    words = argv(files, model_name_or_path=tied, data_files=data, max_steps=2, show_examples=0, **changes)
    status, told = process.capture(Command(("bash", str(SCRIPTS / "finetune.sh"), *words)), timeout_s=300)
    assert status == 0, told
    assert "1 examples truncated" in told
    assert not re.search(r"Warning|\[(transformers|TRL|PEFT)\]|missing keys|longer than the specified", told), told
    if "keep_best" in changes:
        assert "is no better than the base model on the held-out data" in told
