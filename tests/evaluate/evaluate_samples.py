"""What the tests of evaluations share: tiny models, and a tokenizer of words and one of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<EOD>"]
WORDS = ["the", "cat", "sees", "a", "dog", "猫", "は", "犬", "を", "見る", "sun", "moon", "Paris", "Q:", "A:"]


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **NAMED)


def byte_tokenizer() -> Any:
    """A token for each byte, so that tokens and bytes are the same number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: n for n, token in enumerate(SPECIAL + alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **NAMED)


def tiny_model(tokenizer: Any, *, positions: int = 32, seed: int = 1) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, pad_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A finished model folder: weights, tokenizer, manifest."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = {"step": "finetune_model", "settings": {}, "inputs": [], "results": {}, "software": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
