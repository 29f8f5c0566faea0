"""Real trainings of a tiny model: what comes out is what was trained, and an interrupted run ends in the same place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from failing_at import failing_at  # type: ignore[import-not-found]
from finetune_samples import SEEDS_LAUNCHER, argv, call  # type: ignore[import-not-found]

from train import process
from train import settings as settings_module
from train.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE_LOSS, EXIT_VERIFICATION
from train.finetune import command, launch
from train.finetune.settings import FinetuneSettings
from train.process import Command

pytestmark = pytest.mark.slow


@pytest.fixture
def files(files: dict[str, Any]) -> dict[str, Any]:
    return files | {
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 6,
        "logging_steps": 1,
        "show_examples": 1,
    }


def _metrics(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_one_process_from_data_to_answers(
    files: dict[str, Any], base_model: Path, question_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train.checkpoint import verification
    from train.finetune import masks
    from train.finetune.generate import GenerateSettings, answers

    words = argv(files, max_steps=300, save_steps=150, logging_steps=10, eval_data_files=question_file, eval_steps=150)
    words += ["--profile_step", "11"]
    assert call(*words) == 0
    told = capsys.readouterr().out
    assert "### Assistant:[[ cat is tac.</s>]]" in told
    assert "step 300/300 (100%)" in told and "checkpoint saved" in told and "step 11 was recorded" in told

    out = files["output_dir"]
    results = json.loads((out / "manifest.json").read_text())["results"]
    assert results["last_loss"] < 0.1 < 5 < results["first_loss"]
    assert results["eval_loss"] < 0.1 < 5 < results["first_eval_loss"]
    assert results["base_model_on_hub"] is False
    assert results["examples"]["examples"] == 12 and results["steps"] == 300
    assert [record["step"] for record in results["lineage"]] == ["convert_model"]
    recorded = sorted(file.name for file in (out / "profile").iterdir())
    assert recorded == ["step11_rank0.json", "step11_rank0.trace.json.gz"]
    inputs = [Path(item["path"]) for item in json.loads((out / "manifest.json").read_text())["inputs"]]
    assert inputs[0] == base_model / "manifest.json" and question_file in inputs

    record = verification.require(out)
    assert record["weights"]["max_abs_difference"] == 0 and record["weights"]["tensors"] == 21
    assert record["logits"]["relative_difference"] <= 1e-5
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base_model / name).read_bytes()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".out")]
    assert any((out / "tensorboard").iterdir()) and any((out / "log").iterdir()) and (out / "recipe.yaml").is_file()

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert masks.prompt_ids(tokenizer, [{"role": "user", "content": "x"}])[-1] == tokenizer(":")["input_ids"][-1]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == tokenizer.eos_token_id
    asked = GenerateSettings(model_name_or_path=str(out), prompt="-", max_new_tokens=40, device="cpu")
    prompts = ["what is cat?", "what is sky?", "what is 犬?"]
    said = list(answers(asked, prompts))
    assert [answer.answer for answer in said] == ["cat is tac.", "sky is yks.", "犬 is 犬."]
    assert all(answer.ended for answer in said)

    again = settings_module.build(FinetuneSettings, settings_module.read_yaml(out / "recipe.yaml"))
    assert launch.finetune(again) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert call(*words[:-1], "12") == 0  # what is recorded makes no other run
    assert "nothing to do" in capsys.readouterr().out
    assert call(*argv(files, max_steps=3)) == 2
    assert "exists already: pass --overwrite" in capsys.readouterr().err


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*argv(files, output_dir=tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "build_command", failing_at(7, "raise KeyboardInterrupt"))
        assert call(*argv(files)) == EXIT_INTERRUPTED
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    assert not files["output_dir"].exists()
    unfinished = launch.FinetuneFolder(files["output_dir"])
    half_written = unfinished.checkpoint_dir / "checkpoint-6"
    shutil.copytree(unfinished.checkpoint_dir / "checkpoint-4", half_written)
    (half_written / "whole").unlink()

    assert call(*argv(files, profile_step=3)) == 0
    told = capsys.readouterr().out
    assert "going on from step 4" in told
    assert "note: --profile_step 3: nothing is recorded, as the run goes from step 4" in told
    assert _metrics(files["output_dir"]) == _metrics(tmp_path / "whole")
    one, other = _weights(files["output_dir"]), _weights(tmp_path / "whole")
    assert all(one[name].equal(other[name]) for name in other)
    tokens = [json.loads(line)["tokens"] for line in (files["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    assert tokens == sorted(tokens) and len(set(tokens)) == 8


def test_the_last_step_is_told_and_no_token_is_lost_by_an_interruption(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every fifth step is told; the run ends after its eighth, and breaks off after the checkpoint of its fourth."""
    seldom = files | {"logging_steps": 5}
    assert call(*argv(seldom, output_dir=tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "build_command", failing_at(7, "raise KeyboardInterrupt"))
        assert call(*argv(seldom)) == EXIT_INTERRUPTED
    assert call(*argv(seldom)) == 0
    told = capsys.readouterr().out

    def results(folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "manifest.json").read_text())["results"])

    whole, resumed = results(tmp_path / "whole"), results(files["output_dir"])
    assert [step for step, _ in whole["loss_curve"]] == [1, 4, 5, 8]
    assert resumed["loss_curve"] == whole["loss_curve"] and resumed["tokens"] == whole["tokens"]
    assert whole["tokens"] == 4 * whole["examples"]["tokens"]  # eight steps of six are four times all twelve
    assert f"loss {whole['first_loss']:.4f} -> {whole['last_loss']:.4f} in 8 steps" in told


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_tied_weight_is_saved_and_counted_once(files: dict[str, Any], tmp_path: Path, stage: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tied = tmp_path / "tied"
    shutil.copytree(files["model_name_or_path"], tied)
    config = LlamaConfig.from_pretrained(tied)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tied)
    changes = {"model_name_or_path": tied, "zero_stage": stage, "num_processes": 2 if stage else 1, "max_steps": 1}
    assert call(*argv(files, **changes)) == 0
    out = files["output_dir"]
    assert "lm_head.weight" not in _weights(out) and len(_weights(out)) == 20
    expected = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tied).parameters())
    assert json.loads((out / "manifest.json").read_text())["results"]["parameters"] == expected


