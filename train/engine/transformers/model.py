"""Models from scratch: a recipe's shape as a transformers configuration, and the model with its first weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.recipe import PretrainRecipe
from train.tokenizer import special_tokens


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know of its tokenizer.

    Attributes:
        size: pieces in the SentencePiece model.
        bos_id, eos_id, pad_id: ids of <s>, </s> and <pad>; None when the model has no such piece.
        end_of_document_id: what ends each document in the data: <EOD>, or </s> where there is none.
    """

    size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    end_of_document_id: int | None


def read_vocabulary(model_file: Path) -> Vocabulary:
    """Reads size and special ids from a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model_file))

    def id_of(piece: str) -> int | None:
        found = processor.piece_to_id(piece)
        return found if processor.id_to_piece(found) == piece else None

    eos_id = id_of(special_tokens.EOS_TOKEN)
    end_id = id_of(special_tokens.EOD_TOKEN)
    return Vocabulary(
        size=processor.get_piece_size(),
        bos_id=id_of(special_tokens.BOS_TOKEN),
        eos_id=eos_id,
        pad_id=id_of(special_tokens.PAD_TOKEN),
        end_of_document_id=eos_id if end_id is None else end_id,
    )


def build_config(recipe: PretrainRecipe, vocabulary: Vocabulary) -> Any:
    """The transformers configuration of a resolved recipe: GPT2Config, LlamaConfig or MistralConfig."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig

    model = recipe.model
    assert model.num_layers and model.hidden_size and model.num_attention_heads, "resolved() comes first"
    shared: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    if model.architecture == "gpt2":
        return GPT2Config(
            n_layer=model.num_layers,
            n_embd=model.hidden_size,
            n_head=model.num_attention_heads,
            n_inner=model.ffn_hidden_size,
            n_positions=model.sequence_length,
            layer_norm_epsilon=model.norm_epsilon,
            embd_pdrop=model.dropout,
            resid_pdrop=model.dropout,
            attn_pdrop=model.dropout,
            **shared,
        )
    shared |= {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_dropout": model.dropout,
    }
    if model.architecture == "mistral":
        # no sliding window: a window shorter than the sequence would only hide tokens it was trained to see
        return MistralConfig(sliding_window=None, **shared)
    return LlamaConfig(**shared)


def build_model(recipe: PretrainRecipe, vocabulary: Vocabulary) -> Any:
    """The model with its first weights, the same on every rank and under every ZeRO stage for a seed.

    It is built by its class, not by `from_config`: that would build it inside `deepspeed.zero.Init`, and weights would
    depend on how many ranks share them.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    config = build_config(recipe, vocabulary)
    attention = recipe.parallel.attention
    config._attn_implementation = _register_causal_attention() if attention == "sdpa" else attention
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    set_seed(recipe.training.seed)
    with torch.device("cpu"):
        model = model_class(config)
    model.generation_config.eos_token_id = sorted(
        {identifier for identifier in (vocabulary.eos_id, vocabulary.end_of_document_id) if identifier is not None}
    )
    model.generation_config.bos_token_id = vocabulary.bos_id
    model.generation_config.pad_token_id = vocabulary.pad_id
    return model


def _register_causal_attention() -> str:
    """The name of transformers' own sdpa attention, for sequences without padding: causal by a flag, without a mask.

    transformers leaves the mask out by itself, but not in a model that torch.compile sees: with it the kernels compute
    the masked half, too, and a GPT of 1.3 billion parameters trained a fifth slower.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "sdpa_without_padding"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name
