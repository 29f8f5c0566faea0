"""Each thing that keeps a recipe from float8 is refused by name, all at once, and a rehearsal goes without it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from train import rehearse, settings
from train.cluster.allocation import Allocation
from train.engine.megatron_deepspeed import checks, float8_checks, linear
from train.engine.megatron_deepspeed.patches import DISABLED_VARIABLE, Run, compiled_layers, float8
from train.engine.transformers import prepare as transformers_prepare
from train.errors import UserError
from train.recipe import PretrainRecipe


def recipe(**more: object) -> PretrainRecipe:
    given = {
        "input_tokenizer_file": "/data/tok.model", "data_path": "/data/corpus", "output_model_dir": "/runs/out",
        "model_size": "gpt_1.3B", "train_tokens": "1B", "zero_stage": 1,
    } | more  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return settings.parse(PretrainRecipe, words, program="test", description="").resolved()


def on(device: str, processes: int = 1) -> Allocation:
    return Allocation(("here",), processes, device, "in a test")


@pytest.fixture
def with_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_checks.importlib.util, "find_spec", lambda name: name)


LLAMA = {"model_size": "llama_1B", "tensor_parallel_size": 4}


@pytest.mark.parametrize(
    ("flags", "device", "message"),
    [
        ({"precision": "fp32"}, "cuda", "--float8 --precision fp32: what is not float8 is bf16 there"),
        ({}, "cpu", "--float8 needs a GPU: on a CPU leave it out."),
        ({"attention": "eager"}, "cuda", "--float8 --attention eager: float8 is for compiled layers"),
        ({"dropout": 0.1}, "cuda", "--float8 --dropout 0.1: float8 is for compiled layers"),
        ({"hidden_size": 2064, "num_attention_heads": 16, "tensor_parallel_size": 2, "ffn_hidden_size": 8192}, "cuda",
         "--float8: --hidden_size 2064 / --tensor_parallel_size 2 = 1032: a multiple of 16 was expected"),
        ({"ffn_hidden_size": 5461}, "cuda", "--float8: --ffn_hidden_size 5461 / --tensor_parallel_size 1 = 5461"),
        ({"architecture": "llama", "num_key_value_heads": 8, "hidden_size": 192, "num_attention_heads": 24,
          "tensor_parallel_size": 8, "ffn_hidden_size": 1024}, "cuda",
         "--float8: --num_key_value_heads 8, 64 wide together, / --tensor_parallel_size 8 = 8"),
        ({"sequence_length": 2040}, "cuda", "--float8: --sequence_length 2040: a multiple of 16 was expected"),
    ],
)  # fmt: skip
def test_what_float8_cannot_do_is_refused(
    flags: dict[str, object], device: str, message: str, with_torchao: None
) -> None:
    found = checks.problems(recipe(float8=True, **flags), on(device, int(str(flags.get("tensor_parallel_size", 1)))))
    assert any(problem.startswith(message) for problem in found), found
    assert not any("--float8" in problem for problem in checks.problems(recipe(**flags), on(device)))


def test_all_of_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_checks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv(DISABLED_VARIABLE, "compiled-layers")
    chosen = recipe(float8=True, precision="fp32", attention="eager", dropout=0.1, sequence_length=2040)
    found = list(float8_checks.problems(chosen, on("cuda")))
    assert len(found) == 6 and float8_checks.NOT_INSTALLED in found
    assert f"--float8: {DISABLED_VARIABLE} switches compiled-layers off: leave one of them out." in found


@pytest.mark.parametrize(("flags", "processes"), [({}, 1), ({**LLAMA, "sequence_parallel": True}, 4)])
def test_what_it_can_do_is_not(flags: dict[str, object], processes: int, with_torchao: None) -> None:
    chosen = recipe(float8=True, **flags)
    assert chosen.training.float8 and not list(float8_checks.problems(chosen, on("cuda", processes)))


def test_the_other_engine_has_none() -> None:
    found = transformers_prepare.problems(recipe(float8=True), on("cuda"))
    assert "--float8 needs --engine megatron-deepspeed." in found
    assert not any("float8" in problem for problem in transformers_prepare.problems(recipe(), on("cuda")))


def test_a_rehearsal_goes_without_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(float8=True, engine="megatron-deepspeed")
    made = rehearse.shrink(chosen, world_size=2, output_dir=Path("/scratch"))
    assert not made.recipe.training.float8
    assert any("float8 -> bf16" in change for change in made.changes)
    monkeypatch.setattr(float8_checks.importlib.util, "find_spec", lambda name: None)
    assert rehearse.full_size_problems(chosen, 1) == []  # torchao is the cluster's affair
    wrong = dataclasses.replace(chosen, training=dataclasses.replace(chosen.training, precision="fp32"))
    assert any("--float8 --precision fp32" in problem for problem in rehearse.full_size_problems(wrong, 1))


def test_a_rank_refuses_an_old_gpu_and_layers_that_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(linear, "_float8", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError) as refused:
        float8.PATCH.apply(Run(float8=True))
    assert "NVIDIA A100 has compute capability 8.0" in str(refused.value)
    assert "--float8 needs the patch compiled-layers" in str(refused.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--float8 needs a GPU"):
        float8.PATCH.apply(Run(float8=True))


def test_a_rank_without_torchao_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_float8", None)
    monkeypatch.setattr(compiled_layers, "_is_installed", True)
    linear._float8_products.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"pip install torchao==0\.18\.0"):
        float8.PATCH.apply(Run(forced=frozenset({"float8"})))
    assert not linear.is_float8()
