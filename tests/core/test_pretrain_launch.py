"""What pretraining refuses before anything starts, and which engine it takes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from train import cli, manifest, sequence_parallel
from train import pretrain_checks as checks
from train.cluster.allocation import Allocation
from train.data.indexed_dataset import IndexedDatasetWriter
from train.early_end import END_BY_VARIABLE
from train.engine import choose
from train.engine.megatron_deepspeed import checkout
from train.errors import EXIT_INTERRUPTED, UserError
from train.pretrain import pretrain
from train.recipe import PretrainRecipe

HERE = Allocation(("host",), 2, "cpu", "for the test")
TINY = ["--num_layers", "2", "--hidden_size", "64", "--num_attention_heads", "4", "--global_batch_size", "8", "--lr",
        "1e-3", "--train_tokens", "1M", "--device", "cpu", "--precision", "fp32"]  # fmt: skip


@pytest.fixture
def paths(tmp_path: Path, project_root: Path) -> dict[str, Path]:
    shutil.copy(project_root / "tests" / "data" / "tiny.model", tmp_path / "t.model")
    prefix = tmp_path / "data" / "d_text_document"
    prefix.parent.mkdir()
    with IndexedDatasetWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), np.dtype(np.uint16)) as writer:
        for _ in range(10):
            writer.add_document([1, 2, 3])
    return {
        "input_tokenizer_file": tmp_path / "t.model",
        "data_path": prefix.parent,
        "output_model_dir": tmp_path / "o",
    }


def run(paths: dict[str, Path], *words: str) -> int:
    given = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    return cli.run(PretrainRecipe, pretrain, [*given, *TINY, *words], description="", example="", recipe_dir=None)


def recipe(*words: str) -> PretrainRecipe:
    from train import settings

    required = ["--input_tokenizer_file", "t", "--data_path", "d", "--output_model_dir", "o"]
    return settings.parse(PretrainRecipe, [*required, *TINY, *words], program="p", description="").resolved()


def test_a_missing_tokenizer_is_named(paths, capsys):
    paths["input_tokenizer_file"] = paths["input_tokenizer_file"].with_name("no.model")
    assert run(paths) == 2
    assert "no.model is missing: name the .model file that step 1 wrote" in capsys.readouterr().err
    assert not paths["output_model_dir"].exists()


def test_missing_data_is_named(paths, capsys):
    paths["data_path"] = paths["data_path"].with_name("nowhere")
    assert run(paths) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not paths["output_model_dir"].exists()


def test_data_of_another_tokenizer_is_refused(paths, capsys, tmp_path):
    file = paths["data_path"] / "d_text_document.manifest.json"
    manifest.write(
        file, step="preprocess_data", settings={}, inputs=[], results={"tokenizer_sha256": "another"}, started=0.0
    )
    assert run(paths) == 2
    assert "was tokenized with another tokenizer than" in capsys.readouterr().err


def test_ids_beyond_the_vocabulary_never_reach_the_embedding(paths, capsys):
    """Without a manifest the ids themselves are looked at."""
    data = paths["data_path"] / "d_text_document.bin"
    data.write_bytes(np.array([1, 2, 65000] * 10, dtype=np.uint16).tobytes())
    assert run(paths) == 2
    assert "holds id 65,000" in capsys.readouterr().err
    assert not paths["output_model_dir"].exists()


def test_what_is_no_tokenizer_is_refused(paths, capsys):
    paths["input_tokenizer_file"].write_text("not a model")
    assert run(paths) == 2
    assert "t.model is not a SentencePiece model" in capsys.readouterr().err


def test_the_batch_must_divide_over_the_ranks(paths, capsys):
    assert run(paths, "--num_processes", "3", "--engine", "transformers", "--dry_run") == 2
    said = capsys.readouterr().err
    assert "--global_batch_size 8 is not a multiple of 3 data parallel ranks: change one; 9 would do." in said


def test_what_both_engines_refuse_is_told_once(paths, capsys):
    assert run(paths, "--num_processes", "1", "--micro_batch_size", "3", "--dry_run") == 2
    said = capsys.readouterr().err
    assert said.count("--micro_batch_size 3 x 1 data parallel rank = 3: change one; 9 would do.") == 1


def test_what_a_run_would_choose_itself_is_not_held_against_its_user():
    on_gpus = Allocation(("host",), 2, "cuda", "for the test")
    chosen = sequence_parallel.settle(recipe("--tensor_parallel_size", "2", "--precision", "bf16"), device="cuda")
    assert chosen.parallel.sequence_parallel
    found = choose.engine(choose.TRANSFORMERS).problems(chosen, on_gpus)
    assert any("--tensor_parallel_size 2 needs" in problem for problem in found)
    assert not any("sequence_parallel" in problem for problem in found)
    alone = choose.engine(choose.TRANSFORMERS).problems(recipe("--sequence_parallel"), on_gpus)
    assert "--sequence_parallel needs --engine megatron-deepspeed." in alone


@pytest.fixture
def no_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv(checkout.DIRECTORY_VARIABLE, str(tmp_path / "none"))


@pytest.fixture
def a_checkout(monkeypatch, tmp_path):
    found = checkout.Checkout(path=tmp_path / "megatron", commit="0" * 40, reason="made up")
    monkeypatch.setattr(checkout, "find_checkout", lambda: found)


def test_without_a_checkout_transformers_trains_and_says_why(no_checkout):
    name, reason = choose.choose(recipe(), HERE)
    assert name == "transformers" and "install_megatron_deepspeed.sh" in reason


def test_with_a_checkout_megatron_trains_what_it_can(a_checkout, tmp_path):
    assert choose.choose(recipe(), HERE) == ("megatron-deepspeed", f"installed at {tmp_path / 'megatron'}")
    name, reason = choose.choose(recipe("--offload", "optimizer", "--zero_stage", "1"), HERE)
    assert name == "transformers" and "--offload optimizer" in reason


def test_a_named_engine_wins_or_says_why_not(a_checkout, no_checkout):
    assert choose.choose(recipe("--engine", "transformers"), HERE) == ("transformers", "asked for")
    with pytest.raises(UserError, match="--offload optimizer"):
        choose.choose(recipe("--engine", "megatron-deepspeed", "--offload", "optimizer", "--zero_stage", "1"), HERE)
    with pytest.raises(UserError, match="--tensor_parallel_size 2 needs --engine megatron-deepspeed"):
        choose.choose(recipe("--engine", "transformers", "--tensor_parallel_size", "2"), HERE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--megatron_arguments=--swiglu"], "--megatron_arguments needs --engine megatron-deepspeed"),
        (["--data_parallel_size", "4"], "--data_parallel_size 4: there are 2 ranks; start so many"),
        (["--log_optimizer_state", "True"], "--log_optimizer_state needs --engine megatron-deepspeed"),
        (["--rope_theta", "5e5"], "--rope_theta 500000: GPT-2 has learned positions"),
    ],
)
def test_what_transformers_would_ignore_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        choose.choose(recipe("--engine", "transformers", *words), HERE)
    assert choose.choose(recipe("--engine", "transformers", "--architecture", "llama", "--rope_theta", "5e5"), HERE)


def test_what_only_megatron_can_do_is_refused_without_it(no_checkout):
    with pytest.raises(UserError) as caught:
        choose.choose(recipe("--tensor_parallel_size", "2"), HERE)
    assert "needs --engine megatron-deepspeed" in caught.value.problems[0]
    assert "install_megatron_deepspeed.sh" in caught.value.problems[1]
    with pytest.raises(UserError, match=r"install_megatron_deepspeed.sh"):
        choose.choose(recipe("--engine", "megatron-deepspeed"), HERE)


def test_the_vocabulary_has_the_rows_that_the_engine_is_told(paths, capsys):
    from train import pretrain_checks as module
    from train import settings

    given = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    chosen = settings.parse(
        PretrainRecipe, [*given, *TINY, "--tensor_parallel_size", "2"], program="p", description=""
    ).resolved()
    for argv, rows in (((), 512), (("--make-vocab-size-divisible-by", "520"), 1_040)):
        assert module.vocab_rows(chosen, choose.MEGATRON, argv) == rows
        assert f"{rows:,} rows = {rows // 2:,} x 2 tensor ranks" in capsys.readouterr().out


def test_overwrite_does_not_remove_the_weights_it_would_begin_with(paths, capsys, a_checkout):
    initial = paths["output_model_dir"] / "checkpoint" / "j" / "global_step4"
    initial.mkdir(parents=True)
    words = ("--engine", "megatron-deepspeed", "--job_name", "j", "--overwrite", "--initial_checkpoint_dir")
    assert run(paths, *words, str(initial)) == 2
    assert f"holds the input {initial}, which it would replace" in capsys.readouterr().err
    assert initial.is_dir()


@pytest.mark.parametrize(("further", "exit_code"), [(-1, EXIT_INTERRUPTED), (0, 0), (2, 0)])
def test_a_run_is_done_when_its_last_step_is_there(paths, capsys, monkeypatch, further, exit_code):
    steps = recipe().train_steps

    def ranks(_command, run_folder):
        run_folder.step_dir(steps + further).mkdir(parents=True)

    monkeypatch.setattr("train.pretrain._train", ranks)
    assert run(paths, "--engine", "transformers", "--job_name", "j") == exit_code
    out, err = capsys.readouterr()
    file = paths["output_model_dir"] / "manifest" / "j.json"
    if exit_code:
        assert f"the engine ended after step {steps - 1:,} of {steps:,}: the same command goes on from there" in err
        assert "done:" not in out and not file.exists()
    else:
        assert f"global_step{steps + further}, " in out
        assert manifest.read(file)["results"]["steps"] == steps + further
        assert run(paths, "--engine", "transformers", "--job_name", "j") == 0
        assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "recorded", "words", "is_over"),
    [
        ("megatron-deepspeed", {"activation_checkpoint": True}, [], True),
        ("transformers", {"activation_checkpoint": True, "torch_compile": False}, [], True),
        ("megatron-deepspeed", {"sequence_parallel": True, "tensor_parallel_size": 2}, [], True),
        ("transformers", {"num_processes": 4, "data_parallel_size": 4, "engine": "auto", "device": "cuda"}, [], True),
        ("transformers", {}, ["--log_interval", "7", "--save_interval", "3", "--keep_last", "9"], True),
        ("transformers", {"activation_checkpoint": True}, ["--micro_batch_size", "2"], False),
        ("transformers", {}, ["--micro_batch_size", "0", "--num_processes", "4"], True),
        ("megatron-deepspeed", {}, ["--seed", "7"], False),
    ],
)
def test_a_finished_run_is_over_however_it_was_computed(paths, capsys, monkeypatch, engine, recorded, words, is_over):
    """Open settings are settled by the GPUs of the machine that the launcher runs on."""
    steps = recipe().train_steps
    monkeypatch.setattr(
        "train.pretrain._train", lambda _plan, run_folder: run_folder.step_dir(steps).mkdir(parents=True)
    )
    assert run(paths, "--engine", "transformers", "--job_name", "j") == 0
    file = paths["output_model_dir"] / "manifest" / "j.json"
    record = json.loads(file.read_text())
    record["results"]["engine"] = engine
    record["settings"]["parallel"] |= recorded
    file.write_text(json.dumps(record))
    capsys.readouterr()
    code = run(paths, "--engine", "transformers", "--job_name", "j", *words)
    out, err = capsys.readouterr()
    assert ("nothing to do" in out) == is_over and (code == 0) == is_over
    assert is_over or "holds another run" in err


def test_the_time_budget_counts_while_the_launcher_checks(paths, capsys, monkeypatch):
    """Reshaping a checkpoint may take longer than the margin before the queue's wall time."""
    clock, check_data, given = time.time, checks.check_data, []

    def slow(recipe):
        monkeypatch.setattr(time, "time", lambda: clock() + 3600)
        return check_data(recipe)

    def ranks(plan, _run_folder):
        given.append(float(plan.job.environment[END_BY_VARIABLE]))

    monkeypatch.setattr(checks, "check_data", slow)
    monkeypatch.setattr("train.pretrain._train", ranks)
    began = clock()
    assert run(paths, "--engine", "transformers", "--job_name", "j", "--time_budget_min", "30") == EXIT_INTERRUPTED
    capsys.readouterr()
    assert began <= given[0] - 30 * 60 < began + 1800
