"""Which weights are trained: what flags imply, what contradicts itself, what a model has no module for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import argv, call  # type: ignore[import-not-found]

from train.finetune import deepspeed_config, lora, methods, modules, trainer_arguments
from train.finetune.folder import FinetuneFolder
from train.finetune.settings import FinetuneSettings


def settings(**changes: Any) -> FinetuneSettings:
    return dataclasses.replace(FinetuneSettings("owner/name", Path("out")), **changes)


IMPLIED: list[tuple[dict[str, Any], str]] = [
    ({}, "full"),
    ({"use_peft": False}, "full"),
    ({"use_peft": True}, "lora"),
    ({"peft_lora_r": 4}, "lora"),
    ({"peft_target_model": "llm-jp"}, "lora"),
    ({"load_in_4bit": True}, "lora"),
    ({"trainables": ("lm_head",)}, "partial"),
    ({"method": "full"}, "full"),
]


@pytest.mark.parametrize(("given", "method"), IMPLIED)
def test_the_method_is_what_the_flags_imply(given: dict[str, Any], method: str) -> None:
    assert methods.of(settings(**given)) == method
    assert not list(settings(**given).problems())


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "full", "use_peft": True}, "--method full and --use_peft True contradict each other"),
    ({"method": "lora", "use_peft": False}, "--method lora and --use_peft False contradict each other"),
    ({"use_peft": False, "peft_lora_r": 8}, "--peft_lora_r has no effect with --method full"),
    ({"method": "full", "peft_lora_dropout": 0}, "--peft_lora_dropout has no effect with --method full"),
    ({"merge": True}, "--merge has no effect with --method full"),
    ({"method": "full", "load_in_4bit": True}, "--load_in_4bit has no effect with --method full"),
    ({"method": "partial"}, "--method partial needs --trainables"),
    ({"use_peft": True, "trainables": "lm_head"}, "--trainables has no effect with --method lora"),
    ({"peft_target_model": "llama", "peft_target_modules": "q_proj"}, "exclude each other: name a model or modules"),
    ({"peft_target_model": "bert"}, "--peft_target_model 'bert' is not one of llm-jp, gpt2, llama, mistral"),
    ({"peft_lora_r": 0}, "--peft_lora_r 0: it must be at least 1"),
    ({"peft_lora_alpha": 0}, "--peft_lora_alpha 0: it must be at least 1"),
    ({"peft_lora_dropout": 1}, "--peft_lora_dropout 1.0: it must be at least 0 and below 1"),
    ({"load_in_8bit": True, "load_in_4bit": True}, "--load_in_8bit and --load_in_4bit exclude each other"),
    ({"load_in_4bit": True, "zero_stage": 3}, "--load_in_4bit and --zero_stage 3 exclude each other"),
    ({"device_map": "auto", "zero_stage": 2}, "--device_map and DeepSpeed exclude each other"),
    ({"device_map": "auto", "num_processes": 2}, "--device_map auto takes one process"),
    ({"offload": "optimizer"}, "--offload optimizer has no effect without --zero_stage"),
    ({"offload": "all", "zero_stage": 2}, "which only --zero_stage 3 can; use optimizer"),
    ({"keep_best": True}, "--keep_best compares held-out losses: add --eval_data_files"),
    ({"early_stopping_patience": -1}, "--early_stopping_patience -1: it must not be negative"),
    ({"early_stopping_patience": 2}, "--early_stopping_patience compares held-out losses"),
    ({"keep_best": True, "eval_data_files": "x", "save_steps": 0}, "--save_steps 0 saves none"),
    (
        {"keep_best": True, "eval_data_files": "x", "eval_steps": 4, "save_steps": 6},
        "--save_steps 6 is no multiple of --eval_steps 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_what_contradicts_itself(
    files: dict[str, Any], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*argv(files, **changes), "--dry_run") == 2
    assert message in capsys.readouterr().err


def test_an_empty_module_name_is_refused() -> None:
    assert any("a name is empty" in problem for problem in settings(trainables=("lm_head", "")).problems())


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"trainables": ["layers.1", "attn", "layers.[2-9]"]},
        "--trainables 'attn' is the name of no module of this model; there are model.embed_tokens, "
        "model.layers.*.self_attn.q_proj",
    ),
    ({"trainables": "layers.2"}, "--trainables 'layers.2' is the name of no module"),
    ({"peft_target_modules": ["q_proj", "c_attn"]}, "'c_attn' is the name of no module of this model; there are"),
    ({"peft_target_model": "llm-jp"}, "--peft_target_model: 'c_attn' is the name of no module"),
    (
        {"peft_target_modules": "lm_head"},
        "'lm_head' can have no adapter in this model; these can: model.layers.*",
    ),
    ({"peft_target_modules": ["q_proj", "embed_tokens"]}, "'embed_tokens' can have no adapter in this model"),
    ({"peft_target_modules": "mlp"}, "'mlp' can have no adapter in this model"),
    ({"use_peft": True, "additional_special_tokens": "<new>"}, "adds 1 rows to the embeddings, which --method lora"),
    ({"trainables": "layers.1", "additional_special_tokens": "<new>"}, "or partial with the embeddings among"),
    ({"trainer_arguments": "neftune"}, "--trainer_arguments 'neftune': NAME=VALUE was expected"),
    ({"trainer_arguments": "neftune_noise_alfa=5"}, "did you mean neftune_noise_alpha?"),
    ({"trainer_arguments": "neftune_noise_alpha=much"}, "--trainer_arguments neftune_noise_alpha=much: input should"),
    ({"trainer_arguments": "optim=[a"}, "the value is not YAML"),
    (
        {"trainer_arguments": "adam_epsilon=null"},
        "adam_epsilon=null: input should be a valid number",
    ),
    ({"trainer_arguments": "optim=nonsense"}, "optim=nonsense: there is no such optimizer; known are adamw_torch, "),
    ({"trainer_arguments": "optim=adafactr"}, "there is no such optimizer; did you mean adafactor?"),
    (
        {"trainer_arguments": "dataloader_prefetch_factor=2"},
        "can only be set when data is loaded in",
    ),
    ({"trainer_arguments": "learning_rate=1"}, "the launcher decides it; pass --learning_rate instead"),
    ({"trainer_arguments": "max_length=1"}, "the launcher decides it; pass --max_seq_length instead"),
    ({"trainer_arguments": "hub_token=secret"}, "hub_token: the launcher decides it; leave it out"),
    ({"trainer_arguments": "output_dir=x"}, "the launcher decides it; pass --output_dir instead"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_the_model_or_trl_does_not_have_ends_before_anything_is_written(
    files: dict[str, Any], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert call(*argv(files, **changes)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert sorted(tmp_path.rglob("*")) == before


def test_all_of_it_is_told_at_once(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"trainables": ["no", "such"], "trainer_arguments": "optim", "data_files": "none.jsonl"}
    assert call(*argv(files, **changes)) == 2
    assert "4 problems" in capsys.readouterr().err


def test_bitsandbytes_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    without = list(lora.machine_problems(settings(load_in_4bit=True)))
    assert len(without) == 1 and "pip install bitsandbytes" in without[0]
    assert not list(lora.machine_problems(settings(use_peft=True)))


@pytest.mark.parametrize(
    ("pattern", "name", "is_meant"),
    [
        ("lm_head", "lm_head.weight", True),
        ("layers.1", "model.layers.1.mlp.up_proj.weight", True),
        ("layers.1", "model.layers.11.mlp.up_proj.weight", False),
        ("layers.*.mlp", "model.layers.11.mlp.up_proj.weight", True),
        ("layers.*.mlp", "model.layers.11.self_attn.mlp_gate.weight", False),
        ("q_*", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers.[01]", "model.layers.2.mlp.up_proj.weight", False),
        ("up_proj.bias", "model.layers.2.mlp.up_proj.weight", False),
        ("*", "lm_head.weight", True),
    ],
)
def test_a_pattern_means_whole_parts_of_a_name(pattern: str, name: str, is_meant: bool) -> None:
    assert modules.matches(pattern, name) is is_meant


def _empty(kind: str, tmp_path: Path) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 8, "n_head": 2, "n_layer": 2}
    AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    return modules.empty_model(tmp_path)


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("llama", LLAMA),
        ("mistral", LLAMA),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_targets_by_architecture(kind: str, expected: set[str], tmp_path: Path) -> None:
    model = _empty(kind, tmp_path)
    assert set(lora.targets(settings(use_peft=True), model)) == expected
    assert not list(lora.target_problems(settings(use_peft=True), model))
    if kind in lora.TARGET_MODELS:
        assert set(lora.targets(settings(peft_target_model=kind), model)) == expected


def test_a_tied_weight_is_meant_by_both_of_its_names(tmp_path: Path) -> None:
    model = _empty("gpt2", tmp_path)
    (weight,) = modules.trained(["lm_head"], model)
    assert weight is model.transformer.wte.weight
    modules.train_only(["lm_head", "h.1.mlp"], model)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        "transformer.wte.weight",
        *(f"transformer.h.1.mlp.{layer}.{part}" for layer in ("c_fc", "c_proj") for part in ("weight", "bias")),
    }


def test_what_the_launcher_decides_is_known_to_trl(tmp_path: Path) -> None:
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)}
    folder = FinetuneFolder(tmp_path / "out")
    decided = trainer_arguments.own(settings(), folder, device="cpu", deepspeed_config=None, is_resumed=False)
    assert decided.keys() <= known
    assert all(any(name.startswith(prefix) for name in known) for prefix in trainer_arguments._NOT_TO_SET)


def test_trainer_arguments_are_yaml_values() -> None:
    words = ("neftune_noise_alpha=5", "optim=adafactor", "dataloader_drop_last=true", "optim_args=a=1,b=2")
    words += ("adam_epsilon=1e-8", "lr_scheduler_kwargs={num_cycles: 2}")  # without a point, 1e-8 is a word to YAML
    given = settings(trainer_arguments=words)
    assert not list(trainer_arguments.problems(given, FinetuneFolder(Path("out"))))
    assert trainer_arguments.given(given) == {
        "neftune_noise_alpha": 5,
        "optim": "adafactor",
        "dataloader_drop_last": True,
        "optim_args": "a=1,b=2",
        "adam_epsilon": 1e-8,
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }


@pytest.mark.parametrize(
    ("word", "package"),
    [
        ("optim=adamw_bnb_8bit", "bitsandbytes"),
        ("optim=paged_adamw_32bit", "bitsandbytes"),
        ("use_liger_kernel=true", "liger-kernel"),
        ("optim=adamw_torch_fused", None),
    ],
)
def test_packages_for_trainer_arguments_are_asked_for(
    word: str, package: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_arguments, "find_spec", lambda name: None)
    found = list(trainer_arguments.problems(settings(trainer_arguments=(word,)), FinetuneFolder(Path("out"))))
    assert [f"pip install {package}" in problem for problem in found] == ([True] if package else [])


def test_a_launcher_that_checks_trainer_arguments_becomes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job of several tasks the environment names ranks, whom the launcher must not wait for."""
    import torch.distributed
    from accelerate.state import PartialState

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    before = dict(PartialState._shared_state)
    given = settings(trainer_arguments=("tf32=true", "optim=adafactor"), bf16=True)  # TF32 is the ranks' GPUs' affair
    assert not list(trainer_arguments.problems(given, FinetuneFolder(Path("out"))))
    assert not torch.distributed.is_initialized() and PartialState._shared_state == before


