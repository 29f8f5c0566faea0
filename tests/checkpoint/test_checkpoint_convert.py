"""Step 3's conversion: what comes out, that it is proven, and each refusal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import VOCAB_SIZE, train_tokenizer

from train.checkpoint import convert as convert_module
from train.checkpoint.convert import ConvertSettings, convert
from train.errors import UserError, VerificationError

SCRIPT = "step3_upload_pretrained_model/convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh"
MakeCheckpoint = Callable[..., Path]


def settings_for(tokenizer_file: Path, checkpoint: Path, output_dir: Path, **changes: Any) -> ConvertSettings:
    settings = ConvertSettings(
        input_tokenizer_file=tokenizer_file,
        input_model_max_length=64,
        input_model_dir=checkpoint,
        output_tokenizer_and_model_dir=output_dir,
        parity_documents=50,
    )
    return dataclasses.replace(settings, **changes)


@pytest.fixture(autouse=True)
def few_hard_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thousands of hard cases are the tokenizer's own tests; here it matters that they are asked."""
    from train.tokenizer import parity

    cases = parity.hard_cases()
    monkeypatch.setattr(parity, "hard_cases", lambda: cases[::100])


def logits_of(folder: Path, input_ids: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids).logits


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_folder_gives_the_checkpoints_logits(
    architecture: str, dtype: str, make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    checkpoint, output = make_checkpoint(architecture, dtype=dtype), tmp_path / "hf"
    assert convert(settings_for(tokenizer_file, checkpoint, output)) == 0

    golden = load_file(checkpoint / "golden_logits.safetensors")
    allowed = {"float32": 1e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}[dtype]
    difference = (logits_of(output, golden["input_ids"]) - golden["logits"][..., :VOCAB_SIZE]).abs().max()
    assert difference / golden["logits"].abs().max() < allowed

    config, tokenizer = AutoConfig.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    generation = GenerationConfig.from_pretrained(output)
    assert config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert str(config.dtype).removeprefix("torch.") == dtype
    vocabulary = tokenizer.get_vocab()
    assert config.bos_token_id == tokenizer.bos_token_id == generation.bos_token_id == vocabulary["<s>"]
    assert config.eos_token_id == tokenizer.eos_token_id == vocabulary["</s>"]
    assert generation.eos_token_id == [vocabulary["</s>"], vocabulary["<EOD>"]]
    assert config.pad_token_id == tokenizer.pad_token_id == generation.pad_token_id == vocabulary["<pad>"]
    assert tokenizer.model_max_length == config.max_position_embeddings == 64

    record = json.loads((output / "verification.json").read_text())
    assert record["passed"] is True
    assert record["weights"]["max_abs_difference"] == 0
    assert record["logits"]["relative_difference"] <= record["logits"]["tolerance"] == pytest.approx(allowed)
    assert record["tokenizer"]["mismatches"] == 0
    assert "hard cases only" in record["tokenizer"]["texts_from"]
    assert (
        json.loads((output / "manifest.json").read_text())["results"]["parameters"] == record["weights"]["parameters"]
    )
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "verification.json", "manifest.json"),
    }


