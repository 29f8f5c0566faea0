"""A Megatron GPT as transformers' GPT-2: the configuration from the run's own record, and the names of the tensors."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from train.checkpoint.megatron import merge
from train.checkpoint.megatron.layout import EMBEDDING, FINAL_NORM, Layer, MegatronCheckpoint
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Megatron's name inside a layer -> GPT-2's; GPT-2's `Conv1D` keeps its matrices transposed.
_LAYER_NAMES = {
    "input_layernorm.weight": "ln_1.weight",
    "input_layernorm.bias": "ln_1.bias",
    "self_attention.query_key_value.weight": "attn.c_attn.weight",
    "self_attention.query_key_value.bias": "attn.c_attn.bias",
    "self_attention.dense.weight": "attn.c_proj.weight",
    "self_attention.dense.bias": "attn.c_proj.bias",
    "post_attention_layernorm.weight": "ln_2.weight",
    "post_attention_layernorm.bias": "ln_2.bias",
    "mlp.dense_h_to_4h.weight": "mlp.c_fc.weight",
    "mlp.dense_h_to_4h.bias": "mlp.c_fc.bias",
    "mlp.dense_4h_to_h.weight": "mlp.c_proj.weight",
    "mlp.dense_4h_to_h.bias": "mlp.c_proj.bias",
}
_TRANSPOSED = frozenset(name for name in _LAYER_NAMES if name.endswith(".weight") and "layernorm" not in name)

# Arguments that make a model something else than GPT-2, with the value that GPT-2 has.
_GPT2_VALUES: dict[str, Any] = {
    "use_rotary_position_embeddings": False,
    "normalization": "layernorm",
    "swiglu": False,
    "squared_relu": False,
    "untie_embeddings_and_output_weights": False,
    "add_bias_linear": True,
    "add_position_embedding": True,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
}


def not_gpt2(arguments: argparse.Namespace) -> list[str]:
    """What in a run's arguments makes its model something else than GPT-2; empty for a GPT-2."""
    found = [
        f"{name} is {getattr(arguments, name)}"
        for name, value in _GPT2_VALUES.items()
        if getattr(arguments, name, value) != value
    ]
    groups = getattr(arguments, "num_key_value_heads", None)
    if groups not in (None, arguments.num_attention_heads):
        found.append(f"num_key_value_heads is {groups}")
    experts = getattr(arguments, "num_experts", None) or [1]
    if max(experts) > 1:
        found.append(f"num_experts is {experts}")
    return found


def activation(arguments: argparse.Namespace) -> str:
    """The GELU that the run computed: the tanh form when bias and GELU were fused (upstream's default), else erf's."""
    if getattr(arguments, "openai_gelu", False):
        return "gelu_new"
    if getattr(arguments, "onnx_safe", False):
        return "gelu"
    return "gelu_new" if getattr(arguments, "bias_gelu_fusion", True) else "gelu"


def build_config(arguments: argparse.Namespace, *, vocab_size: int, dtype: str) -> Any:
    """The transformers configuration that computes what the run computed.

    Raises:
        UserError: the model is no GPT-2.
    """
    from transformers import GPT2Config

    wrong = not_gpt2(arguments)
    if wrong:
        raise UserError(
            f"this run's model is not a GPT-2 ({', '.join(wrong)}): this version exports GPT-2 shapes of"
            " Megatron-DeepSpeed; Llama shapes come with a later one."
        )
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=arguments.max_position_embeddings,
        n_embd=arguments.hidden_size,
        n_layer=arguments.num_layers,
        n_head=arguments.num_attention_heads,
        n_inner=arguments.ffn_hidden_size,
        activation_function=activation(arguments),
        layer_norm_epsilon=arguments.layernorm_epsilon,
        embd_pdrop=arguments.hidden_dropout,
        resid_pdrop=arguments.hidden_dropout,
        attn_pdrop=arguments.attention_dropout,
        initializer_range=arguments.init_method_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
        architectures=["GPT2LMHeadModel"],
    )


def tensors(checkpoint: MegatronCheckpoint, *, vocab_size: int, qkv_layout: str) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors under GPT-2's names, one layer in memory at a time.

    Raises:
        UserError: there are fewer embedding rows than the tokenizer has pieces, or a tensor is not a GPT-2's.
        VerificationError: the tensor ranks disagree on what all of them keep.
    """
    for layer in checkpoint.layers():
        for name in merge.layer_names(layer.slices):
            slices = [piece[name] for piece in layer.slices]
            whole = merge.merge(name, slices, heads=checkpoint.arguments.num_attention_heads, qkv_layout=qkv_layout)
            if name == "word_embeddings.weight":
                if whole.shape[0] < vocab_size:
                    raise UserError(
                        f"the tokenizer has {vocab_size} pieces, the model {whole.shape[0]} embedding rows: this is not"
                        " the tokenizer that the model was trained with; pass that one to --input_tokenizer_file."
                    )
                whole = whole[:vocab_size]
            yield _name(layer, name), (whole.t() if name in _TRANSPOSED else whole).clone().contiguous()


def _name(layer: Layer, name: str) -> str:
    if layer.kind == EMBEDDING and name in ("word_embeddings.weight", "position_embeddings.weight"):
        return "transformer.wte.weight" if name.startswith("word") else "transformer.wpe.weight"
    if layer.kind == FINAL_NORM and name in ("weight", "bias"):
        return f"transformer.ln_f.{name}"
    if layer.kind not in (EMBEDDING, FINAL_NORM) and name in _LAYER_NAMES:
        return f"transformer.h.{layer.index}.{_LAYER_NAMES[name]}"
    raise UserError(f"the {layer.kind} layer holds {name}, which a GPT-2 does not have: this model cannot be exported.")