def test_offload_is_stated_in_deepspeeds_json(capsys: pytest.CaptureFixture[str]) -> None:
    plain = deepspeed_config.build(3, device="cuda")
    assert not {"offload_optimizer", "offload_param"} & plain["zero_optimization"].keys()
    optimizer = deepspeed_config.build(2, device="cuda", offload="optimizer")
    assert optimizer["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in optimizer["zero_optimization"]
    assert optimizer["zero_force_ds_cpu_optimizer"] is False
    both = deepspeed_config.build(3, device="cpu", offload="all")["zero_optimization"]
    assert both["offload_param"] == both["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--device", "cpu", "--dry_run"]
    assert call(*words, "--zero_stage", "3", "--offload", "all") == 0
    told = capsys.readouterr().out
    config = json.loads(told[told.index("{") : told.index("\n}") + 2])
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_a_spread_model_has_one_process_and_sees_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.cluster.allocation import Allocation
    from train.finetune import command

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command.processes(settings(device_map="auto")) == 1 and command.processes(settings()) == 0
    where = dataclasses.replace(_this_machine(), device="cuda")
    assert isinstance(where, Allocation) and where.world_size == 1
    folder = FinetuneFolder(Path("out"))
    alone = command.build_command(settings(), where, folder).environment
    spread = command.build_command(settings(device_map="auto"), where, folder).environment
    assert alone["CUDA_VISIBLE_DEVICES"] == "0" and "CUDA_VISIBLE_DEVICES" not in spread


def _this_machine() -> Any:
    from train.cluster import allocation
    from train.cluster.settings import ClusterSettings

    return allocation.find(ClusterSettings(), num_processes=1, device="cpu")
