"""A transformers model that computes with one module's weights in memory at a time.

    logits = compute_logits(config, input_ids, names, read)

Every module fetches its weights when its turn comes and lets go of them afterwards, so that models larger than the
memory can be held against golden logits. Nothing of it depends on the model's family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def build(config: Any, names: Collection[str], read: Callable[[str], Tensor], *, dtype: str = "float32") -> Any:
    """The configured model, ready to compute.

    Args:
        config: a transformers configuration of a language model.
        names: the tensors that `read` knows.
        read: gives a tensor by its name, in any floating type.
        dtype: the type to compute in.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    known_as: dict[int, str] = {}  # a tied parameter has several names, the files have one of them
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            known_as[id(parameter)] = name
    for module in model.modules():
        own = {name: known_as[id(parameter)] for name, parameter in module.named_parameters(recurse=False)}
        if own:
            _stream(module, own, lambda name: read(name).to(getattr(torch, dtype)))
    return model.eval()


def compute_logits(
    config: Any, input_ids: Tensor, names: Collection[str], read: Callable[[str], Tensor], *, dtype: str = "float32"
) -> Tensor:
    """The model's logits [batch, length, vocabulary] in float32, computed in `dtype`."""
    import torch

    model = build(config, names, read, dtype=dtype)
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits.float()
    return logits


def _stream(module: Any, own: dict[str, str], read: Callable[[str], Tensor]) -> None:
    import torch

    empty = dict(module.named_parameters(recurse=False))

    def fetch(*_: Any) -> None:
        for name, stored in own.items():
            setattr(module, name, torch.nn.Parameter(read(stored), requires_grad=False))

    def let_go(*_: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(let_go)
