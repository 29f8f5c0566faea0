"""What a plan reads, and what it answers when there is nothing to plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "scripts" / "step2_pretrain_model" / "recipes"
PLAN = "step2_pretrain_model/plan.sh"
GPT = ("--model_size", "gpt_1.3B", "--num_gpus", "8")


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_is_read(recipe: str) -> None:
    from train import settings
    from train.planner.settings import PlanSettings

    argv = ["--recipe", recipe, "--num_gpus", "64"]
    wanted = settings.parse(PlanSettings, argv, program="plan.sh", description="", recipe_dir=RECIPES)
    assert wanted.recipe().training.global_batch_size
    assert wanted.train_tokens


def test_a_recipes_own_values_and_flags_over_them(launch, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: {model_size: gpt_0.35B, sequence_length: 1024}\ntraining: {train_tokens: 7B, precision: fp16}\n"
        "parallel: {tensor_parallel_size: 2}\ndata: {input_tokenizer_file: /not/here.model}\n"
    )
    done = launch(PLAN, "--recipe", file, "--num_gpus", 4, "--sequence_length", 512, "--global_batch_size", 64)
    assert done.returncode == 0, done.stderr
    assert "gpt_0.35B, 24 layers" in done.stdout
    assert "64 sequences of 512 tokens, fp16" in done.stdout
    assert "vocabulary 32,000 (assumed" in done.stdout
    assert " 1   1   4     0" in done.stdout, "the recipe's own layout binds nothing"


def test_the_tokenizer_tells_the_vocabulary(launch, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    lines = [f"{a} plus {b} is {a + b}" for a in range(20) for b in range(20)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "t"), vocab_size=30, minloglevel=2
    )
    done = launch(PLAN, *GPT, "--input_tokenizer_file", tmp_path / "t.model")
    assert done.returncode == 0, done.stderr
    assert "vocabulary 35\n" in done.stdout, "30 pieces and the five that upstream adds"


def test_dropout_is_told(launch) -> None:
    assert "figures are for --dropout 0" in launch(PLAN, *GPT, "--dropout", 0.1).stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_gpus 0", "--num_gpus 0: it must be at least 1."),
        ("--gpu h20", "--gpu 'h20' is not one of h200, h100, a100_80, a100_40. did you mean h200?"),
        ("--gpu_memory_gib -3", "--gpu_memory_gib -3: it must be above 0."),
        ("--network_gb_s 0", "--network_gb_s 0: it must be above 0."),
        ("--memory_headroom 1", "--memory_headroom 1: a part of the memory was expected"),
        ("--gpus_per_node 3", "--num_gpus 8 / --gpus_per_node 3 = 2.66667: whole nodes were expected"),
        ("--sequence_length 0", "--sequence_length 0: it must be at least 2."),
        ("--vocab_size 1", "--vocab_size 1: it must be at least 2."),
        ("--num_attention_heads 7", "--hidden_size 2048 / --num_attention_heads 7"),
        ("--num_attention_heads 0", "--num_attention_heads 0: it must be at least 1."),
        ("--micro_batch_size 1024", "--micro_batch_size 1024 is larger than --global_batch_size 512"),
        ("--zero_stage 3", "--zero_stage 3: plans are for Megatron-DeepSpeed's pipeline module"),
        ("--zero_stage 0", "--zero_stage 0 --precision bf16: Megatron-DeepSpeed trains bf16 with ZeRO-1"),
        ("--tensor_parallel_size 16", "--tensor_parallel_size 16: tensor ranks stay in a node, which has 8 GPUs."),
        ("--pipeline_parallel_size 3", "--num_gpus 8 = 1 tensor x 3 pipeline x 2.66667 data parallel"),
        ("--input_tokenizer_file no.model", "--input_tokenizer_file no.model is missing"),
        ("--recipe nope", "no recipe 'nope'"),
        ("--num_gpus four", "--num_gpus 'four': input should be a valid integer"),
        ("--show 0", "--show 0: it must be at least 1."),
    ],
)
def test_a_wrong_input_is_one_message(launch, flags: str, message: str) -> None:
    done = launch(PLAN, *GPT, *flags.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_all_problems_at_once(launch) -> None:
    wrong = "--num_gpus 0 --gpu_memory_gib 0 --gpus_per_node 0 --vocab_size 1 --zero_stage 0 --num_attention_heads 7"
    done = launch(PLAN, *GPT[:2], *wrong.split())
    assert done.returncode == 2
    assert "error: 6 problems:" in done.stderr


def test_a_recipe_with_a_mistake_is_refused(launch, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: {model_size: gpt_1.3B, hiden_size: 64}\n")
    done = launch(PLAN, "--recipe", file, "--num_gpus", 4)
    assert done.returncode == 2 and "hiden_size is not a setting; did you mean hidden_size?" in done.stderr
    file.write_text("training: [1]\n")
    done = launch(PLAN, "--recipe", file, "--num_gpus", 4)
    assert done.returncode == 2 and "training is a section and holds settings" in done.stderr


def test_what_does_not_fit_says_what_would_help(launch) -> None:
    done = launch(PLAN, "--model_size", "gpt_175B", "--num_gpus", 8)
    assert done.returncode == 2
    assert "gpt_175B does not fit: the smallest layout is TP8" in done.stderr
    assert "GPUs" in done.stderr.partition("What would help: ")[2]
    done = launch(PLAN, "--model_size", "gpt_6.7B", "--num_gpus", 8, "--gpu_memory_gib", 16)
    assert "--engine transformers --zero_stage 3" in done.stderr


def test_fixed_parts_that_do_not_fit_are_named(launch) -> None:
    fixed = ("--micro_batch_size", 64, "--activation_checkpoint", "False", "--tensor_parallel_size", 1)
    done = launch(PLAN, *GPT, *fixed)
    assert done.returncode == 2
    help_text = done.stderr.partition("What would help: ")[2]
    assert "--activation_checkpoint" in help_text and "another layout" in help_text


def test_nothing_divides(launch) -> None:
    done = launch(PLAN, "--model_size", "gpt_1.3B", "--num_layers", 6, "--num_gpus", 7, "--global_batch_size", 64)
    assert done.returncode == 2
    assert "no layout divides 7 GPUs" in done.stderr


def test_a_plan_needs_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "deepspeed", "numpy", "sentencepiece"]
    code = (
        "import json, sys\nfrom train import cli\nfrom train.planner.plan import plan\n"
        "from train.planner.settings import PlanSettings\n"
        "assert cli.run(PlanSettings, plan, sys.argv[2:], description='', example='') == 0\n"
        "print(json.dumps([name for name in json.loads(sys.argv[1]) if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(heavy), *GPT], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []
