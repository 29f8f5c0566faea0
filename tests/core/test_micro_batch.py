from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from train import micro_batch, settings
from train.cluster.allocation import Allocation
from train.engine import choose
from train.micro_batch import ThisGpu
from train.recipe import PretrainRecipe

H200, A100 = ThisGpu("NVIDIA H200", 140.4), ThisGpu("NVIDIA A100-SXM4-40GB", 40.0)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainRecipe:
    """gpt_1.3B in bf16 with the micro batch left open, and a tokenizer of 32,000 pieces."""
    monkeypatch.setattr("train.checkpoint.megatron.vocabulary.engine_vocab_size", lambda _file: 32_000)
    words = ["--model_size", "gpt_1.3B", "--train_tokens", "1B", "--zero_stage", "1", "--micro_batch_size", "0"]
    words += ["--input_tokenizer_file", "t.model", "--data_path", "d", "--output_model_dir", str(tmp_path)]
    return settings.parse(PretrainRecipe, words, program="pretrain", description="").resolved()


def with_size(recipe: PretrainRecipe, size: int) -> PretrainRecipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, micro_batch_size=size))


def ranks(count: int, device: str = "cuda") -> Allocation:
    return Allocation(("here",), count, device, "")


def settled(recipe: PretrainRecipe, gpu: ThisGpu | None, **more: object) -> tuple[int, str]:
    engine = str(more.pop("engine", choose.MEGATRON))
    allocation = more.pop("allocation", ranks(1))
    found, note = micro_batch.settle(recipe, engine, allocation, gpu=gpu, **more)  # type: ignore[arg-type]
    return found.training.micro_batch_size, note


def test_the_smallest_that_is_as_fast_as_any_is_taken(recipe: PretrainRecipe) -> None:
    size, note = settled(recipe, H200)
    assert size == 16  # 32 is predicted to be faster by less than the prediction knows, and takes 50 GiB more
    assert "micro batch: 16, by the plan as fast as any that fits: 77 of the 140 GiB" in note
    small, _ = settled(recipe, dataclasses.replace(A100, memory_gib=50.0))
    assert 0 < small < size and 512 % small == 0


def test_more_ranks_leave_more_room(recipe: PretrainRecipe) -> None:
    gpu = ThisGpu("NVIDIA A100-SXM4-40GB", 36.0)
    alone, many = settled(recipe, gpu)[0], settled(recipe, gpu, allocation=ranks(8))[0]
    assert many > alone


def test_given_stages_are_planned(recipe: PretrainRecipe) -> None:
    two = changed(recipe, "parallel", pipeline_parallel_size=2)
    gpu = dataclasses.replace(A100, memory_gib=60.0)
    even = settled(two, gpu, allocation=ranks(2))[0]
    assert settled(changed(two, "parallel", layers_per_stage=(23, 1)), gpu, allocation=ranks(2))[0] < even


def test_the_transformers_engine_takes_a_smaller_one(recipe: PretrainRecipe) -> None:
    assert settled(recipe, A100, engine="transformers")[0] < settled(recipe, A100)[0]


def changed(recipe: PretrainRecipe, part: str, **values: object) -> PretrainRecipe:
    return dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **values)})


def recomputes(recipe: PretrainRecipe, gpu: ThisGpu, **more: object) -> tuple[bool | None, int, str]:
    found, note = micro_batch.settle(recipe, choose.MEGATRON, ranks(1), gpu=gpu, **more)  # type: ignore[arg-type]
    return found.parallel.activation_checkpoint, found.training.micro_batch_size, note


def of_size(recipe: PretrainRecipe, name: str) -> PretrainRecipe:
    words = ["--model_size", name, "--train_tokens", "1B", "--zero_stage", "1", "--micro_batch_size", "0"]
    words += ["--input_tokenizer_file", "t.model", "--data_path", "d", "--output_model_dir", "o"]
    return settings.parse(PretrainRecipe, words, program="pretrain", description="").resolved()


def test_activations_are_recomputed_where_that_is_the_fastest_that_fits(recipe: PretrainRecipe) -> None:
    small, roomy = (dataclasses.replace(A100, memory_gib=size) for size in (25.5, 80.0))
    assert recomputes(recipe, roomy)[0] is False
    is_on, size, note = recomputes(recipe, small)
    assert is_on and f"micro batch: {size}, activations recomputed, by the plan as fast as any" in note
    without = changed(recipe, "parallel", activation_checkpoint=False)
    assert recomputes(without, small)[0] is False and "even that needs" in recomputes(without, small)[2]
    given = changed(recipe, "parallel", activation_checkpoint=True)
    assert recomputes(given, roomy)[0] is True


def test_a_larger_micro_batch_may_be_worth_recomputation(recipe: PretrainRecipe) -> None:
    mistral, gpu = of_size(recipe, "mistral_0.3B"), ThisGpu("NVIDIA GeForce RTX 4070", 12.0)
    found, _ = micro_batch.settle(mistral, choose.TRANSFORMERS, ranks(1), gpu=gpu)
    assert found.parallel.activation_checkpoint and found.training.micro_batch_size > 2
    without = changed(mistral, "parallel", activation_checkpoint=False)
    assert 1 <= settled(without, gpu, engine="transformers")[0] <= 2


