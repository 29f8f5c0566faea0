"""A run is described once: sizes fill in what is open, and what does not fit is named before anything starts."""

from __future__ import annotations

import pytest

from train import settings
from train.errors import UserError
from train.model_sizes import MODEL_SIZES
from train.recipe import PretrainRecipe

REQUIRED = ["--input_tokenizer_file", "t.model", "--data_path", "d", "--output_model_dir", "o"]
TINY = ["--num_layers", "2", "--hidden_size", "64", "--num_attention_heads", "4", "--global_batch_size", "8", "--lr",
        "1e-3", "--train_tokens", "1M"]  # fmt: skip


def recipe(*words: str, project_root=None) -> PretrainRecipe:
    recipe_dir = project_root / "scripts/step2_pretrain_model/recipes" if project_root else None
    return settings.parse(PretrainRecipe, [*REQUIRED, *words], program="p", description="", recipe_dir=recipe_dir)


def test_a_size_fills_in_shape_rate_batch_and_initialisation():
    made = recipe("--model_size", "gpt_1.3B", "--train_tokens", "300B").resolved()
    assert (made.model.num_layers, made.model.hidden_size, made.model.num_attention_heads) == (24, 2048, 16)
    assert (made.training.lr, made.training.min_lr, made.training.global_batch_size) == (2e-4, 1e-6, 512)
    assert made.model.init_method_std == 0.013
    assert made.training.lr_decay_tokens == 300 * 10**9


def test_what_is_given_wins_over_the_size():
    made = recipe("--model_size", "gpt_1.3B", "--train_tokens", "1B", "--lr", "1e-5", "--num_layers", "3").resolved()
    assert (made.training.lr, made.model.num_layers, made.model.hidden_size) == (1e-5, 3, 2048)


def test_own_width_means_own_feed_forward_and_heads():
    made = recipe("--model_size", "llama_1B", "--train_tokens", "1B", "--hidden_size", "512").resolved()
    assert (made.model.ffn_hidden_size, made.model.num_key_value_heads) == (2048, 32)


def test_without_a_size_all_open_numbers_are_named_at_once():
    with pytest.raises(UserError) as caught:
        recipe("--train_tokens", "1B").resolved()
    names = [problem.split()[0] for problem in caught.value.problems]
    assert names == ["--num_layers", "--hidden_size", "--num_attention_heads", "--global_batch_size", "--lr"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_attention_heads", "5"], "64 / --num_attention_heads 5 = 12.8"),
        (["--num_key_value_heads", "2"], "GPT-2 has one per query head"),
        (["--architecture", "llama", "--num_key_value_heads", "3"], "each key-value head must serve"),
        (["--tie_word_embeddings", "False"], "a GPT-2 folder ties them"),
        (["--min_lr", "1"], r"--min_lr 1.0 is above --lr 0.001"),
        (["--lr_warmup_tokens", "2M"], "must be below the 1,000,000 tokens"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        recipe(*TINY, *words).resolved()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zero_stage", "4"], "not one of 0, 1, 2, 3"),
        (["--offload", "all", "--zero_stage", "2"], "--offload all needs --zero_stage 3"),
        (["--split", "a,b"], "three proportions such as 949,50,1"),
        (["--split", "0,0,0"], "three proportions"),
        (["--save_interval", "0"], "--save_interval 0: it must be at least 1"),
        (["--train_tokens", "0"], "--train_tokens 0: it must be at least 1"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--sequence_length", "1"], "--sequence_length 1"),
        (["--num_processes", "-1"], "--num_processes -1"),
        (["--tensor_parallel_size", "0"], "--tensor_parallel_size 0"),
        (["--wandb_group", "x" * 129], "W&B takes 128"),
        (["--log_interval", "0"], "--log_interval 0"),
        (["--profile_step", "-1"], "--profile_step -1"),
        (["--keep_last", "-1"], "--keep_last -1"),
        (["--num_layers", "0"], "--num_layers 0"),
        (["--lr", "0"], "--lr 0.0"),
        (["--lr", "nan"], "--lr nan: a finite number was expected"),
        (["--clip_grad", "inf"], "--clip_grad inf: a finite number"),
        (["--min_lr", "-1"], "--min_lr -1.0: it must be 0 or more"),
        (["--weight_decay", "-1"], "--weight_decay -1.0"),
        (["--adam_beta1", "1"], "--adam_beta1 1.0"),
        (["--adam_epsilon", "0"], "--adam_epsilon 0.0"),
        (["--seed", "99999999999999"], "--seed 99999999999999"),
        (["--global_batch_size", "0"], "--global_batch_size 0: it must be at least 1"),
        (["--norm_epsilon", "-1"], "--norm_epsilon -1.0"),
        (["--num_workers", "-1"], "--num_workers -1"),
        (["--train_tokens", "inf"], "--train_tokens 'inf'"),
        (["--train_tokens", "1e300"], "--train_tokens '1e300'"),
        (["--split", "1,nan,1"], "three proportions"),
        (["--split", "0,100,0"], "the first above 0"),
        (["--job_name", "../../precious"], "a plain name"),
        (["--job_name", "."], "a plain name"),
    ],
)
def test_impossible_values_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        recipe(*TINY, *words)


def test_the_steps_cover_the_tokens():
    made = recipe(*TINY, "--sequence_length", "100").resolved()
    assert (made.tokens_per_step, made.train_steps) == (800, 1250)
    assert recipe(*TINY, "--train_tokens", "801", "--sequence_length", "100").resolved().train_steps == 2


def test_a_resolved_recipe_saved_and_read_is_the_same_and_stays_so():
    made = recipe(*TINY, "--wandb_project", "p").resolved()
    again = settings.build(PretrainRecipe, settings.to_plain(made))
    assert again == made
    assert again.resolved() == made


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_every_size_resolves(size):
    made = recipe("--model_size", size, "--train_tokens", "1B").resolved()
    assert made.model_name == size
    assert made.training.lr > made.training.min_lr


def test_every_shipped_recipe_loads_and_resolves(project_root):
    names = [file.stem for file in (project_root / "scripts/step2_pretrain_model/recipes").glob("*.yaml")]
    assert {"demo", "gpt_0.125B", "gpt_175B", "mistral_0.3B"} <= set(names)
    for name in names:
        made = recipe("--recipe", name, project_root=project_root).resolved()
        assert made.train_steps > 0, name


def test_w_and_b_is_on_when_any_of_its_names_is_given():
    assert not recipe(*TINY).logging.wandb
    assert recipe(*TINY, "--wandb_entity", "e").logging.wandb
