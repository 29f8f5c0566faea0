"""Each transformer layer as one compiled graph (with tensor parallelism five, and the collectives between them).

torch.compile then fuses what stands between the matrix products: bias, GELU or SwiGLU, residual, norm, rotary
positions, forwards and backwards. Formulas: train/engine/megatron_deepspeed/transformer_layer.py.
"""

from __future__ import annotations

import functools
from typing import Any

from train.engine.megatron_deepspeed import (
    bias_gelu,
    column_linear,
    exchange,
    linear,
    symmetric_products,
    transformer_layer,
    travelling_products,
)
from train.engine.megatron_deepspeed.patches import Patch, Run, flash_attention
from train.engine.megatron_deepspeed.transformer_layer import InParts, LayerShape, LayerWeights
from train.errors import UserError


def weights_of(layer: Any) -> LayerWeights:
    """The weights of upstream's ParallelTransformerLayer."""
    attention, mlp = layer.self_attention, layer.mlp
    return LayerWeights(
        norm1=layer.input_layernorm.weight,
        norm1_bias=getattr(layer.input_layernorm, "bias", None),
        qkv=attention.query_key_value.weight,
        qkv_bias=attention.query_key_value.bias,
        dense=attention.dense.weight,
        dense_bias=attention.dense.bias,
        norm2=layer.post_attention_layernorm.weight,
        norm2_bias=getattr(layer.post_attention_layernorm, "bias", None),
        up=mlp.dense_h_to_4h.weight,
        up_bias=mlp.dense_h_to_4h.bias,
        down=mlp.dense_4h_to_h.weight,
        down_bias=mlp.dense_4h_to_h.bias,
    )


def shape_of(layer: Any, args: Any) -> LayerShape:
    """What the weights do not say."""
    attention = layer.self_attention
    activation = "swiglu" if args.swiglu else "gelu_tanh" if layer.mlp.bias_gelu_fusion else "gelu"
    return LayerShape(
        groups=attention.num_key_value_heads_per_partition,
        queries_per_group=attention.num_key_value_groups,
        head_dim=attention.hidden_size_per_attention_head,
        epsilon=args.layernorm_epsilon,
        activation=activation,
    )


_ODD = (
    *("hidden_dropout", "attention_dropout", "openai_gelu", "onnx_safe", "squared_relu", "apply_layernorm_1p"),
    *("fp32_residual_connection", "apply_residual_connection_post_layernorm", "reset_attention_mask"),
    *("force_ds_sequence_parallel", "num_experts_switch", "recompute_granularity", "mos", "kd"),
)


def oddities(args: Any) -> list[str]:
    """What this run asks of its layers that `transformer_layer` does not compute, as upstream's flags."""
    found = [name for name in _ODD if getattr(args, name, None)]
    found += ["num_experts"] if max(args.num_experts or [1]) > 1 else []
    found += ["ds_sequence_parallel_size"] if getattr(args, "ds_sequence_parallel_size", 1) != 1 else []
    found += ["rotary_percent"] if getattr(args, "rotary_percent", 1.0) != 1.0 else []
    return [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in found]


_lets_products_travel = False
_is_installed = False


def is_installed() -> bool:
    """Whether the layers of plain runs are those of `transformer_layer`."""
    return _is_installed


def let_products_travel() -> None:
    """Lets tensor ranks that split the sequence compute while they exchange (travelling_products.py)."""
    global _lets_products_travel
    _lets_products_travel = True


