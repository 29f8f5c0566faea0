"""Hugging Face folders into Megatron-DeepSpeed: out and in again to the last bit, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from train import settings
from train.checkpoint.megatron import vocabulary
from train.checkpoint.megatron.export import export
from train.checkpoint.megatron.import_huggingface import ImportSettings, import_model
from train.checkpoint.megatron.initial import prepare_initial
from train.checkpoint.megatron.layout import open_checkpoint
from train.engine.megatron_deepspeed.checkout import PINNED_COMMIT
from train.errors import UserError, VerificationError
from train.recipe import PretrainRecipe

ROWS = 50
REAL = {name: Path(__file__).parent / name / "global_step8" for name in ("megatron_tp2_pp2", "megatron_llama_tp2")}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 with erf": {"activation_function": "gelu"},
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
}
LAYOUTS = [(1, 1, False), (2, 2, False), (4, 1, False), (2, 1, True)]


def make_folder(folder: Path, family: str, *, dtype: str = "float32", **changes: Any) -> Path:
    """A random model's folder, in two shards."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

    torch.manual_seed(2)
    changes = FAMILIES.get(family, {}) | {"vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2} | changes
    if family.startswith("gpt2"):
        config: Any = GPT2Config(**({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16} | changes))
    else:
        kind = MistralConfig if family.startswith("mistral") else LlamaConfig
        shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 8}
        shape |= {"num_key_value_heads": 4, "max_position_embeddings": 16, "rms_norm_eps": 1e-4}
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 70.0}
        config = kind(**(shape | changes))
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def run_import(folder: Path, output: Path, layout: tuple[int, int, bool] = (1, 1, False), **changes: Any) -> Path:
    given = ImportSettings(
        input_model_dir=folder,
        output_checkpoint_dir=output,
        tensor_parallel_size=layout[0],
        pipeline_parallel_size=layout[1],
        no_pipeline_parallel=layout[2],
        make_vocab_size_divisible_by=8,
    )
    assert import_model(dataclasses.replace(given, **changes)) == 0
    return output / "global_step0"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out_again_is_the_same_folder(tmp_path: Path, family: str, layout: tuple[int, int, bool]) -> None:
    folder = make_folder(tmp_path / "hf", family, dtype="bfloat16")
    step_dir = run_import(folder, tmp_path / "megatron", layout)
    (tmp_path / "again").mkdir()
    result = export(step_dir, tmp_path / "again", vocab_size=ROWS, model_max_length=16)
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert set(before) == set(after) and result.dtype == "bfloat16"
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(
            after[name].view(torch.int16), tensor.view(torch.int16)
        )
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    own = {"bos_token_id", "eos_token_id", "pad_token_id", "n_inner", "resid_pdrop", "attn_pdrop", "embd_pdrop"}
    assert {k: v for k, v in configs[0].items() if k not in own} == {
        k: v for k, v in configs[1].items() if k not in own
    }


@pytest.mark.parametrize("order", ["per_head", "per_rank"])
def test_both_orders_of_query_key_and_value(tmp_path: Path, order: str) -> None:
    folder = make_folder(tmp_path / "hf", "gpt2")
    step_dir = run_import(folder, tmp_path / "megatron", (2, 1, False), query_key_value_order=order)
    first = torch.load(step_dir / "layer_02-model_01-model_states.pt", weights_only=True)
    bias = tensors_of(folder)["transformer.h.0.attn.c_attn.bias"].view(3, 4, 8)[:, 2:]  # the second rank's heads
    expected = bias.transpose(0, 1) if order == "per_head" else bias
    assert torch.equal(first["self_attention.query_key_value.bias"], expected.flatten())


