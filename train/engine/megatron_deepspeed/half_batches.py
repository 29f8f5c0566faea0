"""A layer of several tensor ranks as two half batches in turn: one is exchanged while the other is computed.

Forward, A and B being the halves, and each exchange running beside what stands under it:

    attention A | exchange A          | exchange B          | exchange A | exchange B
                | attention B         | norm A, MLP A       | MLP B      |

and backward the same in reverse. Autograd alone would order the backward pass by the forward one, in which an exchange
is always waited for at once. So each part has a small graph of its own, and the layer's backward pass runs them in the
order that hides the most. The formulas are those of transformer_layer.py; the idea is that of Domino,
https://arxiv.org/abs/2409.15241.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from train.engine.megatron_deepspeed import transformer_layer
from train.engine.megatron_deepspeed.exchange import Exchanges, started
from train.engine.megatron_deepspeed.transformer_layer import LayerShape, LayerWeights


def enter(stream: Any, norm: Any, norm_bias: Any, epsilon: float) -> tuple[Any, Any, Any, Any]:
    """Both halves of the batch, and their norms."""
    normal = transformer_layer.normalise(stream, norm, norm_bias, epsilon)
    half = stream.shape[1] // 2
    return stream[:, :half], stream[:, half:], normal[:, :half].contiguous(), normal[:, half:].contiguous()


def leave(first: Any, second: Any, first_output: Any, second_output: Any, bias: Any) -> Any:
    """The whole batch after the layer, from the halves' streams and outputs."""
    import torch

    halves = ((first, first_output), (second, second_output))
    return torch.cat([transformer_layer.add(output, bias, stream) for stream, output in halves], dim=1)


class Piece:
    """A part of a layer with a graph of its own, which `back` walks and frees. It keeps what the graph needs, no more.

    Args:
        function: computes a tensor or several from `inputs` and `others`.
        inputs: tensors that get gradients.
        others: what else it takes, weights among it; their gradients are added to them.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Any], *others: Any) -> None:
        import torch

        self._gradients: list[Any] = [None] * len(inputs)
        with torch.enable_grad():
            found = function(*(self._enter(place, values) for place, values in enumerate(inputs)), *others)
        results = found if isinstance(found, tuple) else (found,)
        self._ends = [torch.autograd.graph.get_gradient_edge(values) for values in results]
        self._results = tuple(values.detach() for values in results)

    def taken(self) -> tuple[Any, ...]:
        """What it computed, without the graph; from now on it is the caller's alone."""
        results, self._results = self._results, ()
        return results

    def back(self, *gradients: Any) -> list[Any]:
        """Gradients of the inputs, given those of the results."""
        import torch

        torch.autograd.backward(self._ends, gradients)
        return self._gradients

    def _enter(self, place: int, values: Any) -> Any:
        """`values`, at whose place in the graph the gradient is kept; a leaf would keep the values, too."""
        return _entrance().apply(values.new_zeros((), requires_grad=True), values.detach(), self._gradients, place)


@functools.cache
def _entrance() -> Any:
    import torch

    class Entrance(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, _anchor: Any, values: Any, gradients: list[Any], place: int) -> Any:
            ctx.gradients, ctx.place = gradients, place
            return values.view_as(values)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            ctx.gradients[ctx.place] = gradients[0]
            return None, None, None, None

    return Entrance


@dataclass(frozen=True)
class InHalves:
    """A layer over two half batches.

    Attributes:
        exchanges: how the tensor ranks exchange.
        compile: makes a function of Python one of the device.
    """

    exchanges: Exchanges
    compile: Callable[[Any], Any]

    def layer(self) -> Callable[..., Any]:
        """The function that computes a layer, as `transformer_layer.whole` does, for batches of an even size."""
        import torch

        layer = transformer_layer
        parts = (enter, layer.attention_part, layer.add_and_normalise, layer.mlp_part, leave)
        schedule = _Schedule(self.exchanges, *map(self.compile, parts))

        class Layer(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, stream: Any, *others: Any) -> Any:
                result, ctx.pieces = schedule.forward(stream, *others)
                return result

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                pieces, ctx.pieces = ctx.pieces, None
                return schedule.backward(pieces, gradients[0]), None, None, None, None

        return Layer.apply


@dataclass(frozen=True)
class _Pieces:
    """What a forward pass leaves for its backward pass; those in pairs are the halves'."""

    enter: Piece
    attention: list[Piece]
    middle: list[Piece]
    mlp: list[Piece]
    leave: Piece


@dataclass(frozen=True)
class _Schedule:
    exchanges: Exchanges
    enter: Callable[..., Any]
    attention: Callable[..., Any]
    middle: Callable[..., Any]
    mlp: Callable[..., Any]
    leave: Callable[..., Any]

    def forward(self, stream: Any, weights: LayerWeights, cosine: Any, sine: Any, shape: LayerShape) -> Any:
        spread, gather = self.exchanges.spread, self.exchanges.gather
        enter = Piece(self.enter, [stream], weights.norm1, weights.norm1_bias, shape.epsilon)
        *residuals, first, second = enter.taken()
        spreading = [started(spread, values) for values in (first, second)]
        attention, attended = [], []
        for waiting in spreading:
            attention.append(Piece(self.attention, [waiting.wait()], weights, cosine, sine, shape))
            attended.append(gather(attention[-1].taken()[0]))
        middle, mlp, done, streams = [], [], [], []
        for residual, waiting in zip(residuals, attended, strict=True):
            middle.append(self._middle(waiting.wait(), residual, weights, shape))
            middle_stream, values = middle[-1].taken()
            streams.append(middle_stream)
            mlp.append(Piece(self.mlp, [started(spread, values).wait()], weights, shape))
            done.append(gather(mlp[-1].taken()[0]))
        leave = Piece(self.leave, [*streams, *(waiting.wait() for waiting in done)], weights.down_bias)
        return leave.taken()[0], _Pieces(enter, attention, middle, mlp, leave)

    def _middle(self, values: Any, residual: Any, weights: LayerWeights, shape: LayerShape) -> Piece:
        def compute(values: Any, residual: Any) -> Any:
            return self.middle(values, weights.dense_bias, residual, weights.norm2, weights.norm2_bias, shape.epsilon)

        return Piece(compute, [values, residual])

    def backward(self, pieces: _Pieces, gradient: Any) -> Any:
        spread_back, gather_back = self.exchanges.spread_back, self.exchanges.gather_back
        first, second, *outputs = pieces.leave.back(gradient)
        streams = [first, second]
        # the second half goes first: its last exchange is the one that was hidden least
        joining = {half: started(gather_back, outputs[half]) for half in (1, 0)}
        spreading = {}
        for half in (1, 0):
            spreading[half] = spread_back(pieces.mlp[half].back(joining[half].wait())[0])
        residuals: list[Any] = [None, None]
        entering = {}
        for half in (1, 0):
            values, residuals[half] = pieces.middle[half].back(streams[half], spreading[half].wait())
            values = started(gather_back, values).wait()
            entering[half] = spread_back(pieces.attention[half].back(values)[0])
        return pieces.enter.back(*residuals, *(entering[half].wait() for half in (0, 1)))[0]
