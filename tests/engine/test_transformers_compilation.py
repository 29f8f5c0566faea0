"""Models are compiled by themselves where torch.compile can make kernels, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import settings
from train.engine.transformers import compilation
from train.recipe import PretrainRecipe


def settle(*words: str) -> tuple[bool, str]:
    given = ["--model_size", "gpt_0.125B", "--train_tokens", "1B", "--input_tokenizer_file", "t", "--data_path", "d"]
    return compilation.settle(
        settings.parse(
            PretrainRecipe, [*given, "--output_model_dir", "o", *words], program="pretrain", description=""
        ).resolved()
    )


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which all is there."""
    import torch

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(compilation, "find_spec", lambda _name: object())
    monkeypatch.setattr(compilation, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(compilation, "which", lambda name: name)
    (tmp_path / "Python.h").touch()


def test_on_gpus_it_is_on_and_what_is_given_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    is_on, note = settle()
    assert is_on and note.startswith("torch.compile: on")
    assert settle("--torch_compile", "False") == (False, "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert settle() == (False, "") and settle("--torch_compile", "True") == (True, "")


def test_zero_3_is_not_compiled() -> None:
    assert settle("--zero_stage", "2")[0]
    is_on, note = settle("--zero_stage", "3")
    assert not is_on and "ZeRO-3 fetches weights in hooks" in note and "--torch_compile True" in note


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("capability", "this GPU is older"),
        ("triton", "triton is not installed"),
        ("compiler", "needs a C compiler and Python's headers"),
        ("headers", "needs a C compiler and Python's headers"),
    ],
)
def test_where_no_kernels_can_be_made_it_is_off(
    lacks: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    if lacks == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (6, 1))
    elif lacks == "triton":
        monkeypatch.setattr(compilation, "find_spec", lambda _name: None)
    elif lacks == "compiler":
        monkeypatch.setattr(compilation, "which", lambda _name: None)
    else:
        (tmp_path / "Python.h").unlink()
    is_on, note = settle()
    assert not is_on and told in note


def test_the_trainer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train.engine.transformers import worker
    from train.run_folder import RunFolder

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    given = ["--model_size", "gpt_0.125B", "--train_tokens", "1B", "--input_tokenizer_file", "t", "--data_path", "d"]
    for answer in (True, False):
        monkeypatch.setattr(compilation, "settle", lambda _recipe, answer=answer: (answer, ""))
        recipe = settings.parse(
            PretrainRecipe, [*given, "--output_model_dir", str(tmp_path), "--precision", "fp32"], program="p",
            description="",
        ).resolved()  # fmt: skip
        assert worker.training_arguments(recipe, RunFolder.of(recipe)).torch_compile is answer


def test_each_rank_asks_its_own_gpu_and_a_compiler_that_is_named_must_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == 3 else (6, 1))
    assert not settle()[0]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert settle()[0]
    monkeypatch.setenv("LOCAL_RANK", "7")  # more ranks than GPUs
    assert settle()[0]
    monkeypatch.setattr(compilation, "which", lambda name: name if name == "gcc" else None)
    for named, is_there in (("gcc", True), ("gcc -O1", False), ("/no/such/gcc", False), ("", False)):
        monkeypatch.setenv("CC", named)
        is_on, note = settle()
        assert is_on == is_there and (is_on or f"a C compiler (CC is {named!r}) and" in note)
    monkeypatch.delenv("CC")
    assert settle()[0]
    monkeypatch.setattr(compilation, "which", lambda name: name if name == "cc" else None)  # triton does not ask for it
    assert not settle()[0]
