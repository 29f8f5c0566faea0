"""The recipes: the seeds' own sections are read as they are written, and each preset trains, small and for real."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_samples import SCRIPTS, argv, call  # type: ignore[import-not-found]

from train import settings as settings_module
from train.errors import UserError
from train.finetune import seed_recipes
from train.finetune.settings import FinetuneSettings

RECIPES = SCRIPTS / "recipes"
TEMPLATE = "### Instruction:\n{instruction}\n### Input:\n{input}\n### Response:\n{output}"
# As the seeds' files are written: https://github.com/ohtaman/abci-examples/tree/main/202310/config
FULL = """
model:
  device_map: auto
  trust_remote_code: true
  torch_dtype: torch.float16
training:
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  num_train_epochs: 1
  fp16: false
  optim: "adamw_torch"
  learning_rate: 1.0e-4
  logging_steps: 10
  evaluation_strategy: "steps"
  save_strategy: "steps"
  eval_steps: 100
  save_steps: 100
  save_total_limit: 3
  auto_find_batch_size: true
early_stopping_callback:
  early_stopping_patience: 5
dataset:
  path: kunishou/databricks-dolly-15k-ja
prompt_template: |-
  ### Instruction:
  {instruction}
  ### Input:
  {input}
  ### Response:
  {output}
outputs:
  dirname: /scratch/${USER}/models/${JOB_ID}
"""
FLAT: dict[str, Any] = {
    "device_map": "auto",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "fp16": False,
    "trainer_arguments": ["optim=adamw_torch"],
    "learning_rate": 1e-4,
    "logging_steps": 10,
    "eval_steps": 100,
    "eval_size": 1000,
    "save_steps": 100,
    "save_total_limit": 3,
    "early_stopping_patience": 5,
    "data_files": ["kunishou/databricks-dolly-15k-ja"],
    "prompt_template": TEMPLATE,
    "output_dir": "/scratch/me/models/7",
}
PARTIAL = "finetuning:\n  trainables: [ln_f, c_attn, c_proj, c_fc]\n"
LORA = """
lora:
  r: 4
  lora_alpha: 4
  target_modules: [ln_f, c_attn, c_proj, c_fc]
  lora_dropout: 0.01
  bias: none
  task_type: CAUSAL_LM
  fan_in_fan_out: true
