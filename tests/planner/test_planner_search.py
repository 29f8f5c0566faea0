"""Which layouts are looked at, how they are ranked, and what stands in the table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from train import settings
from train.cluster.allocation import Allocation
from train.engine.megatron_deepspeed import checks
from train.planner.layout import divisors
from train.planner.plan import query_of
from train.planner.search import Found, Query, layouts, search
from train.planner.settings import PlanSettings
from train.recipe import ModelSettings, PretrainRecipe

RECIPES = Path(__file__).parents[2] / "scripts" / "step2_pretrain_model" / "recipes"
GOLDEN = Path(__file__).parent / "golden" / "plan_gpt_1.3B_4_h200.txt"


def ask(size: str = "gpt_1.3B", **flags: object) -> tuple[PlanSettings, Query, Found]:
    wanted = PlanSettings(**{"num_gpus": 8, "model": ModelSettings(model_size=size)} | flags)  # type: ignore[arg-type]
    recipe = wanted.recipe()
    query = query_of(wanted, recipe)
    return wanted, query, search(wanted.shape(recipe), query)


def test_divisors() -> None:
    assert list(divisors(12)) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("size", ["gpt_1.3B", "llama_1B", "mistral_0.3B"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_layout_is_one_that_the_engine_takes(size: str, precision: str) -> None:
    wanted, query, found = ask(size, precision=precision, num_gpus=16)
    recipe = wanted.recipe()
    allocation = Allocation(("node1", "node2"), 8, "cuda", "for the test")
    assert len(found.fitting) > 50
    for candidate in found.fitting:
        layout = candidate.layout
        assert layout.ranks == 16 and layout.tensor <= 8
        assert layout.micro_batch * layout.micro_batches * layout.data == query.global_batch
        parallel = dataclasses.replace(
            recipe.parallel,
            tensor_parallel_size=layout.tensor,
            pipeline_parallel_size=layout.pipeline,
            data_parallel_size=layout.data,
            zero_stage=layout.zero_stage,
            sequence_parallel=layout.sequence_parallel,
        )
        training = dataclasses.replace(recipe.training, micro_batch_size=layout.micro_batch)
        chosen = dataclasses.replace(recipe, parallel=parallel, training=training)
        assert checks.problems(chosen, allocation) == []


SIZED_RECIPES = sorted(file.stem for file in RECIPES.glob("*.yaml") if re.fullmatch(r"(gpt|llama)_[\d.]+B", file.stem))


@pytest.mark.parametrize("gpu", ["a100_80", "h100"])
@pytest.mark.parametrize("name", SIZED_RECIPES)
def test_a_recipe_has_a_layout_that_is_nearly_the_fastest(name: str, gpu: str) -> None:
    words = ["--recipe", name, "--input_tokenizer_file", "t.model", "--data_path", "d", "--output_model_dir", "o"]
    recipe = settings.parse(PretrainRecipe, words, program="p", description="", recipe_dir=RECIPES).resolved()
    assert recipe.parallel.engine == "auto" and recipe.training.micro_batch_size == 0
    _, _, found = ask(recipe.model.model_size, gpu=gpu, num_gpus=256 if name == "gpt_175B" else 16)
    wanted = (recipe.parallel.tensor_parallel_size, recipe.parallel.pipeline_parallel_size, recipe.parallel.zero_stage)
    chosen = next(
        candidate
        for candidate in found.fitting
        if (candidate.layout.tensor, candidate.layout.pipeline, candidate.layout.zero_stage) == wanted
    )
    assert not chosen.layout.recompute and chosen.seconds <= 1.05 * found.fitting[0].seconds


def test_the_fastest_that_fits_comes_first() -> None:
    _, query, found = ask(gpu_memory_gib=40.0)
    seconds = [candidate.seconds for candidate in found.fitting]
    assert seconds == sorted(seconds)
    assert all(candidate.needed_gib <= query.usable_gib for candidate in found.fitting)
    assert all(candidate.needed_gib > query.usable_gib for candidate in found.too_large)
    assert found.too_large[0].needed_gib == min(candidate.needed_gib for candidate in found.too_large)
    assert found.shown[0] == found.fitting[0]
    ways = [dataclasses.replace(candidate.layout, micro_batch=0, micro_batches=0) for candidate in found.shown]
    assert len(set(ways)) == len(ways)


def test_less_memory_costs_speed() -> None:
    fastest = [ask(gpu_memory_gib=gib)[2].fitting[0] for gib in (139.0, 40.0, 24.0)]
    assert fastest[0].seconds < fastest[1].seconds < fastest[2].seconds


def test_flags_fix_a_part_of_the_layout() -> None:
    wishes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "micro_batch_size": 4, "zero_stage": 1,
              "sequence_parallel": True, "activation_checkpoint": False}  # fmt: skip
    _, _, found = ask(**wishes)
    (only,) = found.fitting
    assert only.layout.text == "TP2 x PP2 x DP2 ZeRO-1 SP micro batch 4"
    assert only.layout.micro_batches == 512 // 2 // 4


def test_tensor_ranks_stay_in_a_node() -> None:
    wanted, query, _ = ask(num_gpus=12, gpus_per_node=6, global_batch_size=96)
    tensor = {layout.tensor for layout in layouts(wanted.shape(wanted.recipe()), query)}
    assert tensor == {1, 2}, "of 16 heads and 6 GPUs"


def test_a_node_may_be_used_in_part() -> None:
    wanted, query, _ = ask("gpt_0.125B", num_gpus=6, global_batch_size=96)
    tensor = {layout.tensor for layout in layouts(wanted.shape(wanted.recipe()), query)}
    assert tensor == {1, 2, 3, 6}, "of 12 heads and 6 GPUs of a node of 8"


def test_a_large_batch_is_looked_at_no_longer_than_a_small_one() -> None:
    wanted, query, _ = ask(num_gpus=2, global_batch_size=2**40)
    assert max(layout.micro_batch for layout in layouts(wanted.shape(wanted.recipe()), query)) == 64


def test_the_plan_is_the_golden_one(launch) -> None:
    words = "--model_size gpt_1.3B --num_gpus 4 --gpu h200 --vocab_size 32000 --train_tokens 26B --show 5"
    done = launch("step2_pretrain_model/plan.sh", *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout == GOLDEN.read_text(), f"if this change is meant, write it to {GOLDEN}"


def test_the_flags_of_the_first_are_ones_that_pretrain_takes(launch, tmp_path: Path) -> None:
    done = launch("step2_pretrain_model/plan.sh", "--model_size", "gpt_1.3B", "--num_gpus", "4", "--gpu_memory_gib", 10)
    assert done.returncode == 0, done.stderr
    flags = done.stdout.strip().splitlines()[-1].split()
    assert "--activation_checkpoint" in flags
    from train import settings
    from train.recipe import PretrainRecipe

    files = {"input_tokenizer_file": "a.model", "data_path": "d", "output_model_dir": str(tmp_path)}
    words = [word for name, value in files.items() for word in (f"--{name}", value)]
    words += ["--model_size", "gpt_1.3B", "--train_tokens", "1B"]
    recipe = settings.parse(PretrainRecipe, [*words, *flags], program="pretrain.sh", description="")
    assert recipe.parallel.zero_stage == 1 and recipe.parallel.activation_checkpoint
