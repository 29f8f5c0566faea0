"""Megatron-DeepSpeed's launch: what is rendered from a recipe, and what is refused before anything starts."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest

from train import settings
from train.cluster.allocation import Allocation
from train.engine.megatron_deepspeed import checkout, other_versions, prepare
from train.engine.megatron_deepspeed.arguments import megatron_arguments
from train.engine.megatron_deepspeed.checkout import Checkout
from train.engine.megatron_deepspeed.deepspeed_config import deepspeed_config
from train.errors import UserError
from train.recipe import PretrainRecipe
from train.run_folder import Load, RunFolder

GOLDEN = Path(__file__).parent / "golden"
RUN_FOLDER = RunFolder(Path("/runs/out"), "job")


def recipe(**flags: object) -> PretrainRecipe:
    given = {
        "input_tokenizer_file": "/data/tok.model",
        "data_path": "/data/corpus_text_document",
        "output_model_dir": "/runs/out",
        "job_name": "job",
        "train_tokens": "1M",
        "lr_warmup_tokens": "10K",
        "lr_decay_tokens": "900K",
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "sequence_length": 128,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "lr": "6e-4",
        "precision": "fp32",
    } | flags
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return settings.parse(PretrainRecipe, argv, program="test", description="").resolved()


def allocation(processes: int, device: str = "cpu") -> Allocation:
    return Allocation(("host",), processes, device, "a test")


def rendered_flags() -> set[str]:
    """All flags in the golden files; the pinned version knows them."""
    words = " ".join(
        file.read_text() for file in (Path(__file__).parent / "golden").glob("megatron_arguments_*")
    ).split()
    return {word for word in words if word.startswith("--")} | {"--load", "--load-tag", "--finetune"}


@pytest.fixture
def no_checkout_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.pass_through, "known_flags", lambda _checkout: rendered_flags())
    monkeypatch.setattr(checkout, "find_checkout", lambda: Checkout(Path("/mds"), "c0ffee", "a test"))


@pytest.mark.parametrize(
    ("name", "flags", "processes"),
    [
        ("tp2_pp2", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4),
        (
            "dp2_zero1_bf16_no_pipeline",
            {
                "zero_stage": 1,
                "precision": "bf16",
                "no_pipeline_parallel": True,
                "activation_checkpoint": True,
                "eval_interval": 0,
                "log_optimizer_state": True,
            },
            2,
        ),
        (
            "llama_tp2_sequence_parallel",
            {
                "architecture": "llama",
                "num_key_value_heads": 2,
                "rope_theta": 5e5,
                "tensor_parallel_size": 2,
                "sequence_parallel": True,
            },
            2,
        ),
    ],
)
def test_arguments_are_the_golden_ones(name: str, flags: dict[str, object], processes: int) -> None:
    words = megatron_arguments(recipe(**flags), allocation(processes), RUN_FOLDER, ["/data/corpus_text_document"])
    file = GOLDEN / f"megatron_arguments_{name}.txt"
    lines = " ".join(words).replace(" --", "\n--") + "\n"
    assert lines == file.read_text(), f"if this change is meant, write it to {file}"


def test_resumes_by_the_newest_folders_name(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path, "job")
    for step in (5, 20, 10):
        run_folder.step_dir(step).mkdir(parents=True)
    words = megatron_arguments(recipe(), allocation(1), run_folder, ["/d"])
    assert words[-4:] == ("--load", str(run_folder.checkpoint_dir), "--load-tag", "global_step20")


def test_learning_rate_is_in_samples_that_cover_the_tokens() -> None:
    chosen = recipe(train_tokens=5000, lr_warmup_tokens=129, lr_decay_tokens=4000)
    words = megatron_arguments(chosen, allocation(1), RUN_FOLDER, ["/d"])
    values = dict(itertools.pairwise(words))
    assert values["--train-samples"] == "48"  # 3 steps of 16 sequences of 128 tokens
    assert values["--lr-warmup-samples"] == "2" and values["--lr-decay-samples"] == "32"


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {}),
        (
            "bf16",
            {
                "bf16": {"enabled": True, "immediate_grad_update": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
            },
        ),
    ],
)
def test_deepspeed_config(precision: str, expected: dict[str, object]) -> None:
    config = deepspeed_config(recipe(precision=precision, zero_stage=1))
    assert config == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 489,
        "wall_clock_breakdown": False,
        **expected,
    }
    json.dumps(config)


def test_fp16_scales_its_loss() -> None:
    assert deepspeed_config(recipe(precision="fp16"))["fp16"]["loss_scale"] == 0  # 0 is dynamic


def test_command(no_checkout_needed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    chosen = dataclasses.replace(recipe(tensor_parallel_size=2), dry_run=True)
    command = prepare.prepare(chosen, allocation(2), RUN_FOLDER)
    worker = command.argv[:8]
    assert worker[:3] == (sys.executable, "-m", "train.engine.megatron_deepspeed.worker")
    assert worker[3:] == ("--recipe", "/runs/out/recipe/job.yaml", "--engine_commit", "c0ffee", "--")
    assert "--data-path /data/corpus_text_document --data-impl" in " ".join(command.argv)
    assert command.environment["PYTHONPATH"] == "/mds:/mine"
    assert command.environment["DS_ACCELERATOR"] == "cpu" and command.environment["LOCAL_SIZE"] == "2"
    assert command.environment["TORCH_EXTENSIONS_DIR"] == "/runs/out/torch_extensions"
    assert command.environment["THP_MEM_ALLOC_ENABLE"] == "1"
    at_once = dataclasses.replace(chosen, checkpoint=dataclasses.replace(chosen.checkpoint, async_save=False))
    assert "THP_MEM_ALLOC_ENABLE" not in prepare.prepare(at_once, allocation(2), RUN_FOLDER).environment
    assert json.loads(command.files[RUN_FOLDER.deepspeed_config]) == deepspeed_config(chosen)
    assert settings.build(PretrainRecipe, __import__("yaml").safe_load(command.files[RUN_FOLDER.recipe])) is not None


@pytest.mark.parametrize(("tensor", "device", "given"), [(1, "cuda", None), (2, "cpu", None), (2, "cuda", "1")])
def test_what_tensor_ranks_exchange_goes_first_on_gpus(
    tensor: int, device: str, given: str | None, no_checkout_needed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCH_NCCL_HIGH_PRIORITY"
    monkeypatch.delenv(name, raising=False)
    chosen = dataclasses.replace(recipe(tensor_parallel_size=tensor, attention="eager"), dry_run=True)
    where = dataclasses.replace(allocation(2), device=device)
    assert prepare.prepare(chosen, where, RUN_FOLDER).environment.get(name) == given
    monkeypatch.setenv(name, "0")
    assert prepare.prepare(chosen, where, RUN_FOLDER).environment.get(name) == (given and "0")  # the user's own stands


@pytest.fixture
def small_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    flags = ["'--rampup-batch-size', nargs='*'", "'--num-layers', type=int", "'--embedding-weights-in-fp32',"]
    flags += ["'--make-vocab-size-divisible-by', type=int"]
    flags += [f"'{flag}'," for flag in sorted(rendered_flags())]
    (tmp_path / "megatron" / "arguments.py").write_text("\n".join(f"g.add_argument({flag})" for flag in flags))
    monkeypatch.setattr(checkout, "find_checkout", lambda: Checkout(tmp_path, "c0ffee", "a test"))


def test_further_arguments_come_last(small_checkout: None) -> None:
    chosen = dataclasses.replace(
        recipe(megatron_arguments="--rampup-batch-size 4 4 100 --embedding-weights-in-fp32"), dry_run=True
    )
    words = prepare.prepare(chosen, allocation(1), RUN_FOLDER).argv
    assert words[-5:] == ("--rampup-batch-size", "4", "4", "100", "--embedding-weights-in-fp32")


def test_further_arguments_that_upstream_does_not_know_or_the_recipe_renders_are_refused(small_checkout: None) -> None:
    chosen = dataclasses.replace(recipe(megatron_arguments="x --rampup-batch-sice 4 --num-layers 2"), dry_run=True)
    with pytest.raises(UserError) as error:
        prepare.prepare(chosen, allocation(1), RUN_FOLDER)
    assert [problem.partition(":")[2].strip() for problem in error.value.problems][1:] == [
        "Megatron-DeepSpeed has no --rampup-batch-sice; did you mean --rampup-batch-size?",
        "--num-layers is already rendered from the recipe; set it there.",
    ]
    assert "'x' is no flag" in error.value.problems[0]


def test_how_the_vocabulary_is_padded_is_the_checkpoints_when_a_run_goes_on(small_checkout: None) -> None:
    given = "--make-vocab-size-divisible-by 64 --embedding-weights-in-fp32"
    chosen = dataclasses.replace(recipe(megatron_arguments=given), dry_run=True)
    assert " ".join(prepare.prepare(chosen, allocation(1), RUN_FOLDER).argv).endswith(given)
    loading = dataclasses.replace(RUN_FOLDER, load=Load("global_step4", vocabulary_divisor=192))
    words = prepare.prepare(chosen, allocation(1), loading).argv
    assert words[-3:] == ("--make-vocab-size-divisible-by", "192", "--embedding-weights-in-fp32")
    assert words.count("--make-vocab-size-divisible-by") == 1
    assert prepare.pass_through.words(given.replace(" 64", "=64"), words) == ("--embedding-weights-in-fp32",)


@pytest.mark.parametrize(("words", "rendered", "message"), [
    ("--bf16", (), "--bf16 is a setting of its own; pass --precision bf16."),
    ("--train-iters 7", (), "--train-iters is a setting of its own; pass --train_tokens."),
    ("--load=/x", (), "--load is a setting of its own; pass --initial_checkpoint_dir."),
    ("--reset-attention-mask", (), "--reset-attention-mask has no effect with the pipeline module, nor with flash"),
    ("--reset-attention-mask", ("--no-pipeline-parallel", "--use-flash-attn-v2"), "on GPUs --attention eager."),
    ("--reset-attention-mask", ("--no-pipeline-parallel",), ""),
])  # fmt: skip
def test_what_further_arguments_cannot_say_is_refused(words: str, rendered: tuple[str, ...], message: str) -> None:
    found = prepare.pass_through.problems(words, rendered, {"--reset-attention-mask"})
    assert bool(found) == bool(message) and all(message in problem for problem in found)


def test_a_single_dash_is_no_flag_but_a_number_may_have_one() -> None:
    found = prepare.pass_through.problems("--swiglu -h --hysteresis -3 -1e-5", [], {"--swiglu", "--hysteresis"})
    assert found == ["--megatron_arguments: -h is no flag of a training; flags begin with two dashes."]


def test_what_upstream_says_against_values_is_told() -> None:
    told = prepare.pass_through.refusals_told
    parser = argparse.ArgumentParser()
    parser.add_argument("--exit-interval", type=int)
    with pytest.raises(UserError, match="says: argument --exit-interval: invalid int value: 'five'; change"), told("x"):
        parser.parse_args(["--exit-interval", "five"])
    with pytest.raises(SystemExit), told(""):  # nothing was passed on: not the user's doing
        parser.parse_args(["--exit-interval", "five"])
    for name, text, error in (
        ("arguments", "x", UserError),
        ("arguments", "", AssertionError),
        ("model", "x", AssertionError),
    ):
        code = compile("assert 1 == 2, 'expected start batch size to be at least 1'", f"/m/megatron/{name}.py", "exec")
        with pytest.raises(error, match="expected start batch size"), told(text):
            exec(code, {})


def test_unbalanced_quotes_in_further_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="No closing quotation; quote it as in a shell"):
        recipe(megatron_arguments="--a 'b")


def test_a_version_that_lacks_an_argument_goes_without_or_is_refused(tmp_path: Path) -> None:
    fork = Checkout(Path("/mds"), "1c68b0e71237e6d9734881ed6b99beae66d048cf", "a test")
    known = {"--num-layers", "--data-path", "--swiglu", "--load"}
    arguments = ("--num-layers", "2", "--data-path", "0.5", "a", "0.5", "b", "--swiglu")
    load = ("--load", str(tmp_path))
    implied = (*load, "--rotary-position-embeddings-theta", "10000", "--load-tag", "global_step4")
    (tmp_path / "latest").write_text("global_step4")
    assert other_versions.fitted((*implied, *arguments), known, fork) == (*load, *arguments)
    for prepare_latest in ((tmp_path / "latest").unlink, lambda: (tmp_path / "latest").write_text("global_step8")):
        prepare_latest()  # it would begin anew, or load another step
        with pytest.raises(UserError, match="has no --load-tag global_step4, which this run needs"):
            other_versions.fitted((*implied, *arguments), known, fork)
    with pytest.raises(UserError) as error:
        other_versions.fitted(
            (*arguments, "--rotary-position-embeddings-theta", "500000", "--load-tag", "global_step4_universal"),
            known,
            fork,
        )
    assert [problem.partition(" which this")[0] for problem in error.value.problems] == [
        "this Megatron-DeepSpeed (/mds, commit 1c68b0e7) has no --rotary-position-embeddings-theta 500000,",
        "this Megatron-DeepSpeed (/mds, commit 1c68b0e7) has no --load-tag global_step4_universal,",
    ]
    assert "use the pinned one (6acc370a; leave MEGATRON_DEEPSPEED_DIR unset)" in error.value.problems[0]


@pytest.mark.megatron
def test_the_pinned_version_knows_every_argument_that_is_rendered() -> None:
    found = checkout.find_checkout()
    if found is None or found.commit != checkout.PINNED_COMMIT:
        pytest.skip(checkout.why_missing() or "another version is chosen")
    assert rendered_flags() <= prepare.pass_through.known_flags(found.path)


def test_blends_become_weights_and_prefixes(no_checkout_needed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data import blend

    part = dataclasses.make_dataclass("Part", ["prefix", "weight"])
    monkeypatch.setattr(blend, "read_blend", lambda _path: (part(Path("/a"), 0.25), part(Path("/b"), 0.75)))
    assert "--data-path 0.25 /a 0.75 /b --data-impl" in prepare.prepare(recipe(), allocation(1), RUN_FOLDER).text()


def test_layout_is_an_equation() -> None:
    assert prepare.layout(recipe(tensor_parallel_size=2, pipeline_parallel_size=2), allocation(8)) == (
        "world size 8 = 2 tensor x 2 pipeline x 2 data parallel; global batch 16 = 2 micro batch x 2 data parallel x 4"
        " accumulation steps"
    )
    split = recipe(tensor_parallel_size=2, sequence_parallel=True)
    assert prepare.layout(split, allocation(2)).endswith("accumulation steps; sequence parallel")


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            6,
            "world size 6 = 2 tensor x 2 pipeline x 1.5 data",
        ),
        (
            {"global_batch_size": 12},
            4,
            "--micro_batch_size 2 x 4 data parallel ranks = 8: change one; 16 would do",
        ),
        ({"tensor_parallel_size": 8}, 8, "--num_attention_heads 4 / --tensor_parallel_size 8 = 0.5"),
        ({"tensor_parallel_size": 2, "ffn_hidden_size": 33}, 2, "--ffn_hidden_size 33 / --tensor_parallel_size 2"),
        ({"pipeline_parallel_size": 5}, 5, "--num_layers 4 / --pipeline_parallel_size 5: each pipeline stage"),
        ({"layers_per_stage": "4", "pipeline_parallel_size": 2}, 2, "--layers_per_stage 4: a number for each of the 2"),
        ({"pipeline_parallel_size": 2, "no_pipeline_parallel": True}, 2, "--no_pipeline_parallel contradicts"),
        ({"sequence_parallel": True}, 1, "--sequence_parallel splits over the tensor ranks, and there is one"),
        (
            {"tensor_parallel_size": 2, "sequence_parallel": True, "no_pipeline_parallel": True},
            2,
            "--sequence_parallel --no_pipeline_parallel: upstream cuts the sequence twice",
        ),
        (
            {"tensor_parallel_size": 2, "sequence_parallel": True, "sequence_length": 127},
            2,
            "--sequence_parallel: --sequence_length 127 / --tensor_parallel_size 2 = 63.5",
        ),
        ({"data_parallel_size": 4}, 2, "2 data parallel, but --data_parallel_size 4 needs 4 ranks"),
        (
            {"architecture": "llama", "num_key_value_heads": 2, "tensor_parallel_size": 4},
            4,
            "--num_key_value_heads 2 / --tensor_parallel_size 4 = 0.5",
        ),
        ({"zero_stage": 2}, 1, "--zero_stage 2: DeepSpeed's pipeline module"),
        ({"zero_stage": 3}, 1, "--zero_stage 3: this engine spreads layers"),
        ({"offload": "optimizer", "zero_stage": 1}, 1, "--offload optimizer: only --engine transformers"),
        ({"torch_compile": True}, 1, "--torch_compile: only --engine transformers"),
        ({"precision": "bf16"}, 1, "--precision bf16 --zero_stage 0"),
        ({"precision": "fp16", "zero_stage": 1}, 1, "--precision fp16: on a CPU"),
        ({"dropout": 0.1}, 1, "--dropout 0.1: on a CPU"),
        ({"attention": "flash_attention_2"}, 1, "--attention flash_attention_2 needs a GPU"),
        ({"rope_theta": 5e5}, 1, "--rope_theta 500000: GPT-2 has learned positions"),
        ({"architecture": "llama", "rope_theta": 0.5}, 1, "--rope_theta 0.5: Megatron-DeepSpeed takes whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused(flags: dict[str, object], processes: int, message: str) -> None:
    found = prepare.problems(recipe(**flags), allocation(processes))
    assert len(found) == 1 and message in found[0]


def test_without_balanced_stages_all_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_DISABLED_PATCHES", "balanced-stages")
    alike = recipe(pipeline_parallel_size=2)
    assert prepare.problems(alike, allocation(2)) == []
    asked_for = dataclasses.replace(alike, parallel=dataclasses.replace(alike.parallel, layers_per_stage=(2, 2)))
    for refused, processes in ((recipe(pipeline_parallel_size=3), 3), (asked_for, 2)):
        (found,) = prepare.problems(refused, allocation(processes))
        assert f"without balanced-stages each of the {processes} pipeline stages" in found


def test_what_fits_is_not_refused() -> None:
    chosen = recipe(tensor_parallel_size=2, pipeline_parallel_size=2, zero_stage=1, precision="bf16")
    assert prepare.problems(chosen, allocation(8)) == []


def test_all_problems_at_once(no_checkout_needed: None) -> None:
    with pytest.raises(UserError) as error:
        prepare.prepare(recipe(zero_stage=3, dropout=0.1), allocation(1), RUN_FOLDER)
    assert len(error.value.problems) == 2


def test_on_cuda_flash_attn_is_needed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert prepare.problems(recipe(), allocation(1, "cuda")) == []
    found = prepare.problems(recipe(attention="flash_attention_2"), allocation(1, "cuda"))
    assert "flash-attn is not installed" in found[0] and "bf16 or fp16 only" in found[1]


def test_missing_checkout_is_refused_with_the_installer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(checkout.DIRECTORY_VARIABLE, str(tmp_path / "nowhere"))
    chosen = dataclasses.replace(recipe(), dry_run=True)
    with pytest.raises(UserError, match=r"nowhere \(MEGATRON_DEEPSPEED_DIR names it\): there is no such folder; "):
        prepare.prepare(chosen, allocation(1), RUN_FOLDER)


def test_shapes_that_another_version_breaks_are_refused(small_checkout: None, tmp_path: Path) -> None:
    llama = {"architecture": "llama", "num_key_value_heads": 2, "no_pipeline_parallel": True}
    found = Checkout(tmp_path, "4efb479d" + "0" * 32, "a test")
    newer = frozenset({"--ds-sequence-parallel-fpdt"})
    problems = other_versions.broken_shapes(recipe(**llama), newer, found)
    assert "--num_key_value_heads 2: this Megatron-DeepSpeed" in problems[0] and "4efb479d" in problems[0]
    assert "--no_pipeline_parallel: " in problems[1] and "use the pinned one (6acc370a" in problems[1]
    assert other_versions.broken_shapes(recipe(**llama), frozenset(), found) == []
    assert other_versions.broken_shapes(recipe(architecture="llama"), newer, found) == []
    assert other_versions.broken_shapes(recipe(no_pipeline_parallel=True), newer, found) == []