@pytest.mark.parametrize("place", ["loss", "weights"])
def test_nan_has_its_own_exit_code_and_names_the_last_good_checkpoint(
    files: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil = {
        "loss": "next(model.parameters()).data.fill_(float('nan'))",
        "weights": "self.optimizer.step = lambda *a, **k: next(model.parameters()).data.fill_(float('inf'))",
    }
    monkeypatch.setattr(command, "build_command", failing_at({"loss": 6, "weights": 8}[place], spoil[place]))
    assert call(*argv(files)) == EXIT_NON_FINITE_LOSS
    told = capsys.readouterr().err
    assert "loss or weights are nan" in told and "checkpoint-4" in told
    assert not files["output_dir"].exists()


def test_a_batch_that_trains_nothing_stops_the_run(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "build_command", failing_at(2, "inputs['labels'].fill_(-100)"))
    assert call(*argv(files)) == 2
    assert "step 2: a batch has no token to train" in capsys.readouterr().err
    assert not launch.FinetuneFolder(files["output_dir"]).root.exists()  # nothing to go on with


def test_a_package_that_only_the_ranks_miss_is_one_message(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "raise ImportError('You need lomo_optim.\\nInstall it.')"
    monkeypatch.setattr(command, "build_command", failing_at(1, missing))
    assert call(*argv(files, trainer_arguments="optim=adafactor")) == 2
    told = capsys.readouterr()
    assert "error: --trainer_arguments optim=adafactor: You need lomo_optim." in told.err
    assert "Traceback" not in told.out + told.err
    assert not launch.FinetuneFolder(files["output_dir"]).root.exists()


def test_packed_sequences_that_make_no_batch_end_before_training(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"packing": True, "trainer_arguments": "dataloader_drop_last=true", "per_device_train_batch_size": 11}
    assert call(*argv(files, **changes)) == 2
    assert "dataloader_drop_last:" in (told := capsys.readouterr().err) and "fewer than one batch of 11" in told
    assert not launch.FinetuneFolder(files["output_dir"]).root.exists()


def test_what_was_saved_differently_is_not_handed_over(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    trained = launch._train

    def spoil(plan: Any, where: Any, folder: Any, **more: Any) -> None:
        trained(plan, where, folder, **more)
        file = folder.model_dir / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"] *= 1.01
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(launch, "_train", spoil)
    assert call(*argv(files, max_steps=1)) == EXIT_VERIFICATION
    assert "the logits differ from the training process's own" in capsys.readouterr().err
    assert not files["output_dir"].exists()


def test_a_full_disk_is_one_message(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = "import errno; raise OSError(errno.ENOSPC, 'No space left on device', 'model.safetensors')"
    monkeypatch.setattr(command, "build_command", failing_at(2, full))
    assert call(*argv(files)) == 2
    told = capsys.readouterr()
    assert "error: model.safetensors: no space left: free some" in told.err
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize("size_kib", [700, 1100])  # full while the first checkpoint is written, and the second
def test_a_disk_that_is_really_full_is_one_message(
    files: dict[str, Any], size_kib: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "small_disk"
    disk.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(disk))
    status, told = process.capture(Command(mount), timeout_s=30)
    if status:
        pytest.skip(f"a small disk cannot be mounted here: {told.strip()}")
    try:
        assert call(*argv(files, output_dir=disk / "out", max_steps=4, save_steps=2)) == 2
        err = capsys.readouterr().err
        assert f"{disk}/" in err and "no space left: free some" in err and "Traceback" not in err
        kept = launch.FinetuneFolder(disk / "out").checkpoint()
        assert (kept is not None) == (size_kib == 1100)  # to go on with, once there is room
    finally:
        process.capture(Command(("umount", str(disk))), timeout_s=30)


@pytest.mark.parametrize("changes", [{}, {"zero_stage": 3, "num_processes": 2}], ids=["alone", "ZeRO-3"])
def test_what_the_model_says_while_it_learns_is_kept(files: dict[str, Any], changes: dict[str, Any]) -> None:
    asked = ["What does zip do?", "犬 は"]
    assert call(*argv(files, max_steps=4, save_steps=2, **changes), "--sample_prompts", *asked) == 0
    lines = (files["output_dir"] / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    said = [json.loads(line) for line in lines]
    assert [(answer["step"], answer["prompt"]) for answer in said] == [(n, p) for n in (2, 4) for p in asked]


def test_packing_truncation_and_added_tokens(files: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = {"packing": True, "max_seq_length": 38, "additional_special_tokens": [f"<|{n}|>" for n in range(400)]}
    assert call(*argv(files, **changes, max_steps=2)) == 0
    out = files["output_dir"]
    account = json.loads((out / "manifest.json").read_text())["results"]["examples"]
    assert 0 < account["truncated"] < 12 and account["examples"] == 12
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) > 600
    compared_with = json.loads((out / "verification.json").read_text())["tokenizer"]["compared_with"]
    assert compared_with == "none: the base model's own files with 400 tokens added, and a chat template"


def test_zero_3_on_two_processes_trains_what_one_process_trains(
    files: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    from train.checkpoint import verification

    spread = {"per_device_train_batch_size": 3, "num_processes": 2, "zero_stage": 3, "gradient_checkpointing": True}
    one_by_one = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    assert call(*argv(files, **one_by_one, output_dir=tmp_path / "one")) == 0
    assert call(*argv(files, **spread)) == 0
    out = files["output_dir"]
    assert verification.require(out)["weights"]["max_abs_difference"] == 0
    one, two = _metrics(tmp_path / "one"), _metrics(out)
    assert two == pytest.approx(one, rel=1e-3)
    assert len(list(AutoModelForCausalLM.from_pretrained(out).parameters())) == 21
    single, gathered = _weights(tmp_path / "one"), _weights(out)
    assert all(gathered[name].allclose(single[name], atol=1e-3) for name in single)


def test_a_deepspeed_file_of_ones_own(files: dict[str, Any], tmp_path: Path) -> None:
    from train.finetune import deepspeed_config

    own = tmp_path / "ds.json"
    own.write_text(json.dumps(deepspeed_config.build(2, device="cpu")))
    assert call(*argv(files, deepspeed=own, max_steps=1)) == 0
    out = files["output_dir"]
    record = json.loads((out / "manifest.json").read_text())
    assert record["results"]["layout"]["zero_stage"] == 2
    assert str(own) in [item["path"] for item in record["inputs"]]
    assert (out / "deepspeed_config.json").read_text() == own.read_text()


def test_the_seeds_command_under_zero_3(base_model: Path, question_file: Path, tmp_path: Path) -> None:
    from train.checkpoint import verification

    out = tmp_path / "with space" / "gpt_openassistant"
    words = ["bash", SEEDS_LAUNCHER, "--input_model_name_or_path", base_model, "--input_max_seq_length", 128]
    words += ["--output_tokenizer_and_model_dir", f"{out}/", "--wandb_entity", "someone", "--wandb_project", "chat"]
    words += ["--wandb_tag", "other_gpu", "--data_files", question_file]
    environment = {"HOME": str(tmp_path), "WANDB_MODE": "offline"}
    status, told = process.capture(Command(tuple(map(str, words)), environment), timeout_s=600)
    assert status == 0, told
    assert verification.require(out)["weights"]["dtype"] == "bfloat16"
    assert "W&B: offline" in told and "W&B offline run: wandb sync" in told
    (recorded,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    assert b"other_gpu" in content and b"finetune_tiny-llama_" in content and b"someone" in content
