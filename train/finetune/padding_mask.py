"""Training without a padding mask, where that changes no loss: attention may then run in flash kernels.

    leave_out(model, is_packed=False)

A causal model's tokens see none that come after them, so what pads an example on its right is seen by nothing that is
trained. The mask that says so once more is what keeps torch's `scaled_dot_product_attention` from its flash kernels,
and from grouped heads as they are.
"""

from __future__ import annotations

from typing import Any

_CAUSAL = ("gpt2", "llama", "mistral")  # in these the mask goes to the attention, and nowhere else


def leave_out(model: Any, *, is_packed: bool) -> bool:
    """Hands the model no padding mask while it trains. Batches must be padded on the right, as TRL's are.

    Packed batches have positions instead of a mask, and other implementations of attention read it in their own way:
    they are left alone.

    Args:
        model: a causal model of transformers, without wrappers.
        is_packed: whether a row of a batch holds several examples.

    Returns:
        Whether it does.
    """
    config = model.config
    if is_packed or config._attn_implementation != "sdpa" or config.model_type not in _CAUSAL:
        return False
    model.base_model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return True


def _without_mask(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return (arguments, {**options, "attention_mask": None}) if module.training else None
