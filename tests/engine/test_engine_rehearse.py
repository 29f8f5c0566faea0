"""The rehearsal: the layout stays, the model shrinks, and the real engine trains, saves, resumes and exports it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from train import rehearse, same_run, settings
from train.data.docstrings import docstring_documents
from train.engine.megatron_deepspeed import checkout
from train.errors import EXIT_USER, EXIT_VERIFICATION, UserError
from train.recipe import PretrainRecipe


def recipe(size: str = "gpt_1.3B", **flags: object) -> PretrainRecipe:
    given = {
        "input_tokenizer_file": "/data/tok.model",
        "data_path": "/data/corpus_text_document",
        "output_model_dir": "/runs/out",
        "model_size": size,
        "train_tokens": "300B",
        "zero_stage": 1,
    } | flags
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return settings.parse(PretrainRecipe, argv, program="test", description="").resolved()


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ({"data_parallel_size": 8, "tensor_parallel_size": 2}, 4, 16),
        ({"num_processes": 6}, 4, 6),
        ({"tensor_parallel_size": 2}, 4, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 0, 8),  # ZeRO wants a second data rank
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "zero_stage": 0, "precision": "fp32"}, 0, 4),
        ({"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, 0, 16),
        ({"global_batch_size": 8, "micro_batch_size": 8}, 0, 1),  # a batch for one rank is no reason to refuse
    ],
)
def test_ranks_are_the_recipes(flags: dict[str, object], gpus: int, expected: int) -> None:
    assert rehearse.target_world_size(recipe(**flags), gpus=gpus)[0] == expected


def test_the_layout_stays_and_the_model_shrinks() -> None:
    chosen = recipe("llama_1B", tensor_parallel_size=4, pipeline_parallel_size=2, sequence_parallel=True, dropout=0.1)
    made = rehearse.shrink(chosen, world_size=16, output_dir=Path("/scratch"))
    assert made.world_size == made.recipe.parallel.num_processes == 16
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "zero_stage", "sequence_parallel"):
        assert getattr(made.recipe.parallel, name) == getattr(chosen.parallel, name)
    model = made.recipe.model
    assert (model.architecture, model.num_layers, model.num_key_value_heads) == ("llama", 2, 4)
    assert model.num_attention_heads == 8 and model.hidden_size == 64  # grouped queries stay grouped
    assert made.recipe.data == chosen.data
    assert made.recipe.training.precision == "bf16" and made.recipe.train_steps == 4
    assert any("dropout 0.1 -> 0" in change for change in made.changes)


def test_more_ranks_than_fit_lose_data_parallel_ranks_only() -> None:
    chosen = recipe(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=64)
    made = rehearse.shrink(chosen, world_size=256, output_dir=Path("/scratch"))
    assert made.world_size == 16 and made.recipe.parallel.data_parallel_size == 4
    assert made.changes[0] == "data parallel 64 -> 4 (16 ranks at most)"
    with pytest.raises(UserError, match="8 tensor x 4 pipeline = 32 ranks, and a rehearsal runs up to 16"):
        rehearse.shrink(
            recipe(tensor_parallel_size=8, pipeline_parallel_size=4), world_size=32, output_dir=Path("/scratch")
        )


def test_what_a_cpu_lacks_is_replaced_and_told() -> None:
    chosen = recipe(precision="fp16", attention="flash_attention_2")
    made = rehearse.shrink(chosen, world_size=2, output_dir=Path("/scratch"))
    assert made.recipe.training.precision == "bf16" and made.recipe.parallel.attention == "sdpa"
    told = " ".join(made.changes)
    assert "precision fp16 -> bf16" in told and "flash_attention_2 -> sdpa" in told
    without_zero = recipe(precision="fp16", zero_stage=0)
    assert rehearse.shrink(without_zero, world_size=1, output_dir=Path("/s")).recipe.training.precision == "fp32"


def test_initial_weights_are_of_another_size_than_the_rehearsals() -> None:
    made = rehearse.shrink(recipe(initial_checkpoint_dir="/initial"), world_size=2, output_dir=Path("/scratch"))
    assert made.recipe.checkpoint.initial_checkpoint_dir is None
    assert any("--initial_checkpoint_dir -> random ones" in change for change in made.changes)


def test_a_wrong_path_leaves_nothing(tmp_path: Path) -> None:
    wrong = recipe(engine="transformers", output_model_dir=tmp_path, input_tokenizer_file=tmp_path / "no.model")
    with pytest.raises(UserError, match=r"no\.model is missing"):
        rehearse.rehearse(wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("interrupted: it goes on", exit_code=130)])
def test_an_interrupted_rehearsal_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_recipe: PretrainRecipe) -> str:
        assert list(tmp_path.glob("rehearsal/*/train.log"))
        raise error

    monkeypatch.setattr(rehearse, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearse.rehearse(recipe(engine="transformers", output_model_dir=tmp_path))
    assert not list(tmp_path.iterdir()) and "failed" not in capsys.readouterr().out


def test_what_is_no_rehearsal_stays_and_two_at_the_same_time_are_refused(tmp_path: Path) -> None:
    chosen = recipe(engine="transformers", output_model_dir=tmp_path, job_name="mine")
    folder = tmp_path / "rehearsal" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no rehearsal's folder: move it away, or choose another --job_name"):
        rehearse.rehearse(chosen)
    assert [file.name for file in folder.parent.rglob("*") if file.is_file()] == ["thesis.txt"]
    with (
        same_run.claimed(folder.parent / ".mine.lock", "it"),
        pytest.raises(UserError, match="mine is being made by another process"),
    ):
        rehearse.rehearse(chosen)


def test_a_file_where_the_folder_belongs_is_told(tmp_path: Path) -> None:
    (tmp_path / "rehearsal").write_text("mine")
    with pytest.raises(UserError, match="a part of this path is a file; choose another --output_model_dir"):
        rehearse.rehearse(recipe(engine="transformers", output_model_dir=tmp_path))


def test_a_batch_that_ramps_up_does_not_in_a_rehearsal() -> None:
    chosen = recipe(megatron_arguments="--rampup-batch-size 32 32 1000000 --log-world-size-to-tensorboard")
    made = rehearse.shrink(chosen, world_size=2, output_dir=Path("/scratch"))
    assert made.recipe.parallel.megatron_arguments == "--log-world-size-to-tensorboard"
    assert any(change.startswith("--rampup-batch-size") for change in made.changes)
    made = rehearse.shrink(recipe(), world_size=2, output_dir=Path("/scratch"))
    assert not any("rampup" in change for change in made.changes) and not made.recipe.parallel.megatron_arguments


def test_the_full_size_is_checked_before_the_small_one_runs() -> None:
    unfit = recipe("mistral_0.3B", tensor_parallel_size=16, engine="megatron-deepspeed", data_parallel_size=1)
    assert any(
        "--num_key_value_heads 8 / --tensor_parallel_size 16" in p for p in rehearse.full_size_problems(unfit, 16)
    )
    fits = recipe("llama_1B", tensor_parallel_size=8, attention="flash_attention_2", data_parallel_size=2)
    assert rehearse.full_size_problems(fits, 16) == []


@pytest.mark.parametrize("engine", ["auto", "megatron-deepspeed", "transformers"])
def test_the_micro_batch_may_be_left_open(engine: str) -> None:
    left_open = recipe(micro_batch_size=0, engine=engine)
    assert rehearse.full_size_problems(left_open, 2) == []
    assert rehearse.shrink(left_open, world_size=2, output_dir=Path("/scratch")).recipe.training.micro_batch_size == 1


def test_memory_that_is_not_there_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "_available_bytes", lambda: 4 * 2**30)
    assert rehearse.memory_problems(4) == []
    assert "16 ranks need about 10 GB of memory, 4 GB is free" in rehearse.memory_problems(16)[0]


@pytest.fixture(scope="module")
def corpus(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of step 1 and the tokens of its text, by the launchers."""
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    folder = tmp_path_factory.mktemp("corpus")
    texts = [document["text"] for document in itertools.islice(docstring_documents(), 100)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    step1 = ("--input", folder / "text.jsonl", "--model_prefix", folder / "tok", "--vocab_size", "500")
    step2 = ("--input", folder / "text.jsonl", "--input_tokenizer_file", folder / "tok.model")
    for script, words in (
        ("step1_train_tokenizer/train_sentencepiece_tokenizer.py", step1),
        ("step2_pretrain_model/preprocess_data.sh", (*step2, "--output_prefix", folder / "sums")),
    ):
        done = launch(script, *map(str, words))
        assert done.returncode == 0, done.stderr
    return folder


def words(corpus: Path, output: Path, *more: str) -> list[str]:
    paths = (
        *("--input_tokenizer_file", str(corpus / "tok.model")),
        *("--data_path", str(corpus / "sums_text_document")),
        *("--output_model_dir", str(output), "--split", "80,10,10"),
    )
    return [*paths, "--rehearse", *more]


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.xdist_group("megatron_engine")
def test_a_llama_recipe_is_rehearsed_in_tp2_pp2(launch, corpus, tmp_path) -> None:
    more = ("--recipe", "llama_1B", "--engine", "megatron-deepspeed", "--data_parallel_size", "1")
    more += ("--tensor_parallel_size", "2", "--pipeline_parallel_size", "2")
    done = launch("step2_pretrain_model/pretrain.sh", *words(corpus, tmp_path, *more))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 ranks (tensor x pipeline x --data_parallel_size)" in done.stdout
    assert "from step 2: losses equal" in done.stdout
    assert done.stdout.rstrip().endswith("trains, saves, resumes, exports and verifies in its layout.")
    assert not list(tmp_path.glob("rehearsal*"))


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.xdist_group("megatron_engine")
def test_a_failing_stage_shows_its_output_and_its_log_stays(launch, corpus, tmp_path) -> None:
    more = ("--recipe", "gpt_0.125B", "--engine", "megatron-deepspeed", "--data_parallel_size", "1")
    more += ("--device", "cpu", "--lr", "1e30", "--clip_grad", "0")
    done = launch("step2_pretrain_model/pretrain.sh", *words(corpus, tmp_path, *more))
    assert done.returncode not in (0, EXIT_USER, EXIT_VERIFICATION)
    assert "the rehearsal failed; all of its output: " in done.stdout
    assert list(tmp_path.glob("rehearsal/*/train.log"))
