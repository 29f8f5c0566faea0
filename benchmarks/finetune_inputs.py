"""What `finetune_throughput.py` trains: a Llama of random weights, its tokenizer, and conversations of random words.

A word of the conversations is a token, so that lengths are known without a tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

from train import outputs
from train.finetune import chat_template
from train.model_sizes import MODEL_SIZES, ModelSize

_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
# transformers' own mask of the answers, which TRL uses, is empty when a blank of no token stands at their beginning.
_TEMPLATES = ("### Human:\n", "### Assistant:\n")
_AROUND = 5  # tokens: two of each template, and the end token
_TEMPLATE_WORDS = ("###", "Human:", "Assistant:")


def shape(model_size: str, *, num_layers: int = 0, hidden_size: int = 0) -> ModelSize:
    """A named shape, or one like it with another number of layers or another width; 0 keeps the named one's.

    The width of a head and the ratios between the widths stay.
    """
    size = MODEL_SIZES[model_size]
    hidden = hidden_size or size.hidden_size
    heads = max(1, hidden * size.num_attention_heads // size.hidden_size)
    return dataclasses.replace(
        size,
        num_layers=num_layers or size.num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads * size.num_key_value_heads // size.num_attention_heads),
        ffn_hidden_size=hidden * size.ffn_hidden_size // size.hidden_size,
    )


def write_model(folder: Path, size: ModelSize, *, vocabulary_size: int, positions: int) -> None:
    """A Llama with random weights in bf16, a fast tokenizer, and the project's chat template. Kept when it is there."""
    if folder.is_dir():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        max_position_embeddings=positions,
        initializer_range=size.init_method_std,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        dtype="bfloat16",
    )
    torch.manual_seed(1)
    with outputs.new_folder(folder) as unfinished:
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
        _write_tokenizer(unfinished, vocabulary_size, positions)


def write_conversations(file: Path, *, examples: int, sequence_length: int, vocabulary_size: int) -> None:
    """One question and one answer each; lengths are uniform between a quarter of the sequence and the whole."""
    source = random.Random(1)
    words = [f"w{number}" for number in range(vocabulary_size - len(_SPECIAL) - len(_TEMPLATE_WORDS))]
    with outputs.new_file(file, overwrite=True) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for _ in range(examples):
            length = source.randint(sequence_length // 4, sequence_length) - _AROUND
            question = length // 4
            messages = [
                {"role": "user", "content": " ".join(source.choices(words, k=question))},
                {"role": "assistant", "content": " ".join(source.choices(words, k=length - question))},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


def _write_tokenizer(folder: Path, vocabulary_size: int, positions: int) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = (f"w{number}" for number in range(vocabulary_size - len(_SPECIAL) - len(_TEMPLATE_WORDS)))
    ids = {word: number for number, word in enumerate((*_SPECIAL, *_TEMPLATE_WORDS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), _SPECIAL, strict=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template.build(*_TEMPLATES), encoding="utf-8")
