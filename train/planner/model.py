"""A model's shape as the planner counts with it: parameters of a pipeline stage, FLOPs of a token.

shape = Shape.of(recipe.model, vocab_size=32_000)
"""

from __future__ import annotations

from dataclasses import dataclass

from train.checkpoint.megatron import stages, vocabulary
from train.recipe import ModelSettings


@dataclass(frozen=True)
class Shape:
    """A resolved model. Widths are in values, `key_value` is the width of all key heads together.

    Attributes:
        is_llama: rotary positions, SwiGLU, RMS norm and no biases; else GPT-2.
        tied: input and output embeddings are one.
    """

    layers: int
    hidden: int
    heads: int
    key_value: int
    ffn: int
    sequence: int
    vocab_size: int
    is_llama: bool
    tied: bool
    layers_per_stage: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: ModelSettings, *, vocab_size: int, layers_per_stage: tuple[int, ...] = ()) -> Shape:
        """The shape of resolved settings."""
        assert model.num_layers and model.hidden_size and model.ffn_hidden_size
        assert model.num_attention_heads and model.num_key_value_heads
        return cls(
            layers=model.num_layers,
            hidden=model.hidden_size,
            heads=model.num_attention_heads,
            key_value=model.hidden_size * model.num_key_value_heads // model.num_attention_heads,
            ffn=model.ffn_hidden_size,
            sequence=model.sequence_length,
            vocab_size=vocab_size,
            is_llama=model.architecture != "gpt2",
            tied=bool(model.tie_word_embeddings),
            layers_per_stage=layers_per_stage,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def rows(self, tensor: int) -> int:
        """Embedding rows of one tensor rank; upstream pads the vocabulary."""
        return vocabulary.padded(self.vocab_size, divisor=vocabulary.DIVISOR, ranks=tensor) // tensor

    def matrices(self, tensor: int) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of a layer's matrices on one tensor rank: qkv, dense, up (and gate), down."""
        up = 2 * self.ffn if self.is_llama else self.ffn
        return (
            ((self.hidden + 2 * self.key_value) // tensor, self.hidden),
            (self.hidden, self.hidden // tensor),
            (up // tensor, self.hidden),
            (self.hidden, self.ffn // tensor),
        )

    def layer_parameters(self, tensor: int = 1) -> int:
        """Parameters of one layer on one tensor rank; norms and the biases of dense and down are on all of them."""
        matrices = sum(outputs * inputs for outputs, inputs in self.matrices(tensor))
        if self.is_llama:
            return matrices + 2 * self.hidden
        (qkv, _), _, (up, _), _ = self.matrices(tensor)
        return matrices + qkv + up + 2 * self.hidden + 4 * self.hidden

    def embedding_parameters(self, tensor: int = 1) -> int:
        """Parameters of the embedding module on one tensor rank: words and, in GPT-2, positions."""
        return self.hidden * (self.rows(tensor) + (0 if self.is_llama else self.sequence))

    def stage_layers(self, pipeline: int) -> tuple[int, ...]:
        """Layers of each pipeline stage: those that are given for so many, or as the engine balances them."""
        if len(self.layers_per_stage) == pipeline:
            return self.layers_per_stage
        head = stages.head_layers(
            hidden=self.hidden,
            ffn=self.ffn,
            key_value=self.key_value,
            sequence=self.sequence,
            vocabulary_rows=self.rows(1),
            is_gated=self.is_llama,
        )
        return stages.balanced(self.layers, pipeline, head)

    def stage_parameters(self, stage: int, *, tensor: int = 1, pipeline: int = 1) -> int:
        """Parameters of one rank of a pipeline stage.

        The last stage of several has the whole tied embedding module again, positions too.
        """
        count = self.stage_layers(pipeline)[stage] * self.layer_parameters(tensor)
        is_last = stage == pipeline - 1
        if stage == 0 or (is_last and self.tied):
            count += self.embedding_parameters(tensor)
        if is_last:
            count += self.hidden * (1 if self.is_llama else 2)
            count += 0 if self.tied else self.hidden * self.rows(tensor)
        return count

    @property
    def parameters(self) -> int:
        """Parameters of the model, without the vocabulary's padding."""
        padding = (self.rows(1) - self.vocab_size) * self.hidden * (1 if self.tied else 2)
        return self.stage_parameters(0) - padding

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward per token, attention counted whole, as benchmarks/ count them."""
        weights = self.layers * sum(outputs * inputs for outputs, inputs in self.matrices(1))
        weights += self.vocab_size * self.hidden
        return 6.0 * weights + 12.0 * self.layers * self.sequence * self.hidden