@pytest.mark.parametrize("name", REAL)
def test_out_and_in_again_is_the_engines_own_checkpoint(tmp_path: Path, name: str) -> None:
    """All rows but the vocabulary's padding, which no export has; and through another layout on the way."""
    (tmp_path / "hf").mkdir()
    export(REAL[name], tmp_path / "hf", vocab_size=120, model_max_length=32)
    other = run_import(tmp_path / "hf", tmp_path / "tp4", (4, 2, False))
    (tmp_path / "hf2").mkdir()
    export(other, tmp_path / "hf2", vocab_size=120, model_max_length=32)
    again = open_checkpoint(run_import(tmp_path / "hf2", tmp_path / "tp2", (2, 2, False)))
    engine = open_checkpoint(REAL[name])
    for theirs, ours in zip(engine.layers(), again.layers(), strict=True):
        for held, written in zip(theirs.slices, ours.slices, strict=True):
            assert list(held) == list(written)
            for key, tensor in held.items():
                if key not in ("word_embeddings.weight", "lm_head.weight"):
                    assert torch.equal(tensor, written[key]), key
        for key in {"word_embeddings.weight", "lm_head.weight"} & set(theirs.slices[0]):
            both = [torch.cat([held[key] for held in layer.slices])[:120] for layer in (theirs, ours)]
            assert torch.equal(*both)


