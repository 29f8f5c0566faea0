"""Megatron's names for a model's parameters and Hugging Face's for the same: one table per family, for both directions.

    family = families.LLAMA
    for row in family.rows(has_bias=False, is_tied=False): ...

A row with several Hugging Face names has its parts (see merge.py) in one tensor each; a row with one name has all of
its parts in that tensor, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EMBEDDING = "embedding"
TRANSFORMER = "transformer"
FINAL_NORM = "final norm"
HEAD = "head"


@dataclass(frozen=True)
class Row:
    """One parameter of a layer.

    Attributes:
        layer: the kind of layer.
        megatron: its name in a layer file.
        huggingface: its tensors' names; `{layer}` stands for the number of the transformer layer.
        is_transposed: whether Hugging Face keeps the matrix transposed (GPT-2's `Conv1D`).
    """

    layer: str
    megatron: str
    huggingface: tuple[str, ...]
    is_transposed: bool = False

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are the vocabulary's, which Megatron pads."""
        return self.megatron in ("word_embeddings.weight", "lm_head.weight")


@dataclass(frozen=True)
class Family:
    """A model family: its names on both sides."""

    name: str
    table: tuple[Row, ...]

    def rows(self, *, has_bias: bool, is_tied: bool) -> Iterator[Row]:
        """The rows of a model with or without biases of its linear layers, and with its head tied or not."""
        for row in self.table:
            is_linear_bias = row.megatron.endswith(".bias") and "norm" not in row.megatron
            if (has_bias or not is_linear_bias) and not (is_tied and row.layer == HEAD):
                yield row


def _linear(megatron: str, *huggingface: str, is_transposed: bool = False) -> tuple[Row, Row]:
    def named(end: str) -> tuple[str, ...]:
        return tuple(f"{name}.{end}" for name in huggingface)

    return (
        Row(TRANSFORMER, f"{megatron}.weight", named("weight"), is_transposed),
        Row(TRANSFORMER, f"{megatron}.bias", named("bias")),
    )


def _norm(layer: str, megatron: str, huggingface: str, *, ends: Sequence[str]) -> tuple[Row, ...]:
    return tuple(Row(layer, f"{megatron}{end}", (f"{huggingface}.{end}",)) for end in ends)


_H = "transformer.h.{layer}"
GPT2 = Family(
    "gpt2",
    (
        Row(EMBEDDING, "word_embeddings.weight", ("transformer.wte.weight",)),
        Row(EMBEDDING, "position_embeddings.weight", ("transformer.wpe.weight",)),
        *_norm(TRANSFORMER, "input_layernorm.", f"{_H}.ln_1", ends=("weight", "bias")),
        *_linear("self_attention.query_key_value", f"{_H}.attn.c_attn", is_transposed=True),
        *_linear("self_attention.dense", f"{_H}.attn.c_proj", is_transposed=True),
        *_norm(TRANSFORMER, "post_attention_layernorm.", f"{_H}.ln_2", ends=("weight", "bias")),
        *_linear("mlp.dense_h_to_4h", f"{_H}.mlp.c_fc", is_transposed=True),
        *_linear("mlp.dense_4h_to_h", f"{_H}.mlp.c_proj", is_transposed=True),
        *_norm(FINAL_NORM, "", "transformer.ln_f", ends=("weight", "bias")),
        Row(HEAD, "lm_head.weight", ("lm_head.weight",)),
    ),
)

_L = "model.layers.{layer}"
LLAMA = Family(  # and Mistral, whose names are the same
    "llama",
    (
        Row(EMBEDDING, "word_embeddings.weight", ("model.embed_tokens.weight",)),
        *_norm(TRANSFORMER, "input_layernorm.", f"{_L}.input_layernorm", ends=("weight",)),
        *_linear("self_attention.query_key_value", *(f"{_L}.self_attn.{part}_proj" for part in "qkv")),
        *_linear("self_attention.dense", f"{_L}.self_attn.o_proj"),
        *_norm(TRANSFORMER, "post_attention_layernorm.", f"{_L}.post_attention_layernorm", ends=("weight",)),
        *_linear("mlp.dense_h_to_4h", f"{_L}.mlp.gate_proj", f"{_L}.mlp.up_proj"),
        *_linear("mlp.dense_4h_to_h", f"{_L}.mlp.down_proj"),
        *_norm(FINAL_NORM, "", "model.norm", ends=("weight",)),
        Row(HEAD, "lm_head.weight", ("lm_head.weight",)),
    ),
)