def test_the_embedding_is_cut_and_all_else_is_bit_for_bit(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = make_checkpoint("llama")
    convert(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"))
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = VOCAB_SIZE if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor.shape[0]
        assert torch.equal(after[name], tensor[:rows])


def test_a_sharded_checkpoint_stays_sharded(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", shards=3)
    shards = {path.name for path in checkpoint.glob("model-*.safetensors")}
    assert len(shards) > 1
    convert(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"))
    assert {path.name for path in (tmp_path / "hf").glob("model-*.safetensors")} == shards
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    stored = sum(path.stat().st_size for path in (tmp_path / "hf").glob("model-*.safetensors"))
    assert 0 < stored - index["metadata"]["total_size"] < 8192 * len(shards)  # the rest is the files' headers


def test_a_job_folder_means_its_latest_checkpoint(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(step=3)
    newest = make_checkpoint(step=12)
    convert(settings_for(tokenizer_file, newest.parent, tmp_path / "hf"))
    assert f"checkpoint {newest} (the latest of {newest.parent})" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "manifest.json").read_text())["results"]["checkpoint"] == "global_step12"


def test_without_golden_logits_the_record_says_so(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    convert(settings_for(tokenizer_file, make_checkpoint(golden=False), tmp_path / "hf"))
    record = json.loads((tmp_path / "hf" / "verification.json").read_text())
    assert record["logits"] == {"compared_with": "none: the source has no golden logits", "finite": True}
    assert record["weights"]["max_abs_difference"] == 0


def test_the_tokenizers_are_compared_on_the_files_named(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf", parity_text_files=(str(corpus),))
    convert(settings)
    record = json.loads((tmp_path / "hf" / "verification.json").read_text())
    assert "50 documents of --parity_text_files" in record["tokenizer"]["texts_from"]
    assert record["tokenizer"]["texts"] > 50


def write_lineage(step_dir: Path, corpus: Path, tokenizer_file: Path) -> None:
    """The manifests that preprocessing and pretraining leave."""
    from train import manifest
    from train.run_folder import of_checkpoint

    run = of_checkpoint(step_dir)
    assert run is not None
    index = run.root / "data" / "corpus_text_document.idx"
    index.parent.mkdir(parents=True)
    index.write_bytes(b"index")
    results = {"documents": 300, "tokens": 4321, "tokenizer_sha256": manifest.sha256(tokenizer_file)}
    data = index.with_name("corpus_text_document.manifest.json")
    inputs = [corpus, tokenizer_file]
    manifest.write(
        data, step="preprocess_data", settings={"json_key": "text"}, inputs=inputs, results=results, started=0
    )
    results = {"engine": "transformers", "tokens": 9999, "loss_curve": [[1, 6.0], [2, 5.5]]}
    inputs = [tokenizer_file, index]
    manifest.write(run.manifest, step="pretrain_model", settings={}, inputs=inputs, results=results, started=0)


def test_by_default_they_are_compared_on_the_training_data(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, corpus: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    write_lineage(checkpoint, corpus, tokenizer_file)
    convert(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"))
    record = json.loads((tmp_path / "hf" / "verification.json").read_text())
    assert "50 documents of the training data" in record["tokenizer"]["texts_from"]
    carried = json.loads((tmp_path / "hf" / "manifest.json").read_text())["results"]["lineage"]
    assert [item["step"] for item in carried] == ["pretrain_model", "preprocess_data"]


def test_the_checkpoint_of_a_run_that_goes_on_knows_its_data_too(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, corpus: Path, tmp_path: Path
) -> None:
    """Such a run has a recipe, and no manifest yet."""
    from train import settings
    from train.data.preprocess import PreprocessSettings, preprocess
    from train.recipe import PretrainRecipe
    from train.run_folder import of_checkpoint

    checkpoint, prefix = make_checkpoint(), tmp_path / "tokens" / "corpus"
    preprocess(PreprocessSettings(tokenizer_file, (str(corpus),), prefix, workers=1))
    run = of_checkpoint(checkpoint)
    assert run is not None
    given = {
        "data": {"input_tokenizer_file": str(tokenizer_file), "data_path": [str(prefix.parent)]},
        "training": {"train_tokens": 10**6},
        "checkpoint": {"output_model_dir": str(run.root)},
    }
    run.recipe.parent.mkdir()
    run.recipe.write_text(settings.to_yaml(settings.build(PretrainRecipe, given)))
    convert(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"))
    record = json.loads((tmp_path / "hf" / "verification.json").read_text())
    assert "50 documents of the training data" in record["tokenizer"]["texts_from"]
    shutil.rmtree(prefix.parent)
    convert(settings_for(tokenizer_file, checkpoint, tmp_path / "hf2"))
    record = json.loads((tmp_path / "hf2" / "verification.json").read_text())
    assert "hard cases only" in record["tokenizer"]["texts_from"]


def test_another_tokenizer_than_the_datas_is_refused(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, corpus: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    write_lineage(checkpoint, corpus, tokenizer_file)
    other = train_tokenizer(tmp_path / "other.model", corpus, VOCAB_SIZE - 10)
    refused(settings_for(other, checkpoint, tmp_path / "hf"), "not the tokenizer that the training data was made with")


def test_a_finished_conversion_is_not_done_again(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf")
    convert(settings)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}
    capsys.readouterr()
    assert convert(settings) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()} == before


def test_another_output_is_replaced_only_with_overwrite(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    checkpoint, output = make_checkpoint(), tmp_path / "hf"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    settings = settings_for(tokenizer_file, checkpoint, output)
    with pytest.raises(UserError, match="--overwrite"):
        convert(settings)
    with pytest.raises(UserError, match="was not made by this step"):
        convert(dataclasses.replace(settings, overwrite=True))
    assert (output / "mine.txt").read_text() == "mine"
    (output / "manifest.json").write_text('{"step": "older", "settings": {}, "results": {}}')  # a step of ours was here
    convert(dataclasses.replace(settings, overwrite=True))
    assert not (output / "mine.txt").exists()
    assert (output / "verification.json").is_file()


def test_a_shorter_length_is_accepted_and_kept(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    convert(settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf", input_model_max_length=32))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == 32
    assert AutoConfig.from_pretrained(tmp_path / "hf").n_positions == 64  # its table has that many rows


def test_rotary_positions_take_the_length_given(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    convert(settings_for(tokenizer_file, make_checkpoint("llama"), tmp_path / "hf", input_model_max_length=128))
    assert AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings == 128


def refused(settings: ConvertSettings, message: str, kind: type[UserError] = UserError) -> None:
    """`convert` refuses with `message`, and leaves no output and nothing half-written."""
    before = set(settings.output_tokenizer_and_model_dir.parent.iterdir())
    with pytest.raises(kind) as caught:
        convert(settings)
    assert message in "\n".join(caught.value.problems)
    assert caught.value.exit_code == (3 if kind is VerificationError else 2)
    assert set(settings.output_tokenizer_and_model_dir.parent.iterdir()) == before


def test_a_longer_length_than_gpt2_has_is_refused(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    settings = settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf", input_model_max_length=65)
    refused(settings, "more than the 64 positions the model has")


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(rows=VOCAB_SIZE - 1, golden=False)
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), f"the tokenizer has {VOCAB_SIZE} pieces")


def remove(file: str) -> Callable[[Path], None]:
    return lambda step_dir: (step_dir / file).unlink()


def cut_short(file: str) -> Callable[[Path], None]:
    def damage(step_dir: Path) -> None:
        data = (step_dir / file).read_bytes()
        (step_dir / file).write_bytes(data[: len(data) * 2 // 3])

    return damage


def write(file: str, text: str) -> Callable[[Path], None]:
    def damage(step_dir: Path) -> None:
        (step_dir / file).write_text(text)

    return damage


def change_config(**changes: Any) -> Callable[[Path], None]:
    def damage(step_dir: Path) -> None:
        config = json.loads((step_dir / "config.json").read_text()) | changes
        (step_dir / "config.json").write_text(json.dumps(config))

    return damage


def drop_tensor(step_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(step_dir / "model.safetensors")
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, step_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "holds model.safetensors and no config.json"),
        (remove("model.safetensors"), "holds config.json and no model.safetensors"),
        (cut_short("model.safetensors"), "is truncated or damaged"),
        (cut_short("golden_logits.safetensors"), "is damaged"),
        (write("config.json", "{"), "is not JSON"),
        (write("config.json", "[]"), "lacks model_type or vocab_size"),
        (change_config(model_type="no_such_model"), "transformers cannot read"),
        (change_config(n_layer=3), "lacks 12 tensors of its config.json"),
        (change_config(n_layer=1), "holds 12 tensors its config.json does not have"),
        (change_config(n_embd=64), "they do not fit"),
        (drop_tensor, "lacks 1 tensors of its config.json, first transformer.h.1.attn.c_attn.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None],
    message: str,
    make_checkpoint: MakeCheckpoint,
    tokenizer_file: Path,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint()
    damage(checkpoint)
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("model.safetensors.index.json", "{}"), "is not an index of safetensors"),
        (lambda step_dir: next(step_dir.glob("model-*.safetensors")).unlink(), "is missing"),
    ],
)
def test_a_damaged_sharded_checkpoint_is_refused(
    damage: Callable[[Path], None],
    message: str,
    make_checkpoint: MakeCheckpoint,
    tokenizer_file: Path,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint("llama", shards=3)
    damage(checkpoint)
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), message)


def test_an_index_that_names_another_shard_is_refused(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", shards=3)
    index_file = checkpoint / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embed_tokens.weight"] = next(
        shard for shard in shards if shard != index["weight_map"]["model.embed_tokens.weight"]
    )
    index_file.write_text(json.dumps(index))
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), "lacks model.embed_tokens.weight")


def test_what_is_no_checkpoint_is_refused(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    output = tmp_path / "hf"
    refused(settings_for(tokenizer_file, tmp_path / "nowhere", output), "does not exist")
    refused(settings_for(tokenizer_file, checkpoint / "config.json", output), "is a file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(settings_for(tokenizer_file, empty, output), "is not a whole checkpoint")
    half = checkpoint.with_name(".global_step4.unfinished-host-1")
    shutil.copytree(checkpoint, half)
    refused(settings_for(tokenizer_file, half, output), "half-written")
    (checkpoint.parent / "latest").write_text("global_step99")
    refused(
        settings_for(tokenizer_file, checkpoint.parent, output), "names 'global_step99', the folder holds global_step3"
    )
    (checkpoint.parent / "latest").unlink()
    refused(settings_for(tokenizer_file, checkpoint.parent, output), "no `latest` file")


def test_what_is_no_tokenizer_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, output = make_checkpoint(), tmp_path / "hf"
    refused(settings_for(tmp_path / "no.model", checkpoint, output), "no.model is missing")
    refused(settings_for(tmp_path, checkpoint, output), "is a folder")
    (tmp_path / "text.model").write_text("hello")
    refused(settings_for(tmp_path / "text.model", checkpoint, output), "is not a SentencePiece model")


def test_a_tokenizer_without_special_tokens_is_refused(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_conversion = convert_module.convert_tokenizer

    def conversion(model_file: Path, output_dir: Path, *, model_max_length: int) -> None:
        true_conversion(model_file, output_dir, model_max_length=model_max_length)
        file = output_dir / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["pad_token"]
        file.write_text(json.dumps(config))
        (output_dir / "special_tokens_map.json").unlink()

    monkeypatch.setattr(convert_module, "convert_tokenizer", conversion)
    settings = settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf")
    refused(settings, "the tokenizer has no pad_token_id")


def test_wrong_weights_fail_and_leave_no_folder(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that swaps two projections of the same shape: only numbers can tell."""
    from safetensors.torch import load_file, save_file

    from train.checkpoint import export

    true_export = export.export

    def wrong_export(checkpoint_dir: Path, output_dir: Path, **numbers: int) -> Any:
        result = true_export(checkpoint_dir, output_dir, **numbers)
        tensors = load_file(output_dir / "model.safetensors")
        gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
        save_file(tensors, output_dir / "model.safetensors", metadata={"format": "pt"})
        return result

    monkeypatch.setattr(export, "export", wrong_export)
    settings = settings_for(tokenizer_file, make_checkpoint("llama"), tmp_path / "hf")
    refused(settings, "2 tensors differ from the source", VerificationError)
    monkeypatch.setattr(export, "weights", lambda *_, **__: None)  # not compared: the logits must tell
    refused(settings, "the logits differ from the training process's own", VerificationError)


def test_another_activation_than_the_trained_one_fails(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    """The weights are equal, the configuration is not what was trained: the golden logits tell."""
    checkpoint = make_checkpoint(dtype="bfloat16")
    change_config(activation_function="relu")(checkpoint)
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), "the logits differ", VerificationError)


def test_weights_that_are_not_finite_fail(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint(golden=False)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.h.0.ln_1.weight"][3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    settings = settings_for(tokenizer_file, checkpoint, tmp_path / "hf")
    refused(settings, "transformer.h.0.ln_1.weight holds NaN or infinity", VerificationError)
    refused(settings, "the model's logits hold NaN or infinity", VerificationError)


def test_golden_logits_of_another_vocabulary_fail(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint()
    golden = load_file(checkpoint / "golden_logits.safetensors")
    golden["logits"] = golden["logits"][..., :300].contiguous()
    save_file(golden, checkpoint / "golden_logits.safetensors")
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), "are of 300 pieces", VerificationError)
    golden["logits"] = golden["logits"][:, :5].contiguous()
    save_file(golden, checkpoint / "golden_logits.safetensors")
    refused(settings_for(tokenizer_file, checkpoint, tmp_path / "hf"), "[1, n] and [1, n, vocabulary]")


def test_a_tokenizer_that_differs_fails(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_conversion = convert_module.convert_tokenizer

    def wrong_conversion(model_file: Path, output_dir: Path, *, model_max_length: int) -> None:
        true_conversion(model_file, output_dir, model_max_length=model_max_length)
        text = (output_dir / "tokenizer.json").read_text().replace('"content": " "', '"content": "_"')
        (output_dir / "tokenizer.json").write_text(text)

    monkeypatch.setattr(convert_module, "convert_tokenizer", wrong_conversion)
    settings = settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf")
    refused(settings, "the converted tokenizer differs from tiny.model", VerificationError)


def test_special_tokens_that_disagree_fail(
    make_checkpoint: MakeCheckpoint, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "_write_special_tokens", lambda _: None)
    settings = settings_for(tokenizer_file, make_checkpoint(), tmp_path / "hf")
    refused(settings, "pad_token_id is", VerificationError)


def test_settings_out_of_range_are_refused(launch: Any, tmp_path: Path) -> None:
    arguments = ["--input_tokenizer_file", "t.model", "--input_model_dir", "c", "--output_tokenizer_and_model_dir", "o"]
    done = launch(SCRIPT, *arguments, "--input_model_max_length", 0, "--parity_documents", 0, cwd=tmp_path)
    assert done.returncode == 2
    assert "--input_model_max_length 0" in done.stderr
    assert "--parity_documents 0" in done.stderr


def test_the_launcher_plans_without_torch(launch: Any, tmp_path: Path) -> None:
    arguments = ["--input_tokenizer_file", "t.model", "--input_model_dir", "c", "--output_tokenizer_and_model_dir", "o"]
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir()
    for module in ("torch", "transformers"):
        (forbidden / f"{module}.py").write_text("raise SystemExit(99)")
    done = launch(
        SCRIPT,
        *(*arguments, "--input_model_max_length", 2048, "--dry_run"),
        cwd=tmp_path,
        environment={"PYTHONPATH": str(forbidden)},
    )
    assert done.returncode == 0, done.stderr
    assert "2048 tokens" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"forbidden"}


@pytest.mark.slow
def test_the_launcher_converts_and_verifies(
    launch: Any, make_checkpoint: MakeCheckpoint, tokenizer_file: Path, awkward_path: Path
) -> None:
    checkpoint, output = make_checkpoint("llama"), awkward_path / "hf"
    done = launch(
        SCRIPT,
        *("--input_tokenizer_file", tokenizer_file, "--input_model_max_length", 64),
        *("--input_model_dir", checkpoint, "--output_tokenizer_and_model_dir", output),
    )
    assert done.returncode == 0, done.stderr
    assert "0 mismatches" in done.stdout
    verified = launch("step3_upload_pretrained_model/verify_model.py", "--input_tokenizer_and_model_dir", output)
    assert verified.returncode == 0, verified.stderr
