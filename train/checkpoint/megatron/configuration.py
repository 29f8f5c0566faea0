"""A model's configuration in Megatron's words and in Hugging Face's: one reading of each field, in both directions.

    config = to_huggingface(arguments, vocab_size=32000, dtype="bfloat16")     # GPT2Config, LlamaConfig, MistralConfig
    values = to_arguments(config)                                              # what a run's arguments have to say

Every field comes from the run's own record, and what the other side cannot compute is refused by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from train.checkpoint.megatron.families import GPT2, LLAMA, Family
from train.errors import UserError, refuse

MISTRAL = "mistral"
ORIGIN = "huggingface_model_type"  # our own argument: the kind of model that an imported checkpoint was

# Arguments that make a family; what an old checkpoint does not have was not yet there to be chosen.
_FAMILY: dict[str, dict[str, Any]] = {
    GPT2.name: {
        "use_rotary_position_embeddings": False,
        "normalization": "layernorm",
        "swiglu": False,
        "add_bias_linear": True,
        "add_position_embedding": True,
    },
    LLAMA.name: {
        "use_rotary_position_embeddings": True,
        "normalization": "rmsnorm",
        "swiglu": True,
        "rotary_percent": 1.0,
    },
}
# Arguments that neither family has, with the value that leaves them out.
_ABSENT: dict[str, Any] = {
    "squared_relu": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
}
_DEFAULTS: dict[str, Any] = {"normalization": "layernorm", "add_bias_linear": True, "add_position_embedding": True}
# Between Megatron's arguments and the configuration of Llama and Mistral; GPT-2's has other names for most.
_LLAMA_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "init_method_std": "initializer_range",
}
_GPT2_FIELDS = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "ffn_hidden_size": "n_inner",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "layernorm_epsilon": "layer_norm_epsilon",
    "hidden_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "init_method_std": "initializer_range",
}


def family_of(arguments: argparse.Namespace) -> Family:
    """The family of a run's model.

    Raises:
        UserError: it is neither a GPT-2 nor a Llama; what keeps it from the nearer one is named.
    """
    family = LLAMA if getattr(arguments, "use_rotary_position_embeddings", False) else GPT2
    wrong = [
        f"{name} is {_value(arguments, name, wanted)}"
        for name, wanted in (_FAMILY[family.name] | _ABSENT).items()
        if _value(arguments, name, wanted) != wanted
    ]
    if family is GPT2 and _groups(arguments) != arguments.num_attention_heads:
        wrong.append(f"num_key_value_heads is {_groups(arguments)}")
    experts = getattr(arguments, "num_experts", None) or [1]
    if max(experts) > 1:
        wrong.append(f"num_experts is {experts}")
    if wrong:
        near = "a Llama" if family is LLAMA else "a GPT-2"
        raise UserError(
            f"this run's model is not {near} ({', '.join(wrong)}): GPT-2, Llama and Mistral shapes can be exported."
        )
    return family


def to_huggingface(arguments: argparse.Namespace, *, vocab_size: int, dtype: str, is_mistral: bool = False) -> Any:
    """The transformers configuration that computes what the run computed.

    Args:
        arguments: the run's own, as upstream saved them.
        vocab_size: the tokenizer's size.
        dtype: the weights' type.
        is_mistral: whether a model of Llama's shape is to be called a Mistral, which computes the same.

    Raises:
        UserError: the model is of neither family.
    """
    from transformers import GPT2Config, LlamaConfig, MistralConfig

    family = family_of(arguments)
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": is_tied(arguments),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
    }
    if family is GPT2:
        fields = {theirs: getattr(arguments, ours) for ours, theirs in _GPT2_FIELDS.items()}
        return GPT2Config(
            **fields,
            embd_pdrop=arguments.hidden_dropout,
            activation_function=activation(arguments),
            architectures=["GPT2LMHeadModel"],
            **shared,
        )
    fields = {
        theirs: getattr(arguments, ours) for ours, theirs in _LLAMA_FIELDS.items() if ours != "num_key_value_heads"
    }
    fields |= {
        "num_key_value_heads": _groups(arguments),
        "head_dim": getattr(arguments, "kv_channels", None) or arguments.hidden_size // arguments.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(getattr(arguments, "rope_theta", 10000))},
        "hidden_act": "silu",
    }
    has_bias = has_linear_bias(arguments)
    if is_mistral and not has_bias:
        return MistralConfig(sliding_window=None, architectures=["MistralForCausalLM"], **fields, **shared)
    return LlamaConfig(
        attention_bias=has_bias, mlp_bias=has_bias, architectures=["LlamaForCausalLM"], **fields, **shared
    )


def to_arguments(config: Any) -> dict[str, Any]:
    """What of a Megatron run's arguments describes the model that `config` describes.

    Raises:
        UserError: Megatron-DeepSpeed cannot compute such a model; everything that stands against it.
    """
    family = {"gpt2": GPT2, "llama": LLAMA, MISTRAL: LLAMA}.get(config.model_type)
    if family is None:
        raise UserError(
            f"the model is a {config.model_type}: GPT-2, Llama and Mistral become checkpoints of Megatron-DeepSpeed."
        )
    refuse(_gpt2_problems(config) if family is GPT2 else _llama_problems(config))
    fields = _GPT2_FIELDS if family is GPT2 else _LLAMA_FIELDS
    values = {ours: getattr(config, theirs) for ours, theirs in fields.items()}
    heads = values["num_attention_heads"]
    values |= _FAMILY[family.name] | _ABSENT
    values |= {
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "kv_channels": values["hidden_size"] // heads,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "openai_gelu": False,
        "onnx_safe": None,
        "num_experts": [1],
        ORIGIN: config.model_type,
    }
    if family is GPT2:
        values["ffn_hidden_size"] = values["ffn_hidden_size"] or 4 * values["hidden_size"]
        return values | {"bias_gelu_fusion": config.activation_function != "gelu"}
    return values | {
        "hidden_dropout": 0.0,
        "bias_gelu_fusion": False,
        "add_position_embedding": False,
        "add_bias_linear": bool(getattr(config, "attention_bias", False)),
        "rope_theta": int(config.rope_parameters["rope_theta"]),
    }


def activation(arguments: argparse.Namespace) -> str:
    """The GELU that the run computed: the tanh form when bias and GELU were fused (upstream's default), else erf's."""
    if getattr(arguments, "openai_gelu", False):
        return "gelu_new"
    if getattr(arguments, "onnx_safe", False):
        return "gelu"
    return "gelu_new" if getattr(arguments, "bias_gelu_fusion", True) else "gelu"


def has_linear_bias(arguments: argparse.Namespace) -> bool:
    """Whether the linear layers have biases."""
    return bool(getattr(arguments, "add_bias_linear", True))


def is_tied(arguments: argparse.Namespace) -> bool:
    """Whether the head is the embedding."""
    return not getattr(arguments, "untie_embeddings_and_output_weights", False)


def _groups(arguments: argparse.Namespace) -> int:
    return int(getattr(arguments, "num_key_value_heads", None) or arguments.num_attention_heads)


def _value(arguments: argparse.Namespace, name: str, wanted: Any) -> Any:
    """An argument; in a checkpoint of before there was a choice, what upstream then did."""
    return getattr(arguments, name, _DEFAULTS.get(name, False if isinstance(wanted, bool) else wanted))


def _gpt2_problems(config: Any) -> Iterator[str]:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        yield f"activation_function {config.activation_function}: Megatron-DeepSpeed has the two forms of GELU."
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        yield "its attention is scaled in a way of its own (scale_attn_...), which Megatron-DeepSpeed does not do."
    if getattr(config, "add_cross_attention", False):
        yield "it has cross attention, which a decoder of Megatron-DeepSpeed does not have."


def _llama_problems(config: Any) -> Iterator[str]:
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    if head_dim * heads != width:
        yield f"head_dim {head_dim} x {heads} heads is not the width {width}: such heads are not supported."
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act}: Megatron-DeepSpeed's gated layer has silu."
    rope = config.rope_parameters if isinstance(config.rope_parameters, Mapping) else {}
    theta = rope.get("rope_theta", 0)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"rope_parameters {dict(rope)}: Megatron-DeepSpeed's rotary positions are neither scaled nor partial."
    if not theta or theta != int(theta):
        yield f"rope_theta {theta}: Megatron-DeepSpeed takes whole numbers."
    if getattr(config, "attention_bias", False) != getattr(config, "mlp_bias", False):
        yield "it has biases in attention or feed-forward layers only: Megatron-DeepSpeed has them in both, or in none."
    window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < positions:
        yield (
            f"sliding_window {window} is less than its {positions} positions, and Megatron-DeepSpeed has no window:"
            f" set max_position_embeddings to {window} and sliding_window to null in config.json, which changes nothing"
            f" for sequences of up to {window} tokens, and import that."
        )
