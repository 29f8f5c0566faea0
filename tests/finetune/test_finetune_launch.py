"""Step 4 as its users call it: what is refused, before anything is written, and what a call prints."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import SCRIPTS, SEEDS_LAUNCHER, argv, call, converted_sentencepiece  # type: ignore[import-not-found]

from train import settings as settings_module
from train.cluster.launch import End
from train.errors import UserError
from train.finetune import launch, proof, results, tokenizer_files, unfinished
from train.finetune.folder import FinetuneFolder, Plan
from train.finetune.settings import FinetuneSettings

BAD_SETTINGS = [
    ({"eval_steps": 5}, "--eval_steps 5 has no effect without --eval_data_files"),
    ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: it must be at least 1"),
    ({"save_steps": -1}, "--save_steps -1: it must not be negative"),
    ({"max_seq_length": 1}, "--max_seq_length 1: it must be at least 2"),
    ({"learning_rate": 0}, "--learning_rate 0.0: it must be above 0"),
    ({"warmup_ratio": 1}, "--warmup_ratio 1.0: it must be at least 0 and below 1"),
    ({"max_steps": 0}, "--max_steps 0: it must be at least 1"),
    ({"num_train_epochs": 0}, "--num_train_epochs 0.0: it must be above 0"),
    ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
    ({"fp16": True}, "--fp16 needs a GPU"),
    ({"zero_stage": 1}, "--zero_stage 1 is not one of 0, 2, 3"),
    ({"zero_stage": 2, "deepspeed": "x.json"}, "--deepspeed and --zero_stage exclude each other"),
    ({"instruction_template": " "}, "--instruction_template is blank"),
    ({"response_template": "### Human:"}, "are the same"),
    ({"wandb_project": "p"}, "--wandb_project has no effect without --use_wandb"),
    ({"too_long": "cut"}, "--too_long 'cut' is not one of truncate, drop"),
    ({"seed": 2**32}, "--seed 4294967296: it must be at most 4294967295"),
    ({"seed": -1}, "--seed -1: it must not be negative"),
    ({"weight_decay": -0.1}, "--weight_decay -0.1: it must not be negative"),
    ({"max_grad_norm": -1}, "--max_grad_norm -1.0: it must not be negative"),
    ({"output_dir": "/"}, "--output_dir / is no folder that can be made"),
    ({"lerning_rate": 1}, "did you mean --learning_rate?"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_bad_settings(
    files: dict[str, Any], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*argv(files, **changes), "--dry_run") == 2
    assert message in capsys.readouterr().err


def test_an_empty_special_token_is_refused() -> None:
    settings = FinetuneSettings("owner/name", Path("out"), additional_special_tokens=("<a>", ""))
    assert [*settings.problems()] == [
        "--additional_special_tokens: a token is empty; name the tokens, or leave the flag out."
    ]


def _write(file: Path, content: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    return file


def _copy(base: Path, to: Path, *without: str) -> Path:
    shutil.copytree(base, to)
    for name in without:
        (to / name).unlink()
    return to


BAD_INPUTS: list[tuple[Callable[[Path, Path], dict[str, Any]], str]] = [
    (
        lambda tmp, base: {"model_name_or_path": "./none"},
        "./none: there is no such folder, and it is no name on the Hub",
    ),
    (lambda tmp, base: {"model_name_or_path": _write(tmp / "f", "x")}, "is a file, a model folder is expected"),
    (lambda tmp, base: {"model_name_or_path": _copy(base, tmp / "m", "config.json")}, "has no config.json"),
    (lambda tmp, base: {"model_name_or_path": _copy(base, tmp / "m", "model.safetensors")}, "has no model.safetensors"),
    (lambda tmp, base: {"model_name_or_path": _copy(base, tmp / "m", "tokenizer.json")}, "has no tokenizer.json"),
    (lambda tmp, base: {"model_name_or_path": _copy(base, tmp / ".m.unfinished-h-1")}, "is the unfinished output"),
    (lambda tmp, base: {"data_files": tmp / "none.jsonl"}, "there is no file"),
    (lambda tmp, base: {"data_files": tmp}, "is a folder, a file is expected"),
    (lambda tmp, base: {"data_files": _write(tmp / "e.jsonl", "")}, "is empty"),
    (lambda tmp, base: {"data_files": _write(tmp / "b.jsonl", "\n\n")}, "no token would be trained (the files hold no"),
    (
        lambda tmp, base: {"data_files": _write(tmp / "b.jsonl", '{"text": 1}\n')},
        "b.jsonl, line 1: key 'text' holds a num",
    ),
    (lambda tmp, base: {"eval_data_files": tmp / "none.jsonl"}, "there is no file"),
    (lambda tmp, base: {"deepspeed": tmp / "none.json"}, "cannot be read"),
    (lambda tmp, base: {"deepspeed": _write(tmp / "d.json", "{")}, "is not JSON"),
    (lambda tmp, base: {"deepspeed": _write(tmp / "d.json", "[]")}, "holds no JSON object"),
    (
        lambda tmp, base: {"deepspeed": _write(tmp / "d.json", '{"zero_optimization": true}')},
        "zero_optimization is no JSON object",
    ),
    (lambda tmp, base: {"output_dir": _write(tmp / "o", "x")}, "is a file, a folder name was expected"),
    (lambda tmp, base: {"output_dir": _write(tmp / "o" / "x", "x").parent}, "exists already: pass --overwrite"),
    (
        lambda tmp, base: {"output_dir": _write(tmp / "o" / "tokenizer_config.json", "{}").parent, "overwrite": True},
        "holds no manifest.json, so no step made it",
    ),
    (
        lambda tmp, base: {"output_dir": "/proc/x/y"},
        "--output_dir /proc/x/y cannot be made (No such file or dir",
    ),
    (lambda tmp, base: {"output_dir": base, "overwrite": True}, "are one folder, or one lies inside the other"),
    (lambda tmp, base: {"output_dir": base.parent, "overwrite": True}, "are one folder, or one lies inside the other"),
    (lambda tmp, base: {"output_dir": base / "finetuned"}, "are one folder, or one lies inside the other"),
    (
        lambda tmp, base: {"tokenizer_name_or_path": _copy(base, tmp / "t"), "output_dir": tmp / "t" / "o"},
        "and --tokenizer_name_or_path",
    ),
    (lambda tmp, base: {"max_seq_length": 129}, "--max_seq_length 129: the model has 128 positions"),
    (lambda tmp, base: {"max_seq_length": 8}, "have no answer within --max_seq_length 8"),
    (lambda tmp, base: {"max_seq_length": 8, "too_long": "drop"}, "12 were longer than --max_seq_length 8"),
    (
        lambda tmp, base: {"trainer_arguments": "dataloader_drop_last=true", "per_device_train_batch_size": 13},
        "dataloader_drop_last: 12 examples are fewer than one batch of 13",
    ),
    (
        lambda tmp, base: {
            "trainer_arguments": "dataloader_drop_last=true",
            "per_device_train_batch_size": 7,
            "num_processes": 2,
        },
        "12 examples are fewer than one batch of 14",
    ),
    (lambda tmp, base: {"use_flash_attention_2": True}, "--use_flash_attention_2 needs a GPU"),
    (lambda tmp, base: {"instruction_template": "Q:"}, "no 'Q:'; name the right --instruction_template"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_inputs_end_before_anything_is_written(
    files: dict[str, Any],
    change: Callable[[Path, Path], dict[str, Any]],
    message: str,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = change(tmp_path, base_model)
    before = sorted(tmp_path.rglob("*"))
    assert call(*argv(files, **changed)) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"per_device_train_batch_size": 12}, None),
        (
            {"per_device_train_batch_size": 13},
            "note: there are 12 examples and 13 places in a step: each step",
        ),
        ({"per_device_train_batch_size": 13, "packing": True}, None),
        (
            {"per_device_train_batch_size": 4, "num_processes": 2, "gradient_accumulation_steps": 2},
            "note: there are 12 examples and 16 places in a step: each step takes them all, some of them more than",
        ),
    ],
)
def test_a_step_with_more_places_than_there_are_examples_is_told(
    files: dict[str, Any],
    changes: dict[str, Any],
    note: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    assert call(*argv(files, **changes)) == 1
    told = capsys.readouterr().out
    assert note in told if note else "places in a step" not in told


def test_a_tokenizer_that_means_other_pieces_is_told(
    files: dict[str, Any],
    tokenizer_dirs: dict[str, Path],
    base_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    grown = _copy(base_model, tmp_path / "grown")
    tokenizer_files.add_tokens(grown, ["<|new|>"])  # more than the base's own, which mean what they meant
    config = json.loads((base_model / "config.json").read_text()) | {"vocab_size": 700}
    base = _copy(base_model, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    told = {}
    for name in (grown, _copy(base_model, tmp_path / "same"), tokenizer_dirs["byte_level"]):
        assert call(*argv(files, model_name_or_path=base, tokenizer_name_or_path=name, resume="never")) == 1
        told[name.name] = "ids mean other pieces in the base model's own tokenizer" in capsys.readouterr().out
    assert told == {"grown": False, "same": False, tokenizer_dirs["byte_level"].name: True}


@pytest.mark.parametrize(
    ("changes", "added", "expected"),
    [
        ({}, 0, "the base model's own files, byte for byte"),
        ({}, 3, "the base model's own files with 3 tokens added"),
        ({"tokenizer_name_or_path": "other"}, 0, "the files of other, byte for byte"),
    ],
)
def test_whose_tokenizer_was_copied_is_told(changes: dict[str, Any], added: int, expected: str) -> None:
    settings = FinetuneSettings("owner/name", Path("out"), **changes)
    plan = Plan(settings, Path("m"), "cpu", "owner/name", None, 0, None, added_tokens=added)
    assert proof._tokenizer_files(plan) == expected


def test_a_finetuning_that_is_worse_than_its_base_is_told() -> None:
    run = {"first_loss": 3.0, "last_loss": 1.0, "steps": 8, "first_eval_loss": 2.0, "eval_loss": 2.5, "best": None}
    assert "note: held-out loss 2.0000 -> 2.5000: the finetuned model is no better" in results.summary(run)
    assert "the best checkpoint, of step 4, is no better" in results.summary(run | {"best": {"step": 4}})
    for better in ({"eval_loss": 1.9}, {"eval_loss": None, "first_eval_loss": None}):
        assert results.summary(run | better) == "loss 3.0000 -> 1.0000 in 8 steps"


def test_an_error_without_a_file_names_the_output(tmp_path: Path) -> None:
    folder = FinetuneFolder(tmp_path / "out")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=rf"^{tmp_path}/out: no space left: free some"), folder.named_in_errors():
        raise RuntimeError("a library's own") from full
    for error in (OSError(errno.ENOSPC, "-", "named.bin"), RuntimeError("ours"), UserError("told")):
        with pytest.raises(type(error)) as caught, folder.named_in_errors():
            raise error
        assert caught.value is error


def test_problems_are_told_together(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv(files, model_name_or_path="./none", data_files="./none.jsonl", deepspeed="./none.json")) == 2
    assert "3 problems" in capsys.readouterr().err


def test_a_vocabulary_too_small(
    files: dict[str, Any], base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(base_model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert call(*argv(files, model_name_or_path=folder)) == 2
    assert "has a vocabulary of 300: they do not belong together" in capsys.readouterr().err


def test_a_tokenizer_without_end_token(
    files: dict[str, Any], base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(base_model, tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert call(*argv(files, tokenizer_name_or_path=folder)) == 2
    assert "has no eos_token" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_find_its_end_token_in_a_text(
    files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").mkdir()
    control = {"user_defined_symbols": ["\n"], "bos_id": 1, "eos_id": 2}  # SentencePiece's own way
    converted_sentencepiece(tmp_path / "t", "unigram", **control)
    assert call(*argv(files, tokenizer_name_or_path=tmp_path / "t")) == 2
    assert "reads its end token '</s>' in a text as plain letters" in capsys.readouterr().err


def test_a_base_model_that_changed_since_its_verification(
    files: dict[str, Any], base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.checkpoint import verification

    folder = _copy(base_model, tmp_path / "m")
    verification.write(folder, {})
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert call(*argv(files, model_name_or_path=folder)) == 2
    assert "changed after the verification" in capsys.readouterr().err


def test_without_a_network_the_flags_to_pass_are_named(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert call(*argv(files, data_files=None, model_name_or_path="nobody/no-such-model")) == 2
    told = capsys.readouterr().err
    assert "no --data_files is given, and openassistant_best_replies_train.jsonl" in told
    assert "pass --data_files FILE" in told
    assert "--model_name_or_path nobody/no-such-model is no folder here" in told


def test_a_job_without_its_nodes_names_is_refused(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert call(*argv(files)) == 2
    assert "SLURM_JOB_NODELIST" in capsys.readouterr().err


def test_two_launches_with_one_output(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = launch.FinetuneFolder(files["output_dir"])
    with unfinished.claimed(folder):
        assert call(*argv(files)) == 2
    assert "is being made by another process" in capsys.readouterr().err


def test_an_unfinished_run_with_other_settings_is_not_continued(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    assert call(*argv(files)) == 1
    assert "broke off with status 1" in capsys.readouterr().err
    _add_checkpoint(files)
    assert call(*argv(files, learning_rate=1e-3, num_processes=2)) == 2
    told = capsys.readouterr().err
    assert "learning_rate (5e-05, now 0.001)" in told and "processes (1, now 2)" in told and "--resume never" in told
    assert call(*argv(files, learning_rate=1e-3, resume="never")) == 1
    assert not files["output_dir"].exists()


def _add_checkpoint(files: dict[str, Any]) -> Path:
    folder = launch.FinetuneFolder(files["output_dir"])
    checkpoint = folder.checkpoint_dir / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "whole").touch()
    return checkpoint


def test_without_a_checkpoint_a_corrected_setting_starts_anew(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    assert call(*argv(files, learning_rate=9)) == 1
    assert call(*argv(files, learning_rate=1e-3)) == 1
    folder = launch.FinetuneFolder(files["output_dir"])
    assert json.loads(folder.identity.read_text())["settings"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_identity_is_no_run_to_go_on_with(
    files: dict[str, Any], content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    assert call(*argv(files)) == 1
    checkpoint = _add_checkpoint(files)
    launch.FinetuneFolder(files["output_dir"]).identity.write_bytes(content.encode(errors="surrogateescape"))
    assert call(*argv(files)) == 1
    assert not checkpoint.exists()


def test_an_edited_deepspeed_file_is_another_input(
    files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    own = _write(tmp_path / "ds.json", '{"zero_optimization": {"stage": 2}}')
    assert call(*argv(files, deepspeed=own)) == 1
    folder = launch.FinetuneFolder(files["output_dir"])
    assert folder.deepspeed_config.read_text() == own.read_text()  # what the ranks read, and what is handed over
    assert f"deepspeed_config: {folder.deepspeed_config}" in folder.plan.read_text()
    capsys.readouterr()
    _add_checkpoint(files)
    own.write_text('{"zero_optimization": {"stage": 3}}')
    assert call(*argv(files, deepspeed=own)) == 2
    assert "unfinished run that differs in inputs" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (SCRIPTS / "recipes").glob("*.yaml")))
def test_every_recipe_is_valid_and_runs_dry(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--recipe", recipe, "--model_name_or_path", "m", "--output_dir", "o", "--dry_run") == 0
    assert "train.finetune.worker" in capsys.readouterr().out


def test_deepspeed_configuration_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--device", "cpu", "--dry_run"]
    assert call(*words, "--zero_stage", "3", "--num_processes", "2") == 0
    told = capsys.readouterr().out
    start = told.index("{")
    config = json.loads(told[start : told.index("\n}") + 2])
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["zero_optimization"]["overlap_comm"] is False
    assert "optimizer" not in config
    assert "# in the end, 2 x here:" in told
    assert call(*words) == 0
    assert "# in the end, once, here:" in capsys.readouterr().out


def test_llm_jp_sft_flags_are_accepted_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    written = """--num_train_epochs 2 --per_device_train_batch_size 1 --gradient_accumulation_steps 32 --bf16
        --learning_rate 1e-5 --warmup_ratio 0.1 --lr_scheduler_type cosine --max_seq_length 2048 --logging_steps 1
        --gradient_checkpointing --data_files a.jsonl b.jsonl --eval_data_files c.jsonl --model_name_or_path me/gpt
        --tokenizer_name_or_path me/tokenizer --output_dir out --use_fast False --additional_special_tokens <a> <b>
        --deepspeed ds.json --use_wandb --wandb_entity e --wandb_project p --wandb_group g --wandb_tag t
        --save_steps 10 --save_total_limit 1 --seed 1 --weight_decay 0.1 --max_grad_norm 0.5 --max_steps 3 --packing
        --use_peft False --load_in_4bit False --use_flash_attention_2 False --dry_run"""
    words = written.split()
    words += ["--instruction_template", "### Human:", "--response_template", "### Assistant:"]
    assert call(*words) == 0
    assert "32 accumulation steps" in capsys.readouterr().out


def test_line_ends_in_templates_as_shells_pass_them() -> None:
    given = settings_module.build(
        FinetuneSettings,
        {
            "model_name_or_path": "m",
            "output_dir": "o",
            "instruction_template": "\\n### Q:\\n",
            "response_template": "A",
        },
    )
    assert given.with_line_ends().instruction_template == "\n### Q:\n"


@pytest.mark.parametrize("script", [SCRIPTS / "finetune.sh", SEEDS_LAUNCHER])
def test_help_and_dry_run_need_no_torch(script: Path, tmp_path: Path) -> None:
    """Answers at once: the environment has a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    model = ["--model_name_or_path", "m", "--output_dir", "o"]
    for words in (["--help"], [*model, "--zero_stage", "3", "--dry_run"]):
        done = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_seeds_command_as_written(tmp_path: Path) -> None:
    words = ["--input_model_name_or_path", "me/gpt_0.125B_global_step1000", "--input_max_seq_length", "2048"]
    words += ["--output_tokenizer_and_model_dir", f"{tmp_path}/with space/out/", "--wandb_entity", "e"]
    words += ["--wandb_project", "p", "--wandb_tag", "other_gpu"]
    for form in (words, [f"{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]):
        done = subprocess.run(["bash", SEEDS_LAUNCHER, *form, "--dry_run"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"output: {tmp_path}/with space/out\n" in done.stdout
        assert '"stage": 3' in done.stdout
    environment = {**os.environ, "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", SEEDS_LAUNCHER, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "SLURM_JOB_NODELIST" in done.stderr


def test_tokens_are_added_to_a_copy(base_model: Path, tmp_path: Path) -> None:
    before = (base_model / "tokenizer.json").read_bytes()
    tokenizer_files.copy(base_model, tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before
    assert tokenizer_files.add_tokens(tmp_path / "tokenizer", ["<|new|>", "</s>", "<|new|>"]) == 1
    known = len(tokenizer_files.load(base_model))
    tokenizer = tokenizer_files.load(tmp_path / "tokenizer")
    assert tokenizer("x<|new|>", add_special_tokens=False)["input_ids"][-1] == known
    assert (base_model / "tokenizer.json").read_bytes() == before
