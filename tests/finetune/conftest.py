"""Tiny tokenizers of both kinds, a tiny model, and conversations in Japanese, English and emoji."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = [
    "the",
    "cat",
    "sees",
    "a",
    "dog",
    "猫",
    "は",
    "犬",
    "を",
    "見る。",
    "東京",
    "🙂",
    "👩\u200d👩\u200d👧",
    "naïve",
    "12,345",
]
WORDS += ["x=1", "###", "Human", "Assistant:", "\n", "\n\n", "", "", "", "(tab\t)", "Ω"]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]


def random_text(source: random.Random, words: int) -> str:
    return (" ".join(source.choice(WORDS) for _ in range(words))).strip() or "words"


def random_conversation(source: random.Random) -> list[dict[str, str]]:
    """Several turns; now and then a question quotes the templates, or an answer begins with blanks."""
    messages = [{"role": "system", "content": "Be brief. 短く。"}] if source.random() < 0.3 else []
    for _ in range(source.randint(1, 4)):
        question = random_text(source, source.randint(1, 12))
        if source.random() < 0.3:
            question += "\n### Assistant: not this one ### Human: nor this"
        answer = random_text(source, source.randint(1, 12))
        if source.random() < 0.2:
            answer = source.choice(["  ", "\n", "\t", " \n "]) + answer
        if source.random() < 0.2:
            answer += source.choice([" ", "\n", "🙂"])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _corpus() -> list[str]:
    source = random.Random(0)
    return [f"### Human: {random_text(source, 8)}\n### Assistant: {random_text(source, 8)}" for _ in range(400)]


def _sentencepiece_like() -> Any:
    """A Unigram tokenizer with byte fallback, as converted SentencePiece models are."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    learned = Tokenizer(models.Unigram())
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.pre_tokenizer = pre_tokenizers.Sequence(  # as SentencePiece has it: no piece goes beyond a word or a line
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    special = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    learned.train_from_iterator(_corpus(), trainer)
    vocabulary = [tuple(item) for item in json.loads(learned.to_str())["model"]["vocab"]]
    whole = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    whole.normalizer = learned.normalizer
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.add_special_tokens(SPECIAL_TOKENS)
    return whole


def _byte_level() -> Any:
    """A BPE tokenizer of GPT-2's and Llama 3's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind, with the two files that step 3 writes."""
    folders = {}
    for name, build in (("sentencepiece", _sentencepiece_like), ("byte_level", _byte_level)):
        folder = tmp_path_factory.mktemp(name)
        build().save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "split_special_tokens": name == "sentencepiece",
            "model_max_length": 128,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        folders[name] = folder
    return folders


@pytest.fixture(params=["sentencepiece", "byte_level"])
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
    for file in tokenizer_dirs["sentencepiece"].iterdir():
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
