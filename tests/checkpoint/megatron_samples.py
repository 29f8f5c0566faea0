"""Checkpoints in Megatron-DeepSpeed's layout, cut from a random GPT-2, for tests that need no engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 50
_ROWS = 64  # the padded vocabulary
_LAYER_NAMES = {
    "input_layernorm": "ln_1",
    "self_attention.query_key_value": "attn.c_attn",
    "self_attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}


def random_gpt2(activation: str = "gelu_new") -> Any:
    """A GPT-2 of two layers whose weights are large enough that a wrong layout or GELU shows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=_ROWS, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=64, activation_function=activation
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def arguments(tensor_size: int, pipeline_size: int, **other: Any) -> argparse.Namespace:
    """What upstream saves of its arguments, as far as it matters."""
    return argparse.Namespace(
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=16,
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.02,
        bias_gelu_fusion=True,
        **other,
    )


def write_checkpoint(
    folder: Path,
    model: Any,
    *,
    tensor_size: int = 2,
    pipeline_size: int = 1,
    per_head: bool = True,
    has_pipeline_module: bool = True,
    **other_arguments: Any,
) -> Path:
    """Cuts `model` as upstream does and writes `global_step7` below `folder`."""
    step_dir = folder / "global_step7"
    step_dir.mkdir(parents=True)
    state = model.state_dict()
    slices = [_slices(state, rank, tensor_size, per_head) for rank in range(tensor_size)]
    common = {
        "args": arguments(tensor_size, pipeline_size, **other_arguments),
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    for rank in range(tensor_size * pipeline_size):
        module = None if has_pipeline_module else {"language_model": _nested(slices[rank])}
        torch.save({**common, "module": module}, step_dir / f"mp_rank_{rank:02}_model_states.pt")
    if has_pipeline_module:
        for rank, layers in enumerate(slices):
            for number, layer in enumerate(layers, start=1):
                torch.save(layer, step_dir / f"layer_{number:02}-model_{rank:02}-model_states.pt")
    return step_dir


def write_golden_logits(step_dir: Path, model: Any, *, commit: str | None = None) -> None:
    """What the engine would have recorded."""
    from safetensors.torch import save_file

    input_ids = torch.arange(12).unsqueeze(0) % VOCAB_SIZE
    with torch.no_grad():
        logits = model(input_ids).logits.contiguous()
    metadata = {"dtype": "float32", **({"engine_commit": commit} if commit else {})}
    save_file({"input_ids": input_ids, "logits": logits}, step_dir / "golden_logits.safetensors", metadata=metadata)


def _slices(state: dict[str, Any], rank: int, size: int, per_head: bool) -> list[dict[str, Any]]:
    """Embedding, layers and final norm of one tensor rank."""
    rows = state["transformer.wte.weight"].chunk(size)[rank]
    layers = [{"word_embeddings.weight": rows, "position_embeddings.weight": state["transformer.wpe.weight"]}]
    for index in range(2):
        layer = {}
        for ours, theirs in _LAYER_NAMES.items():
            weight = state[f"transformer.h.{index}.{theirs}.weight"]
            bias = state[f"transformer.h.{index}.{theirs}.bias"]
            weight = weight.t() if weight.ndim == 2 else weight  # GPT-2 keeps its matrices transposed
            if ours.endswith("query_key_value"):
                weight, bias = _cut_qkv(weight, rank, size, per_head), _cut_qkv(bias, rank, size, per_head)
            elif ours.endswith("h_to_4h"):
                weight, bias = weight.chunk(size)[rank], bias.chunk(size)[rank]
            elif weight.ndim == 2:
                weight = weight.chunk(size, dim=1)[rank]
            layer |= {f"{ours}.weight": weight.clone(), f"{ours}.bias": bias.clone()}
        layers.append(layer)
    layers.append({name: state[f"transformer.ln_f.{name}"] for name in ("weight", "bias")})
    return [{name: tensor.clone() for name, tensor in layer.items()} for layer in layers]


def _cut_qkv(whole: Any, rank: int, size: int, per_head: bool) -> Any:
    """Rows [3, heads, head_dim] of a rank's heads, in the row order of either kind of commit."""
    heads = whole.reshape(3, 4, 8, *whole.shape[1:])
    own = heads[:, rank * 4 // size : (rank + 1) * 4 // size]
    return (own.transpose(0, 1) if per_head else own).reshape(-1, *whole.shape[1:])


def _nested(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The form of --no-pipeline-parallel."""
    embedding, *transformer, norm = layers
    encoder = {f"layers.{i}.{name}": tensor for i, layer in enumerate(transformer) for name, tensor in layer.items()}
    encoder |= {f"final_layernorm.{name}": tensor for name, tensor in norm.items()}
    return {
        "embedding": {
            "word_embeddings": {"weight": embedding["word_embeddings.weight"]},
            "position_embeddings": {"weight": embedding["position_embeddings.weight"]},
        },
        "encoder": encoder,
    }
