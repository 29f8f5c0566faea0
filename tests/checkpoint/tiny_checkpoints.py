"""Tiny tokenizers and models for the tests of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.tokenizer.special_tokens import USER_DEFINED_SYMBOLS

VOCAB_SIZE = 380
GOLDEN_TOKENS = 24
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "東京は日本の首都です。",
    "def f(x):\n    return x + 1",
    "🙂 naïve",
)


def train_tokenizer(file: Path, corpus: Path, vocab_size: int) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(json.loads(line)["text"] for line in corpus.read_text().splitlines()),
        model_prefix=str(file.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        hard_vocab_limit=True,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=list(USER_DEFINED_SYMBOLS),
        minloglevel=2,
    )
    return file


def random_model(architecture: str, *, rows: int, positions: int = 64, **sizes: Any) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    if architecture == "gpt2":
        config = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": positions, "vocab_size": rows} | sizes
        model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **config))
    else:
        config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
        config |= {"intermediate_size": 48, "max_position_embeddings": positions, "vocab_size": rows} | sizes
        model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_golden_logits(model: Any, step_dir: Path, dtype: str) -> None:
    """What the training process does when it saves."""
    import torch
    from safetensors.torch import save_file

    input_ids = torch.randint(0, VOCAB_SIZE, (1, GOLDEN_TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.float().contiguous()
    save_file(
        {"input_ids": input_ids, "logits": logits}, step_dir / "golden_logits.safetensors", metadata={"dtype": dtype}
    )
