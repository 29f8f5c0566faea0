"""What keeps a recipe from training in float8 (`--float8`), as far as it can be seen before a rank starts.

The rank itself looks at its GPU and at what was patched: patches/float8.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from train.cluster.allocation import Allocation
from train.engine.megatron_deepspeed import patches
from train.recipe import PretrainRecipe

# the version in pyproject.toml: what is called of it is not promised to stay
NOT_INSTALLED = "--float8 needs the package torchao: pip install torchao==0.18.0, or leave it out."
_MULTIPLE = 16  # what torch._scaled_mm takes: both sides of a weight, and the tokens, whose sums are a third product
_PATCHES = ("compiled-layers", "float8")


def problems(recipe: PretrainRecipe, allocation: Allocation) -> Iterator[str]:
    """One line each; nothing for a recipe without float8."""
    training, parallel = recipe.training, recipe.parallel
    if not training.float8:
        return
    if training.precision != "bf16":
        yield f"--float8 --precision {training.precision}: what is not float8 is bf16 there; use --precision bf16."
    if allocation.device == "cpu":
        yield "--float8 needs a GPU: on a CPU leave it out."
    elif importlib.util.find_spec("torchao") is None:
        yield NOT_INSTALLED
    if parallel.attention != "sdpa":
        yield f"--float8 --attention {parallel.attention}: float8 is for compiled layers; use --attention sdpa."
    if recipe.model.dropout:
        yield f"--float8 --dropout {recipe.model.dropout}: float8 is for compiled layers; use --dropout 0."
    off = patches.disabled_names(os.environ).intersection(_PATCHES)
    if off:
        yield f"--float8: {patches.DISABLED_VARIABLE} switches {', '.join(sorted(off))} off: leave one of them out."
    yield from _sizes(recipe)


def _sizes(recipe: PretrainRecipe) -> Iterator[str]:
    model, tensor = recipe.model, recipe.parallel.tensor_parallel_size
    assert model.hidden_size and model.ffn_hidden_size and model.num_attention_heads and model.num_key_value_heads
    shares = {
        f"--hidden_size {model.hidden_size}": model.hidden_size,
        f"--ffn_hidden_size {model.ffn_hidden_size}": model.ffn_hidden_size,
    }
    if model.num_key_value_heads != model.num_attention_heads:
        width = model.num_key_value_heads * (model.hidden_size // model.num_attention_heads)
        shares[f"--num_key_value_heads {model.num_key_value_heads}, {width} wide together,"] = width
    for name, size in shares.items():
        if size % (_MULTIPLE * tensor):
            yield (
                f"--float8: {name} / --tensor_parallel_size {tensor} = {size / tensor:g}: a multiple of {_MULTIPLE} was"
                " expected; change one of them, or leave --float8 out."
            )
    if model.sequence_length % _MULTIPLE:
        yield f"--float8: --sequence_length {model.sequence_length}: a multiple of {_MULTIPLE} was expected."