def test_where_nothing_fits_the_least_is_taken_and_both_figures_are_told(recipe: PretrainRecipe) -> None:
    large, gpu = of_size(recipe, "gpt_2.7B"), ThisGpu("NVIDIA L40S", 48.0)
    is_on, size, note = recomputes(large, gpu)
    assert (is_on, size) == (True, 1)
    assert "micro batch: 1, activations recomputed; even that needs 46.9 GiB by the plan" in note
    assert "of this NVIDIA L40S 46.1 may be used" in note
    is_on, size, note = recomputes(with_size(large, 1), gpu)
    assert (is_on, size) == (True, 1) and note.startswith("warning: a micro batch of 1 needs 46.9 GiB of GPU memory")
    assert "with activations recomputed by the plan, and of the 48.0 of this NVIDIA L40S 46.1 may be used: no" in note
    kept = changed(with_size(large, 1), "parallel", activation_checkpoint=False)
    assert recomputes(kept, gpu)[0] is False and recomputes(kept, gpu)[2].startswith(
        "warning: a micro batch of 1 needs"
    )


def test_a_run_that_goes_on_recomputes_where_it_must(recipe: PretrainRecipe) -> None:
    small, roomy = (dataclasses.replace(A100, memory_gib=size) for size in (25.5, 80.0))
    assert recomputes(recipe, small, recorded=1)[:2] == (True, 1)
    assert recomputes(recipe, roomy, recorded=8)[:2] == (False, 8)
    without = changed(recipe, "parallel", activation_checkpoint=False)
    assert recomputes(without, small, recorded=1)[:2] == (False, 1)


def test_what_zero_spreads_leaves_room(recipe: PretrainRecipe) -> None:
    gpu, many = ThisGpu("NVIDIA A100-SXM4-40GB", 36.0), ranks(8)
    sizes = [
        settled(changed(recipe, "parallel", zero_stage=stage), gpu, engine="transformers", allocation=many)[0]
        for stage in (0, 1, 3)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_what_the_plan_is_not_for_is_not_taken_from_it(recipe: PretrainRecipe) -> None:
    assert settled(changed(recipe, "model", dropout=0.1), A100)[0] < settled(recipe, A100)[0]
    size, note = settled(changed(recipe, "parallel", attention="eager"), H200)
    assert size == 1 and "--attention eager" in note
    across = changed(recipe, "parallel", tensor_parallel_size=2)  # tensor ranks on two nodes
    size, note = settled(across, H200, allocation=Allocation(("a", "b"), 1, "cuda", ""))
    assert size == 1 and "does not know this layout" in note


@pytest.mark.parametrize(
    ("gpu", "more", "size", "words"),
    [
        (H200, {"recorded": 4}, 4, "as in this run so far"),
        (None, {"allocation": ranks(2, "cpu")}, 4, "on a CPU"),
        (None, {}, 1, "nvidia-smi does not tell"),
        (None, {}, 1, "activations are kept, --activation_checkpoint True needs less memory"),
        (
            ThisGpu("NVIDIA T4", 8.0),
            {},
            1,
            "even that needs 24.0 GiB by the plan, and of this NVIDIA T4 7.7 may be used",
        ),
    ],
)
def test_where_there_is_nothing_to_choose(
    recipe: PretrainRecipe, gpu: ThisGpu | None, more: dict[str, object], size: int, words: str
) -> None:
    found, note = settled(recipe, gpu, **more)
    assert found == size and words in note


def test_a_recorded_one_that_no_longer_divides_is_not_taken(recipe: PretrainRecipe) -> None:
    assert settled(recipe, H200, recorded=3)[0] != 3


def test_what_is_given_stands_with_a_warning_where_it_will_not_fit(recipe: PretrainRecipe) -> None:
    assert settled(with_size(recipe, 4), A100) == (4, "")
    size, note = settled(with_size(recipe, 64), A100)
    assert size == 64 and note.startswith("warning: a micro batch of 64 needs")
    assert "GiB of GPU memory with activations recomputed by the plan, and of the 40.0 of this NVIDIA A100" in note
    advised = int(note.partition("--micro_batch_size ")[2].split()[0])
    is_on, size, note = recomputes(with_size(recipe, advised), A100)
    assert (
        is_on and size == advised and note.startswith(f"activations are recomputed, as a micro batch of {advised} fits")
    )
    faster = int(note.partition("(--micro_batch_size ")[2].split()[0])
    assert faster < advised and recomputes(with_size(recipe, faster), A100) == (False, faster, "")
    # beyond those that the plan tries by itself
    size, note = settled(changed(recipe, "training", global_batch_size=512, micro_batch_size=128), A100)
    assert size == 128 and note.startswith("warning: a micro batch of 128 needs") and "would fit" in note
    batch = changed(recipe, "training", global_batch_size=512)
    assert recomputes(batch, dataclasses.replace(H200, memory_gib=120.0), recorded=128)[:2] == (True, 128)
    assert settled(with_size(recipe, 64), None) == (64, "")
    assert settled(with_size(recipe, 3), A100) == (3, "")  # it does not divide, which others tell
    assert settled(with_size(recipe, 64), A100, engine="transformers") == (64, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVIDIA H200, 143771\nNVIDIA H200, 143771\n", ThisGpu("NVIDIA H200", 143771 / 1024)),
        ("NVIDIA A100-SXM4-80GB, 81920\nNVIDIA A100-SXM4-40GB, 40960\n", ThisGpu("NVIDIA A100-SXM4-40GB", 40.0)),
        ("NVIDIA H100, [N/A]\n", None),
        ("", None),
    ],
)
def test_what_nvidia_smi_says(text: str, expected: ThisGpu | None) -> None:
    assert micro_batch.parse(text) == expected


def test_only_an_open_one_is_filled_to_look_at_the_rest(recipe: PretrainRecipe) -> None:
    assert micro_batch.open_to_one(recipe).training.micro_batch_size == 1
    given = with_size(recipe, 8)
    assert micro_batch.open_to_one(given) is given
