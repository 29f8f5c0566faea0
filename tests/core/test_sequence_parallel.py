"""Whether the ranks of a tensor group split the sequence, where the recipe leaves it open."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import rehearse, sequence_parallel, settings
from train.recipe import PretrainRecipe


def recipe(*words: str) -> PretrainRecipe:
    files = ["--input_tokenizer_file", "t.model", "--data_path", "d", "--output_model_dir", "out"]
    given = [*files, "--model_size", "gpt_1.3B", "--train_tokens", "1B", "--zero_stage", "1", *words]
    return settings.parse(PretrainRecipe, given, program="pretrain", description="").resolved()


@pytest.mark.parametrize(
    ("words", "device", "is_on"),
    [
        ("--tensor_parallel_size 2", "cuda", True),
        ("--tensor_parallel_size 2", "cpu", False),
        ("--tensor_parallel_size 1", "cuda", False),
        ("--tensor_parallel_size 2 --precision fp16", "cuda", False),
        ("--tensor_parallel_size 2 --no_pipeline_parallel", "cuda", False),
        ("--tensor_parallel_size 4 --sequence_length 2046", "cuda", False),
        ("--tensor_parallel_size 2 --sequence_parallel False", "cuda", False),
        ("--tensor_parallel_size 2 --sequence_parallel", "cpu", True),
    ],
)
def test_an_open_one_goes_by_device_and_layout(words: str, device: str, is_on: bool) -> None:
    chosen = sequence_parallel.settle(recipe(*words.split()), device=device)
    assert chosen.parallel.sequence_parallel is is_on


@pytest.mark.parametrize(("device", "is_on"), [("auto", True), ("cpu", False)])
def test_a_rehearsal_on_a_cpu_has_what_the_run_on_gpus_will_have(device: str, is_on: bool, tmp_path: Path) -> None:
    chosen = recipe("--tensor_parallel_size", "2", "--device", device)
    shrunk = rehearse.shrink(chosen, world_size=2, output_dir=tmp_path).recipe
    assert shrunk.parallel.sequence_parallel is is_on
