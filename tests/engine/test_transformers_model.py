"""The transformers engine's models: what their attention computes, compiled too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train import settings
from train.engine.transformers.model import Vocabulary, build_model
from train.recipe import PretrainRecipe

pytestmark = pytest.mark.slow


def model(architecture: str, attention: str) -> Any:
    words = (
        "--input_tokenizer_file t --data_path d --output_model_dir o --train_tokens 1000 --global_batch_size 2"
        " --lr 1e-3 --num_layers 2 --hidden_size 64 --num_attention_heads 4 --sequence_length 32"
        f" --architecture {architecture} --attention {attention}"
    )
    recipe = settings.parse(PretrainRecipe, words.split(), program="pretrain.sh", description="").resolved()
    return build_model(recipe, Vocabulary(size=100, bos_id=1, eos_id=2, pad_id=3, end_of_document_id=2))


def attention_calls(given: Any) -> list[tuple[bool, bool]]:
    """Of each attention in the compiled model: whether it has a mask, and whether it is causal by a flag."""
    import torch

    found = []

    def look(graph: Any, _inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target):
                found.append((node.kwargs.get("attn_mask") is not None, bool(node.kwargs.get("is_causal"))))
        return graph

    torch._dynamo.reset()
    torch.compile(given, backend=look)(input_ids=torch.randint(100, (2, 32)), use_cache=False)
    return found


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
def test_attention_is_causal_without_a_mask(architecture: str, tmp_path: Path) -> None:
    import torch

    given = model(architecture, "sdpa")
    assert attention_calls(given) == [(False, True)] * 2
    input_ids = torch.randint(100, (2, 32))
    with torch.no_grad():
        found, wanted = (
            one(input_ids=input_ids, use_cache=False).logits for one in (given, model(architecture, "eager"))
        )
    torch.testing.assert_close(found, wanted)
    given.save_pretrained(tmp_path)
    assert "sdpa" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_transformers_own_choice_has_a_mask_where_it_is_compiled() -> None:
    """When this fails transformers leaves the mask out by itself, and `_register_causal_attention` can go."""
    given = model("llama", "sdpa")
    given.config._attn_implementation = "sdpa"
    assert attention_calls(given) == [(True, False)] * 2
