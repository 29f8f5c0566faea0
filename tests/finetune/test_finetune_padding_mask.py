"""A batch that is padded on the right trains without a mask what it trains with one, to the last weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from train.finetune import padding_mask


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of torch's attention so far was given a mask."""
    import torch

    real, given = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*arguments: Any, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> Any:
        given.append(attn_mask is not None)
        assert is_causal is (attn_mask is None)  # without either, every token would see all others
        return real(*arguments, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    yield given


def tiny(kind: str, attention: str = "sdpa") -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 32}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32}
        sizes |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    if kind == "mistral":
        sizes |= {"sliding_window": 4}
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, vocab_size=50, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def padded_batch() -> dict[str, Any]:
    """Three examples of 9, 5 and 2 tokens, whose last ones are trained."""
    import torch

    ids = torch.randint(4, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9)[None] < torch.tensor([[9], [5], [2]])
    trained = mask & (torch.arange(9) > 0)
    return {
        "input_ids": ids.where(mask, 3),
        "attention_mask": mask.long(),
        "labels": ids.where(trained, -100),
        "use_cache": False,
    }


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_loss_and_gradients_are_the_same(kind: str, masks: list[bool]) -> None:
    import torch

    masked, free = tiny(kind).train(), tiny(kind).train()
    assert padding_mask.leave_out(free, is_packed=False)
    losses = [model(**padded_batch()).loss for model in (masked, free)]
    # a window shorter than the batch is a mask of its own, without the padding in it
    assert masks == ([True] * 4 if kind == "mistral" else [True, True, False, False])
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-6)
    for loss in losses:
        loss.backward()
    gradients = [dict(model.named_parameters()) for model in (masked, free)]
    for name, weight in gradients[0].items():
        assert torch.allclose(gradients[1][name].grad, weight.grad, atol=1e-7, rtol=1e-5), name


def test_an_evaluation_keeps_its_mask(masks: list[bool]) -> None:
    model = tiny("llama").eval()
    padding_mask.leave_out(model, is_packed=False)
    model(**padded_batch())
    assert masks == [True, True]


@pytest.mark.parametrize(
    ("kind", "attention", "is_packed"),
    [("llama", "sdpa", True), ("llama", "eager", False), ("gpt_neox", "sdpa", False)],
)
def test_what_is_left_alone(kind: str, attention: str, is_packed: bool) -> None:
    model = tiny(kind, attention)
    assert not padding_mask.leave_out(model, is_packed=is_packed)
    assert not model.base_model._forward_pre_hooks
