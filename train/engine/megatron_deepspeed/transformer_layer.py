"""A transformer layer of Megatron as functions of its weights, for `torch.compile` to see whole.

Upstream's layer breaks a compiled graph in many places (random-state forks, TorchScript, custom linear functions, two
tensors copied to the GPU per call). These are the same formulas, in the same order and types, without dropout:

    x = x + dense(attention(norm(x)));  x = x + mlp(norm(x))

Between them stand the collectives of tensor parallelism, one before a column-parallel weight and `gather` after a
row-parallel one; with one tensor rank both are nothing and a layer is one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.engine.megatron_deepspeed.bias_gelu import bias_gelu
from train.engine.megatron_deepspeed.linear import linear

Collective = Callable[[Any], Any]


@dataclass(frozen=True)
class LayerShape:
    """What a layer's weights do not say; sizes are those of one tensor rank.

    Attributes:
        groups: key and value heads.
        queries_per_group: query heads that share one of them.
        head_dim: width of a head.
        epsilon: of the norms.
        activation: "gelu_tanh", "gelu" or "swiglu".
    """

    groups: int
    queries_per_group: int
    head_dim: int
    epsilon: float
    activation: str


@dataclass(frozen=True)
class LayerWeights:
    """One rank's weights of a layer; biases are None where the model has none, and RMS norms have none."""

    norm1: Any
    norm1_bias: Any
    qkv: Any
    qkv_bias: Any
    dense: Any
    dense_bias: Any
    norm2: Any
    norm2_bias: Any
    up: Any
    up_bias: Any
    down: Any
    down_bias: Any


def normalise(values: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Layer norm, or RMS norm where there is no bias."""
    import torch

    if bias is None:
        return torch.nn.functional.rms_norm(values, (values.shape[-1],), weight, epsilon)
    return torch.nn.functional.layer_norm(values, (values.shape[-1],), weight, bias, epsilon)


def rotate(values: Any, cosine: Any, sine: Any) -> Any:
    """Rotary positions over [sequence, batch, heads, head_dim]; cosine and sine are [sequence, 1, 1, head_dim]."""
    import torch

    first, second = values.chunk(2, dim=-1)
    return values * cosine + torch.cat((-second, first), dim=-1) * sine


def attend(mixed: Any, cosine: Any, sine: Any, shape: LayerShape) -> Any:
    """Causal attention: queries, keys and values of this rank's groups -> its [sequence, batch, heads * head_dim]."""
    import torch

    sequence, batch = mixed.shape[:2]
    heads = shape.groups * shape.queries_per_group
    mixed = mixed.view(sequence, batch, shape.groups, shape.queries_per_group + 2, shape.head_dim)
    query = mixed[..., : shape.queries_per_group, :].reshape(sequence, batch, heads, shape.head_dim)
    key, value = mixed[..., shape.queries_per_group, :], mixed[..., shape.queries_per_group + 1, :]
    if cosine is not None:
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    if shape.queries_per_group > 1:
        key, value = (part.repeat_interleave(shape.queries_per_group, dim=2) for part in (key, value))
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * shape.head_dim)


def activate(values: Any, bias: Any, activation: str) -> Any:
    """GELU of values + bias, or SwiGLU of its two halves."""
    import torch

    if activation == "gelu_tanh" and bias is not None:
        return bias_gelu(values, bias)
    values = values if bias is None else values + bias
    if activation == "swiglu":
        gate, up = values.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")


def add(values: Any, bias: Any, residual: Any) -> Any:
    """residual + (values + bias), in upstream's order."""
    return residual + (values if bias is None else values + bias)


def attention_part(values: Any, weights: LayerWeights, cosine: Any, sine: Any, shape: LayerShape) -> Any:
    """From normalised values to this rank's share of the attention's output, before `gather` and bias."""
    mixed = linear(values, weights.qkv, weights.qkv_bias)
    return attention_of(mixed, weights, cosine, sine, shape)


def attention_of(mixed: Any, weights: LayerWeights, cosine: Any, sine: Any, shape: LayerShape) -> Any:
    """The same from queries, keys and values on."""
    return linear(attend(mixed, cosine, sine, shape), weights.dense)


def mlp_part(values: Any, weights: LayerWeights, shape: LayerShape) -> Any:
    """From normalised values to this rank's share of the feed-forward layer's output, before `gather` and bias."""
    return mlp_of(linear(values, weights.up), weights, shape)


def mlp_of(inside: Any, weights: LayerWeights, shape: LayerShape) -> Any:
    """The same from the feed-forward layer's inside on, which has no bias yet."""
    return linear(activate(inside, weights.up_bias, shape.activation), weights.down)


def add_and_normalise(
    values: Any, bias: Any, residual: Any, norm: Any, norm_bias: Any, epsilon: float
) -> tuple[Any, Any]:
    """The new residual stream, and its norm for the next part."""
    stream = add(values, bias, residual)
    return stream, normalise(stream, norm, norm_bias, epsilon)


def whole(stream: Any, weights: LayerWeights, cosine: Any, sine: Any, shape: LayerShape) -> Any:
    """A layer with one tensor rank: [sequence, batch, hidden] -> the same."""
    values = normalise(stream, weights.norm1, weights.norm1_bias, shape.epsilon)
    values = attention_part(values, weights, cosine, sine, shape)
    stream, values = add_and_normalise(
        values, weights.dense_bias, stream, weights.norm2, weights.norm2_bias, shape.epsilon
    )
    return add(mlp_part(values, weights, shape), weights.down_bias, stream)


@dataclass(frozen=True)
class InParts:
    """A layer of several tensor ranks: five graphs with the collectives and the column-parallel weights between them.

    Attributes:
        column: a column-parallel linear function with the collectives before it (column_linear.py).
        gather: what stands after a row-parallel weight (a sum; a reduce-scatter when the sequence is split).
        compile: makes a function of Python one of the device.
    """

    column: Callable[[Any, Any, Any], Any]
    gather: Collective
    compile: Callable[[Any], Any]

    def layer(self) -> Callable[..., Any]:
        """The function that computes a layer, as `whole` does."""
        first, attention, middle, mlp, last = map(
            self.compile, (normalise, attention_of, add_and_normalise, mlp_of, add)
        )

        def run(stream: Any, weights: LayerWeights, cosine: Any, sine: Any, shape: LayerShape) -> Any:
            values = first(stream, weights.norm1, weights.norm1_bias, shape.epsilon)
            mixed = self.column(values, weights.qkv, weights.qkv_bias)
            values = self.gather(attention(mixed, weights, cosine, sine, shape))
            stream, values = middle(
                values, weights.dense_bias, stream, weights.norm2, weights.norm2_bias, shape.epsilon
            )
            inside = self.column(values, weights.up, None)
            return last(self.gather(mlp(inside, weights, shape)), weights.down_bias, stream)

        return run
