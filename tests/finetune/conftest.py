"""Tiny tokenizers of both kinds, a tiny model, and conversations in Japanese, English and emoji."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import byte_level, converted_sentencepiece  # type: ignore[import-not-found]


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind: converted by step 3, and GPT-2's and Llama 3's kind."""
    makers: dict[str, Callable[[Path], None]] = {
        "unigram": lambda folder: converted_sentencepiece(folder, "unigram"),
        "bpe": lambda folder: converted_sentencepiece(folder, "bpe"),
        "byte_level": byte_level,
    }
    folders = {}
    for name, make in makers.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name])
    return folders


@pytest.fixture(params=["unigram", "bpe", "byte_level"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_dirs: dict[str, Path]) -> Any:
    """Each kind, with the project's chat template."""
    from transformers import AutoTokenizer

    from train.finetune import chat_template

    loaded = AutoTokenizer.from_pretrained(tokenizer_dirs[request.param])
    loaded.chat_template = chat_template.build("### Human:", "### Assistant:")
    return loaded


@pytest.fixture(scope="session")
def base_model(tokenizer_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, as step 3 hands it over."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_dirs["unigram"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = {"step": "convert_model", "settings": {}, "inputs": [], "results": {}, "software": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(records: list[Any], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return file

    return write


@pytest.fixture
def question_file(write_jsonl: Callable[..., Path]) -> Path:
    """Twelve questions with answers that a tiny model can learn by heart."""
    names = ["cat", "dog", "sun", "moon", "sea", "sky", "猫", "犬", "日", "月", "海", "空"]
    return write_jsonl(
        [{"text": f"### Human: what is {name}?### Assistant: {name} is {name[::-1]}."} for name in names], "qa.jsonl"
    )


@pytest.fixture
def files(base_model: Path, question_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A call that would work."""
    return {
        "model_name_or_path": base_model,
        "data_files": question_file,
        "output_dir": tmp_path / "out",
        "max_seq_length": 128,
        "device": "cpu",
    }