def test_gpt2s_own_files_on_the_hub_are_read(tmp_path: Path) -> None:
    """Without the prefix of the model with a head, and with the causal masks of older versions."""
    folder = make_folder(tmp_path / "hf", "gpt2")
    before = tensors_of(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    older = {name.removeprefix("transformer."): tensor for name, tensor in before.items()}
    save_file(older | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, folder / "model.safetensors")
    (tmp_path / "again").mkdir()
    export(run_import(folder, tmp_path / "megatron"), tmp_path / "again", vocab_size=ROWS, model_max_length=16)
    after = tensors_of(tmp_path / "again")
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_padding_takes_no_more_of_the_softmax_than_its_share() -> None:
    """Also where all logits lie far below zero, and rows of zeros would take everything."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(50, 16, generator=generator) - 2.0
    padded = vocabulary.with_padding(rows, 64)
    hidden = torch.rand(200, 16, generator=generator) * 3
    more = (hidden @ padded.t()).logsumexp(dim=1) - (hidden @ rows.t()).logsumexp(dim=1)
    assert padded.shape == (64, 16) and torch.equal(padded[:50], rows)
    assert float(more.max()) <= math.log(1 + 14 / 50) + 1e-5
    zeros = torch.cat((rows, torch.zeros(14, 16)))
    assert float(((hidden @ zeros.t()).logsumexp(dim=1) - (hidden @ rows.t()).logsumexp(dim=1)).max()) > 10


def test_rows_are_what_the_engine_counts(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=380)
    # 380 pieces, which have <CLS>, <SEP>, <EOD> and <MASK>, and <PAD>, <BOS>, <EOS>, which upstream adds
    assert vocabulary.engine_vocab_size(tokenizer_file) == 383
    step_dir = run_import(folder, tmp_path / "megatron", input_tokenizer_file=tokenizer_file)
    assert open_checkpoint(step_dir).saved.padded_vocab_size == 384
    step_dir = run_import(folder, tmp_path / "plain", make_vocab_size_divisible_by=20)
    assert open_checkpoint(step_dir).saved.padded_vocab_size == 380


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention is scaled in a way of its own"),
    ("gpt2", {"add_cross_attention": True}, "it has cross attention"),
    ("llama", {"head_dim": 8}, "head_dim 8 x 8 heads is not the width 32"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 70.0, "factor": 2.0}}, "neither scaled nor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 70.5}}, r"rope_theta 70\.5: .* whole numbers"),
    ("llama", {"attention_bias": True}, "biases in attention or feed-forward layers only"),
    ("mistral", {"sliding_window": 8}, "sliding_window 8 is less than its 16 positions"),
])  # fmt: skip
def test_what_the_engine_cannot_compute_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_folder(tmp_path / "hf", family, **changes)
    with pytest.raises(UserError, match=message):
        run_import(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_other_families_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="the model is a qwen2: GPT-2, Llama and Mistral become"):
        run_import(tmp_path / "hf", tmp_path / "megatron")


def test_a_layout_that_does_not_divide_is_refused_with_all_its_reasons(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama")
    with pytest.raises(UserError) as refused:
        run_import(folder, tmp_path / "megatron", (16, 16, False), query_key_value_order="per_rank")
    assert [problem.split()[0] for problem in refused.value.problems] == [
        "num_attention_heads", "num_key_value_heads", "ffn_hidden_size", "--num_layers", "--query_key_value_order",
    ]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), [
    (["--tensor_parallel_size", "0"], "--tensor_parallel_size 0: it must be at least 1"),
    (["--no_pipeline_parallel", "True", "--pipeline_parallel_size", "2"], "contradicts --pipeline_parallel_size 2"),
])  # fmt: skip
def test_settings_are_refused(words: list[str], message: str) -> None:
    given = ["--input_model_dir", "a", "--output_checkpoint_dir", "b"]
    with pytest.raises(UserError, match=message):
        settings.parse(ImportSettings, [*given, *words], program="convert", description="")


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json: name the folder of a Hugging Face model"):
        run_import(tmp_path, tmp_path / "megatron")
    folder = make_folder(tmp_path / "hf", "llama")
    with pytest.raises(UserError, match="is not a file: name the run's SentencePiece model"):
        run_import(folder, tmp_path / "megatron", input_tokenizer_file=tmp_path / "none.model")


def _rewritten(folder: Path, change: Any) -> None:
    tensors = tensors_of(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 tensors of its config.json, first model.norm.weight"),
    (lambda tensors: tensors.update(extra=torch.ones(1)), "holds 1 tensors that such a model does not have, first ext"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \[3\], config.json"),
])  # fmt: skip
def test_tensors_of_another_model_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = make_folder(tmp_path / "hf", "llama")
    _rewritten(folder, change)
    with pytest.raises(UserError, match=message):
        run_import(folder, tmp_path / "megatron")


def test_what_is_written_wrongly_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.checkpoint.megatron import export as export_module

    folder = make_folder(tmp_path / "hf", "llama")
    weights = export_module.weights
    monkeypatch.setattr(export_module, "weights", lambda *a, **k: ((n, t + 1) for n, t in weights(*a, **k)))
    with pytest.raises(VerificationError, match="21 of 21 tensors are not what was read"):
        run_import(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_the_second_time_there_is_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "hf", "llama")
    run_import(folder, tmp_path / "megatron")
    run_import(folder, tmp_path / "megatron")
    assert "nothing to do" in capsys.readouterr().out


def recipe(tmp_path: Path, tokenizer_file: Path, *words: str) -> PretrainRecipe:
    """The recipe of a run that fits `make_folder(..., "llama")` in TP2; `words` win."""
    given = {
        "input_tokenizer_file": tokenizer_file, "data_path": tmp_path / "data", "output_model_dir": tmp_path / "out",
        "architecture": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
        "ffn_hidden_size": 24, "rope_theta": 70, "norm_epsilon": 1e-4, "sequence_length": 16, "train_tokens": 16,
        "global_batch_size": 1, "lr": 1e-3, "tensor_parallel_size": 2,
        "initial_checkpoint_dir": tmp_path / "megatron",
    }  # fmt: skip
    given |= {word.removeprefix("--"): value for word, value in zip(words[::2], words[1::2], strict=True)}
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return settings.parse(PretrainRecipe, argv, program="pretrain", description="").resolved()


def test_a_run_begins_with_a_checkpoint_that_fits(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=380)
    run_import(folder, tmp_path / "megatron", (2, 1, False), make_vocab_size_divisible_by=128)
    load = prepare_initial(recipe(tmp_path, tokenizer_file), PINNED_COMMIT)
    assert (load.tag, load.initial_from, load.vocabulary_divisor) == ("global_step0", tmp_path / "megatron", 256)


@pytest.mark.parametrize(("words", "message"), [
    (("--num_layers", "4"), "it has num_layers 2, the recipe 4; pass --num_layers 2"),
    (("--norm_epsilon", "1e-5"), "it has norm_epsilon 0.0001, the recipe 1e-05"),
    (("--rope_theta", "10000"), "its rope_theta is 70, the recipe's 10000"),
    (("--tie_word_embeddings", "True"), "its tie_word_embeddings is False"),
    (("--tensor_parallel_size", "4"), "it is cut for 2 tensor ranks, --tensor_parallel_size is 4"),
    (("--no_pipeline_parallel", "True"), "its form is that of the pipeline module"),
    (("--architecture", "gpt2", "--num_key_value_heads", "8"), "it holds a llama, --architecture is gpt2"),
    (("--initial_checkpoint_dir", "/nowhere"), "/nowhere is not a folder"),
])  # fmt: skip
def test_a_run_of_another_model_is_refused(
    tmp_path: Path, tokenizer_file: Path, words: tuple[str, ...], message: str
) -> None:
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=380)
    run_import(folder, tmp_path / "megatron", (2, 1, False), make_vocab_size_divisible_by=128)
    with pytest.raises(UserError, match=message):
        prepare_initial(recipe(tmp_path, tokenizer_file, *words), PINNED_COMMIT)


def test_a_damaged_checkpoint_begins_no_run(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=380)
    step_dir = run_import(folder, tmp_path / "megatron", (2, 1, False), make_vocab_size_divisible_by=128)
    file = step_dir / "layer_02-model_01-model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name}: other contents than were written .*: copy or import it again"):
        prepare_initial(recipe(tmp_path, tokenizer_file), PINNED_COMMIT)


@pytest.mark.parametrize(("order", "commit", "message"), [
    ("per_head", "4efb479d5317ce9b86096b9d8e3e8030b0b5263b", "lie per head .as the import wrote it., and .* 4efb479d"),
    ("per_rank", PINNED_COMMIT, "lie per tensor rank .as the import wrote it., and Megatron-DeepSpeed 6acc370a reads"),
    ("per_rank", None, "Megatron-DeepSpeed unknown reads them per head"),
])  # fmt: skip
def test_query_key_and_value_in_the_order_of_another_version_are_refused(
    tmp_path: Path, tokenizer_file: Path, order: str, commit: str | None, message: str
) -> None:
    folder = make_folder(tmp_path / "hf", "gpt2", vocab_size=380)
    more = {"make_vocab_size_divisible_by": 128, "query_key_value_order": order}
    run_import(folder, tmp_path / "megatron", (2, 1, False), **more)
    shape = ("--architecture", "gpt2", "--num_attention_heads", "4", "--num_key_value_heads", "4")
    rest = ("--ffn_hidden_size", "128", "--norm_epsilon", "1e-5", "--rope_theta", "10000")
    with pytest.raises(UserError, match=message) as caught:
        prepare_initial(recipe(tmp_path, tokenizer_file, *shape, *rest), commit)
    assert len(caught.value.problems) == 1


def test_a_folder_that_is_not_imported_yet_is_told(tmp_path: Path, tokenizer_file: Path) -> None:
    make_folder(tmp_path / "megatron", "llama", vocab_size=380)
    with pytest.raises(UserError, match=r"is a Hugging Face model: make a checkpoint of it first, by .*deepspeed\.sh"):
        prepare_initial(recipe(tmp_path, tokenizer_file), PINNED_COMMIT)


def test_too_few_rows_for_the_engines_vocabulary_are_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=380)
    run_import(folder, tmp_path / "megatron", (2, 1, False), make_vocab_size_divisible_by=10)
    with pytest.raises(UserError, match="it has 380 vocabulary rows, the engine needs 383"):
        prepare_initial(recipe(tmp_path, tokenizer_file), PINNED_COMMIT)


@pytest.mark.parametrize(("words", "message"), [
    (("--sequence_length", "8"), "it has 16 learned positions; pass --sequence_length 16"),
    ((), "its GELU is the erf form; pass --megatron_arguments=--no-bias-gelu-fusion"),
])  # fmt: skip
def test_a_gpt2s_positions_and_gelu_must_be_the_runs(
    tmp_path: Path, tokenizer_file: Path, words: tuple[str, ...], message: str
) -> None:
    folder = make_folder(tmp_path / "hf", "gpt2 with erf", vocab_size=380)
    run_import(folder, tmp_path / "megatron", (2, 1, False), make_vocab_size_divisible_by=128)
    shape = ("--architecture", "gpt2", "--num_attention_heads", "4", "--ffn_hidden_size", "128")
    rest = ("--norm_epsilon", "1e-5", "--rope_theta", "10000")
    with pytest.raises(UserError, match=message):
        prepare_initial(recipe(tmp_path, tokenizer_file, *shape, *rest, *words), PINNED_COMMIT)
