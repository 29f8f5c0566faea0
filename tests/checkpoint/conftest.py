"""A tokenizer, and tiny GPT-2 and Llama checkpoints laid out as a pretraining run leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import TEXTS, VOCAB_SIZE, random_model, train_tokenizer, write_golden_logits


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred documents, one a line."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = " ".join(TEXTS).split(" ")
    documents = [" ".join(words[(3 * n + k * k) % len(words)] for k in range(12)) for n in range(300)]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return file


@pytest.fixture(scope="session")
def tokenizer_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with the project's special tokens. BPE: its scores need no rounding."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.model", corpus, VOCAB_SIZE)


MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Writes a checkpoint with random weights, large enough that a mistake shows, and its golden logits."""

    def make(
        architecture: str = "gpt2",
        *,
        rows: int = VOCAB_SIZE + 28,
        dtype: str = "float32",
        shards: int = 1,
        golden: bool = True,
        step: int = 3,
        positions: int = 64,
        **sizes: Any,
    ) -> Path:
        import torch

        model = random_model(architecture, rows=rows, positions=positions, **sizes).to(getattr(torch, dtype))
        step_dir = tmp_path / "run" / "checkpoint" / "tiny" / f"global_step{step}"
        size_kb = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // 1000
        shard_size = "50GB" if shards == 1 else f"{size_kb // shards}KB"
        model.save_pretrained(step_dir, max_shard_size=shard_size)
        (step_dir / "trainer_state.json").write_text("{}")
        (step_dir / "optimizer.pt").write_bytes(b"state")
        if golden:
            write_golden_logits(model, step_dir, dtype)
        (step_dir.parent / "latest").write_text(step_dir.name)
        return step_dir

    return make