"""
FLAT_LORA = {
    "use_peft": True,
    "peft_lora_r": 4,
    "peft_lora_alpha": 4,
    "peft_lora_dropout": 0.01,
    "peft_target_modules": ["c_attn", "c_proj", "c_fc"],
}


def _translated(text: str, **environment: str) -> tuple[dict[str, Any], list[str]]:
    names = [*FinetuneSettings.__dataclass_fields__]
    return seed_recipes.translate(yaml.safe_load(text), fields=names, where="r.yaml", environment=environment)


def test_the_seeds_full_finetuning() -> None:
    flat, notes = _translated(FULL, USER="me", JOB_ID="7")
    assert flat == FLAT
    assert [note.removeprefix("r.yaml: ").partition(" has no effect")[0] for note in notes] == [
        "model.trust_remote_code",
        "model.torch_dtype",
        "training.auto_find_batch_size",
    ]


def test_the_seeds_chosen_layers_and_lora() -> None:
    flat, _ = _translated(FULL + PARTIAL, USER="me", JOB_ID="7")
    assert flat == FLAT | {"trainables": ["ln_f", "c_attn", "c_proj", "c_fc"]}
    merged = FULL + LORA + "  \n"
    flat, notes = _translated(
        merged.replace("outputs:\n", "outputs:\n  save_merged_model: true\n"), USER="me", JOB_ID="7"
    )
    assert flat == FLAT | FLAT_LORA | {"merge": True}
    assert "r.yaml: lora.target_modules ln_f has no effect: a normalisation can have no adapter" in notes


def test_the_seeds_lora_under_deepspeed() -> None:
    text = (FULL + LORA).replace("  device_map: auto\n", "")
    flat, _ = _translated(text.replace("training:\n", "training:\n  deepspeed: ds_config/ds_config_zero3.json\n"))
    assert flat["deepspeed"] == "ds_config/ds_config_zero3.json" and "device_map" not in flat


def test_the_first_workshops_data_section() -> None:
    text = FULL.replace("dataset:\n  path: kunishou/databricks-dolly-15k-ja\nprompt_template: |-", "input_template: |-")
    flat, _ = _translated(text + "data:\n  train_file: data/jsquad-valid-v1.1.json\n  valid_size: 0.1\n")
    assert (flat["data_files"], flat["eval_size"]) == (["data/jsquad-valid-v1.1.json"], 0.1)
    assert flat["prompt_template"] == TEMPLATE


def test_a_folder_named_by_a_variable_that_is_not_set_is_left_to_the_flag() -> None:
    flat, notes = _translated(FULL, USER="me")
    assert "output_dir" not in flat
    assert any(
        "outputs.dirname has no effect: /scratch/${USER}/models/${JOB_ID} names JOB_ID" in note for note in notes
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: {path: a/b, split: test}", {"data_files": ["a/b:test"]}),
        ("dataset: {path: a/b, name: en}", {"data_files": ["a/b:en:train"]}),
        ("dataset: {path: json, data_files: x.json}", {"data_files": ["x.json"]}),
        ("dataset: {data_files: [x.json, y.json]}", {"data_files": ["x.json", "y.json"]}),
        ("data: {train_file: x.json, valid_file: y.json}", {"data_files": ["x.json"], "eval_data_files": ["y.json"]}),
        ("training: {save_strategy: no, evaluation_strategy: no, eval_steps: 5}", {"save_steps": 0}),
        ("training: {eval_strategy: epoch, eval_steps: 5}", {"eval_size": 1000}),
        ("training: {eval_strategy: steps, eval_steps: 5, eval_size: 9}", {"eval_steps": 5, "eval_size": 9}),
        ("training: {eval_steps: 5}", {}),
        ("training: {report_to: [wandb, tensorboard]}", {"use_wandb": True}),
        ("training: {report_to: [tensorboard]}", {}),
        (
            "training: {adam_epsilon: 1e-8, neftune_noise_alpha: null, tf32: true, lr_scheduler_kwargs: {a: 2}}",
            {
                "trainer_arguments": [
                    "adam_epsilon=1e-8",
                    "neftune_noise_alpha=null",
                    "tf32=true",
                    'lr_scheduler_kwargs={"a": 2}',
                ]
            },
        ),
        ("training: {report_to: wandb, load_best_model_at_end: true}", {"use_wandb": True, "keep_best": True}),
        (
            "training: {optim: adafactor}\ntrainer_arguments: [tf32=true]",
            {"trainer_arguments": ["optim=adafactor", "tf32=true"]},
        ),
        ("training: {max_length: 9}\nnum_processes: 2", {"max_seq_length": 9, "num_processes": 2}),
        (
            "model: {pretrained_model_name_or_path: m, load_in_4bit: true}",
            {"model_name_or_path": "m", "load_in_4bit": True},
        ),
        ("lora: {target_modules: q_proj}", {"use_peft": True, "peft_target_modules": ["q_proj"]}),
        (
            "model: {}\nprompt_template: {with_input: '{instruction}{input}', without_input: '{instruction}'}",
            {"prompt_template": "{instruction}{input}", "prompt_template_without_input": "{instruction}"},
        ),
    ],
)
def test_further_keys(text: str, expected: dict[str, Any]) -> None:
    assert _translated(text)[0] == expected


BAD_RECIPES = [
    ("model: {divice_map: auto}", "r.yaml: model.divice_map is not a setting; did you mean device_map?"),
    ("lora: {rank: 4, alpha: 4}", "lora.alpha is not a setting; did you mean lora_alpha?"),
    ("training: {lerning_rate: 1}", "training.lerning_rate is not a setting; did you mean learning_rate?"),
    ("dataset: {zzz: 1}", "dataset.zzz is not a setting; known are data_files, name, path, split."),
    ("outputs: {dir_name: x}", "outputs.dir_name is not a setting; did you mean dirname?"),
    ("model: {}\noutput: x", "r.yaml: output is not a setting; did you mean outputs?"),
    ("model: gpt2", "r.yaml: model is a section and holds settings, not 'gpt2'."),
    ("lora: {bias: all}", "lora.bias 'all': only none is to be had"),
    ("lora: {task_type: SEQ_CLS}", "lora.task_type 'SEQ_CLS': only CAUSAL_LM is to be had"),
    ("training: {save_strategy: epoch}", "training.save_strategy 'epoch': one of steps, no is to be had"),
    ("training: {metric_for_best_model: rouge}", "only eval_loss is compared"),
    ("dataset: {path: a/b, data_files: x.csv}", "path alone, or json or parquet as path with data_files"),
    (
        "dataset: {path: a/b, split: 'train[:100]'}",
        "dataset.split train[:100]: a part of a split is not to be had",
    ),
    ("outputs: {dirname: a$}", "outputs.dirname 'a$' has a $ that begins no variable's name"),
]


@pytest.mark.parametrize(("text", "message"), BAD_RECIPES)
def test_what_cannot_be_had(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        _translated(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("training: {report_to: [wandb, mlflow]}", "training.report_to mlflow has no effect: W&B and TensorBoard are"),
        (
            "training: {evaluation_strategy: no}\neval_data_files: [x]",
            "training.eval_strategy no has no effect: held",
        ),
        ("training: {eval_strategy: no}\neval_size: 9", "training.eval_strategy no has no effect"),
    ],
)
def test_what_has_no_effect_is_told(text: str, note: str) -> None:
    (told,) = _translated(text)[1]
    assert note in told


def test_all_problems_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        _translated("model: {a_b: 1}\nlora: {bias: all}\ntraining: x\n")
    assert len(caught.value.problems) == 3


def test_flags_win_over_the_seeds_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config_finetune_full.yaml"
    file.write_text(FULL)
    words = ["--model_name_or_path", "m", "--output_dir", tmp_path / "o", "--per_device_train_batch_size", "3"]
    assert call("--recipe", file, *words, "--device", "cpu", "--dry_run") == 0
    told = capsys.readouterr()
    assert "3 examples per step = 3 per process" in told.out and "train.finetune.worker" in told.out
    assert "note: " in told.err and "torch_dtype has no effect: --bf16 or --fp16 chooses the precision" in told.err


# What each preset must say of its run, and what makes it small enough for this machine.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dolly_ja_full": (
        {"prompt_template": "dolly_ja", "early_stopping_patience": 5, "eval_size": 1000},
        {"eval_size": 4},
    ),
    "dolly_ja_partial": (
        {"trainables": ("ln_f", "c_attn", "c_proj", "c_fc"), "eval_steps": 100},
        {"eval_size": 4, "trainables": ["norm", "q_proj"]},
    ),
    "dolly_ja_lora": ({"use_peft": True, "peft_lora_r": 4, "peft_lora_alpha": 4}, {"eval_size": 4}),
    "alpaca": ({"prompt_template": "alpaca", "data_files": ("tatsu-lab/alpaca",)}, {"per_device_train_batch_size": 1}),
    "alpaca_ja": ({"prompt_template": "alpaca_ja", "eval_size": 0.1}, {"per_device_train_batch_size": 1}),
    "squad_lora": (
        {"use_peft": True, "peft_lora_r": 32, "eval_data_files": ("rajpurkar/squad:validation",), "seed": 1234},
        {"eval_data_files": "squad.json"},
    ),
}


def test_every_preset_is_tested() -> None:
    others = {"demo", "openassistant_zero3"}  # test_finetune_training.py runs these
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {*PRESETS, *others}


@pytest.mark.parametrize("recipe", PRESETS)
def test_presets_say_what_the_seeds_say(recipe: str) -> None:
    words = ["--recipe", recipe, "--model_name_or_path", "m", "--output_dir", "o"]
    settings = settings_module.parse(FinetuneSettings, words, program="finetune.sh", description="", recipe_dir=RECIPES)
    expected, _ = PRESETS[recipe]
    assert {name: getattr(settings, name) for name in expected} == expected


def _longer(base_model: Path) -> Path:
    """The same model for texts as long as Alpaca's; rotary positions need no weights."""
    folder = Path.cwd() / "longer"
    shutil.copytree(base_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PRESETS)
