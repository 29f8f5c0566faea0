"""Named model sizes: the shape, and the learning rate, batch and initialisation that belong to it.

The GPT-3 rows are table 2.1 of https://arxiv.org/abs/2005.14165; `init_method_std` follows sqrt(1 / (3 * hidden_size))
of https://arxiv.org/abs/2201.11990, rounded as in the seeds' pretraining scripts. The Llama rows are the shapes of
https://arxiv.org/abs/2302.13971 and of Llama 3.2 1B, and one as large as gpt_1.3B; the Mistral row is a 300M-class
model with grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """A row of the table. Batch sizes are in sequences, `ffn_hidden_size` 0 means 4 x hidden_size."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    ffn_hidden_size: int
    global_batch_size: int
    lr: float
    min_lr: float
    init_method_std: float


def _gpt(layers: int, hidden: int, heads: int, batch: int, lr: float, std: float) -> ModelSize:
    return ModelSize("gpt2", layers, hidden, heads, heads, 4 * hidden, batch, lr, 1.0e-6, std)


def _llama(layers: int, hidden: int, heads: int, groups: int, ffn: int, lr: float) -> ModelSize:
    return ModelSize("llama", layers, hidden, heads, groups, ffn, 512, lr, lr / 10, 0.02)


MODEL_SIZES: dict[str, ModelSize] = {
    "gpt_0.125B": _gpt(12, 768, 12, 256, 6.0e-4, 0.02),
    "gpt_0.35B": _gpt(24, 1024, 16, 256, 3.0e-4, 0.018),
    "gpt_0.76B": _gpt(24, 1536, 16, 256, 2.5e-4, 0.015),
    "gpt_1.3B": _gpt(24, 2048, 16, 512, 2.0e-4, 0.013),
    "gpt_2.7B": _gpt(32, 2560, 32, 512, 1.6e-4, 0.011),
    "gpt_6.7B": _gpt(32, 4096, 32, 1024, 1.2e-4, 0.009),
    "gpt_13B": _gpt(40, 5120, 40, 1024, 1.0e-4, 0.008),
    "gpt_20B": _gpt(44, 6144, 64, 1536, 1.0e-4, 0.007),
    "gpt_175B": _gpt(96, 12288, 96, 1536, 0.6e-4, 0.005),
    "llama_1B": _llama(16, 2048, 32, 8, 8192, 3.0e-4),
    "llama_1.3B": _llama(24, 2048, 16, 4, 6144, 2.0e-4),
    "llama_7B": _llama(32, 4096, 32, 32, 11008, 3.0e-4),
    "llama_13B": _llama(40, 5120, 40, 40, 13824, 3.0e-4),
    "mistral_0.3B": ModelSize("mistral", 24, 1024, 16, 8, 2400, 256, 6.0e-4, 6.0e-5, 0.02),
}