def install(run_compiled: Any) -> None:
    """Replaces ParallelTransformerLayer.forward for plain runs.

    Args:
        run_compiled: `torch.compile` or, for tests, nothing that changes a function.
    """
    global _is_installed
    import torch
    from megatron import get_args
    from megatron.core import mpu
    from megatron.core.tensor_parallel import mappings
    from megatron.model.transformer import ParallelTransformerLayer

    forward = ParallelTransformerLayer.forward
    compiled = functools.lru_cache(maxsize=1)(lambda: _layer_function(run_compiled, mpu, mappings, get_args()))
    is_plain = functools.lru_cache(maxsize=1)(lambda: _is_plain(get_args()))
    angles: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(forward)
    def fast_forward(
        self: Any, hidden_states: Any, attention_mask: Any = None, *others: Any, rotary_pos_emb: Any = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        args = get_args()
        if not is_plain() or others or any(value is not None for value in options.values()):
            return forward(
                self, hidden_states, attention_mask, *others, rotary_pos_emb=rotary_pos_emb, **options
            )  # generation, experts, retrieval: upstream's own
        cosine = sine = None
        if rotary_pos_emb is not None:
            length = hidden_states.shape[0] * (
                mpu.get_tensor_model_parallel_world_size() if args.sequence_parallel else 1
            )
            if length not in angles:
                angle = (rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb)[:length]
                angles[length] = (angle.cos().to(hidden_states.dtype), angle.sin().to(hidden_states.dtype))
            cosine, sine = angles[length]
        if not hasattr(self, "_plain_shape"):
            self._plain_shape = shape_of(self, args)
            self._no_moe_loss = torch.zeros((), device=hidden_states.device, dtype=hidden_states.dtype)
        output = compiled()(hidden_states, weights_of(self), cosine, sine, self._plain_shape)
        return output, self._no_moe_loss

    ParallelTransformerLayer.forward = fast_forward
    _is_installed = True


def _is_plain(args: Any) -> bool:
    """Whether the layers of this run are what `transformer_layer` computes; says once why they are not."""
    odd = oddities(args)
    if odd and linear.is_float8():
        raise UserError(f"--float8 needs layers that {', '.join(odd)} changes: leave one of them out.")
    if odd and args.rank == 0:
        print(f"note: the layers are upstream's own, which are slower, because of {', '.join(odd)}", flush=True)
    return not odd


def _layer_function(run_compiled: Any, mpu: Any, mappings: Any, args: Any) -> Any:
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return run_compiled(transformer_layer.whole)
    group = mpu.get_tensor_model_parallel_group()
    if args.sequence_parallel:
        exchanges, gather = exchange.shares(group), mappings.reduce_scatter_to_sequence_parallel_region
    else:
        exchanges, gather = exchange.sums(group), mappings.reduce_from_tensor_model_parallel_region
    travelling = _travelling(group, exchanges) if _lets_products_travel and args.sequence_parallel else None
    if travelling is not None:
        return travelling_products.layer(travelling, run_compiled)
    return InParts(column_linear.column_linear(exchanges, run_compiled), gather, run_compiled).layer()


def _travelling(group: Any, exchanges: exchange.Exchanges) -> travelling_products.Travelling | None:
    """The products that travel; None where the GPUs of the group share no memory."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda":
        return travelling_products.OneAfterTheOther(exchanges)
    return symmetric_products.of_group(group)


def _apply(run: Run) -> str:
    import torch
    from deepspeed.accelerator import get_accelerator

    on_cuda = get_accelerator().device_name() == "cuda"
    if run.attention != "sdpa" or not (on_cuda or "compiled-layers" in run.forced):
        return ""
    from megatron.model import transformer

    if hasattr(transformer, "FPDT_Attention"):  # from 676a482c on: query, key and value lie in another order
        return ""
    if on_cuda:
        bias_gelu.prepare()
        if flash_attention.is_cudnn_faster():
            torch.backends.cuda.enable_flash_sdp(False)  # compiled functions take no order of kernels
        install(functools.partial(torch.compile, dynamic=False))
        return "ParallelTransformerLayer.forward: compiled, where the run has no dropout and no experts"
    install(lambda function: function)
    return "ParallelTransformerLayer.forward: as one function, not compiled on a CPU"


PATCH = Patch(
    name="compiled-layers",
    reason="what stands between the matrix products of a layer runs as tens of small kernels",
    affected="6acc370a and earlier, on CUDA",
    apply=_apply,
    is_for_speed=True,
)