def test_each_preset_trains_small_and_for_real(
    recipe: str,
    base_model: Path,
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if recipe == "squad_lora":
        questions = [{"question": f"{n}?", "answers": [{"text": f"{n}", "answer_start": 0}]} for n in range(8)]
        data = [{"title": "T", "paragraphs": [{"context": "0 1 2 3 4 5 6 7", "qas": questions}]}]
        file = tmp_path / "squad.json"
        file.write_text(json.dumps({"data": data}, indent=1))
    else:
        file = write_jsonl([{"instruction": "猫?", "input": "x" * (n % 2), "output": f"犬 {n}"} for n in range(12)])
    small = {"max_steps": 2, "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "gradient_accumulation_steps": 1}
    _, changes = PRESETS[recipe]
    if recipe == "alpaca":  # the one without held-out data
        small["eval_steps"] = 0
    words = argv(small | {"max_seq_length": 512, "model_name_or_path": _longer(base_model)} | changes, data_files=file)
    assert call("--recipe", recipe, *words, "--output_dir", "out", "--device", "cpu", "--bf16", "False") == 0
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]
    assert results["steps"] == 2 and results["method"] == {"full": "full", "partial": "partial", "lora": "lora"}.get(
        recipe.rpartition("_")[2], "full"
    )
    answer = r"\[\[ ?\d+</s>\]\]" if recipe == "squad_lora" else r"\[\[ ?犬 \d+</s>\]\]"
    assert re.search(answer, told), told
    assert (results["eval_examples"] is None) == (recipe == "alpaca")


@pytest.mark.slow
def test_the_seeds_lora_file_trains_and_merges(
    base_model: Path, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    text = FULL + LORA.replace("[ln_f, c_attn, c_proj, c_fc]", "[norm_f, q_proj, v_proj]").replace(
        "fan_in_fan_out: true", "fan_in_fan_out: false"
    )
    text = text.replace("  dirname: /scratch/${USER}/models/${JOB_ID}", "  dirname: ${OUT}\n  save_merged_model: true")
    Path("seeds.yaml").write_text(text)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    file = write_jsonl([{"instruction": "猫?", "input": "", "output": f"犬 {n}"} for n in range(12)])
    changes = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "eval_size": 4, "max_seq_length": 128}
    words = argv(changes, data_files=file, model_name_or_path=base_model)
    assert call("--recipe", "seeds.yaml", *words, "--device", "cpu") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"] and config["r"] == config["lora_alpha"] == 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").config.vocab_size == 600
