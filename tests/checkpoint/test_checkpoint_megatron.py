"""Megatron-DeepSpeed's checkpoints: merged from any layout to the last bit, read safely, refused when not whole."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_samples import VOCAB_SIZE, random_gpt2, write_checkpoint, write_golden_logits
from safetensors.torch import load_file

from train.checkpoint import kind
from train.checkpoint.export import ExportResult
from train.checkpoint.megatron import configuration, merge, qkv_layout, reader
from train.checkpoint.megatron.export import export, weights
from train.engine.megatron_deepspeed.checkout import PINNED_COMMIT
from train.errors import UserError, VerificationError

FPDT_COMMIT = "4efb479d5317ce9b86096b9d8e3e8030b0b5263b"
LAYOUTS = [(1, 1, True), (2, 1, True), (2, 2, True), (4, 1, True), (1, 1, False), (2, 1, False)]


def run_export(step_dir: Path, folder: Path, *, vocab_size: int = VOCAB_SIZE, length: int = 16) -> ExportResult:
    folder.mkdir(exist_ok=True)
    return export(step_dir, folder, vocab_size=vocab_size, model_max_length=length)


def read_first(step_dir: Path) -> dict[str, Any]:
    """The first file's state, in memory: the reader leaves tensors in the file, which a test is about to replace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(step_dir / "mp_rank_00_model_states.pt", weights_only=True)


def load_exported(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(("tensor_size", "pipeline_size", "has_pipeline_module"), LAYOUTS)
@pytest.mark.parametrize("commit", [PINNED_COMMIT, FPDT_COMMIT])
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, tensor_size: int, pipeline_size: int, has_pipeline_module: bool, commit: str
) -> None:
    model = random_gpt2()
    step_dir = write_checkpoint(
        tmp_path,
        model,
        tensor_size=tensor_size,
        pipeline_size=pipeline_size,
        per_head=commit == PINNED_COMMIT,
        has_pipeline_module=has_pipeline_module,
    )
    write_golden_logits(step_dir, model, commit=commit)
    result = run_export(step_dir, tmp_path / "hf")
    exported, original = load_file(tmp_path / "hf" / "model.safetensors"), model.state_dict()
    assert set(exported) == set(original) - {"lm_head.weight"}
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name][:VOCAB_SIZE] if name == "transformer.wte.weight" else original[name])
    assert result.dtype == "float32" and result.tensors == len(exported)
    assert result.parameters == sum(tensor.numel() for tensor in exported.values())
    assert f"TP {tensor_size} x PP {pipeline_size}" in result.source and commit[:8] in result.source


def test_the_exported_folder_computes_the_same_logits(tmp_path: Path) -> None:
    model = random_gpt2()
    run_export(write_checkpoint(tmp_path, model), tmp_path / "hf")
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "hf")(ids).logits, model(ids).logits[..., :VOCAB_SIZE])


@pytest.mark.parametrize(("arguments", "activation"), [
    ({}, "gelu_new"), ({"onnx_safe": True}, "gelu"), ({"openai_gelu": True}, "gelu_new"),
])  # fmt: skip
def test_gelu_follows_the_run(tmp_path: Path, arguments: dict[str, bool], activation: str) -> None:
    run_export(write_checkpoint(tmp_path, random_gpt2(), **arguments), tmp_path / "hf")
    assert load_exported(tmp_path / "hf").config.activation_function == activation


def test_gelu_without_fusion_is_erf() -> None:
    assert configuration.activation(argparse.Namespace(bias_gelu_fusion=False)) == "gelu"


def test_config_comes_from_the_run(tmp_path: Path) -> None:
    run_export(write_checkpoint(tmp_path, random_gpt2()), tmp_path / "hf")
    config = load_exported(tmp_path / "hf").config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_inner) == (2, 4, 32, 64)
    assert (config.n_positions, config.vocab_size, config.layer_norm_epsilon) == (16, VOCAB_SIZE, 1e-5)


@pytest.mark.parametrize("per_head", [True, False])
def test_unknown_commit_is_decided_by_the_golden_logits(tmp_path: Path, per_head: bool) -> None:
    model = random_gpt2()
    step_dir = write_checkpoint(tmp_path, model, per_head=per_head)
    write_golden_logits(step_dir, model, commit="0" * 40)
    result = run_export(step_dir, tmp_path / "hf")
    assert "proven by golden logits" in result.source
    exported = load_file(tmp_path / "hf" / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    assert torch.equal(exported, model.state_dict()["transformer.h.1.attn.c_attn.weight"])


def test_logits_of_neither_order_are_refused(tmp_path: Path) -> None:
    model = random_gpt2()
    step_dir = write_checkpoint(tmp_path, model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(-1)
    write_golden_logits(step_dir, model)
    with pytest.raises(VerificationError, match="neither order of query, key and value"):
        run_export(step_dir, tmp_path / "hf")


def test_without_any_record_the_old_order_is_assumed_and_said(tmp_path: Path) -> None:
    result = run_export(write_checkpoint(tmp_path, random_gpt2()), tmp_path / "hf")
    assert "assumed: neither commit nor golden logits are recorded" in result.source


def test_commit_is_found_in_the_runs_manifest(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path / "checkpoint" / "job", random_gpt2())
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "job.json").write_text('{"step": "x", "results": {"engine_commit": "abc"}}')
    assert qkv_layout.recorded_commit(step_dir) == "abc"


def test_door_knows_this_kind_and_its_weights(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    assert kind.detect(step_dir).kind == kind.MEGATRON
    assert dict(weights(step_dir, vocab_size=VOCAB_SIZE))["transformer.wte.weight"].shape == (VOCAB_SIZE, 32)


class Malicious:
    """A pickle that runs a command on loading."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "layer_02-model_01-model_states.pt"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    torch.save({"args": Malicious(tmp_path / "it-ran")}, step_dir / name)
    with pytest.raises(UserError, match=r"names (posix|nt)\.system, which no checkpoint"):
        run_export(step_dir, tmp_path / "hf")
    assert not (tmp_path / "it-ran").exists()


def test_random_states_and_upstreams_own_classes_are_read_without_upstream(tmp_path: Path) -> None:
    import sys
    import types

    import numpy

    module = types.ModuleType("megatron.core.enums")
    module.ModelType = type("ModelType", (), {"__module__": "megatron.core.enums", "__qualname__": "ModelType"})
    parents = {name: types.ModuleType(name) for name in ("megatron", "megatron.core")}
    sys.modules.update(parents | {"megatron.core.enums": module})
    try:
        state = {"rng": [numpy.random.get_state(), numpy.float64(0.5)], "kind": module.ModelType(), "n": 3}
        torch.save(state, tmp_path / "state.pt")
    finally:
        for name in (*parents, "megatron.core.enums"):
            del sys.modules[name]
    loaded = reader.load(tmp_path / "state.pt")
    assert loaded["n"] == 3 and isinstance(loaded["kind"], reader.Inert)
    assert loaded["rng"][0][1].dtype == numpy.uint32


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_03-model_00-model_states.pt"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    (step_dir / name).unlink()
    with pytest.raises(UserError, match=f"is not whole: 1 files of its layout are missing, first {name}"):
        run_export(step_dir, tmp_path / "hf")


def test_missing_first_file_is_named(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    (step_dir / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"mp_rank_00_model_states\.pt is missing"):
        run_export(step_dir, tmp_path / "hf")


@pytest.mark.parametrize("kept", [0, 100, 2000])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    file = step_dir / "layer_02-model_01-model_states.pt"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"layer_02-model_01-model_states\.pt is (truncated or )?damaged"):
        run_export(step_dir, tmp_path / "hf")


def test_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    torch.save({"weights": 1}, step_dir / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="does not hold the run's arguments"):
        run_export(step_dir, tmp_path / "hf")


def test_old_checkpoint_version_is_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    state = read_first(step_dir)
    torch.save(state | {"checkpoint_version": 1.0}, step_dir / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"checkpoint version 1\.0"):
        run_export(step_dir, tmp_path / "hf")


def test_whole_file_without_a_gpt_is_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2(), tensor_size=1, has_pipeline_module=False)
    state = read_first(step_dir)
    state["module"]["language_model"].pop("encoder")
    torch.save(state, step_dir / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="does not hold a GPT model"):
        run_export(step_dir, tmp_path / "hf")


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2(), tensor_size=1)
    file = step_dir / "layer_02-model_00-model_states.pt"
    torch.save(torch.load(file, weights_only=True) | {"mlp.gate.weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"holds mlp\.gate\.weight, which a GPT-2 does not have"):
        run_export(step_dir, tmp_path / "hf")


def test_ranks_that_drifted_apart_are_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    file = step_dir / "layer_03-model_01-model_states.pt"
    layer = torch.load(file, weights_only=True)
    layer["input_layernorm.weight"][3] += 0.5
    torch.save(layer, file)
    with pytest.raises(
        VerificationError, match=r"input_layernorm\.weight differs between tensor ranks 0 and 1 by 0\.5"
    ):
        run_export(step_dir, tmp_path / "hf")


def test_ranks_with_different_names_are_refused() -> None:
    with pytest.raises(VerificationError, match="do not hold the same tensors: b"):
        merge.layer_names([{"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}])


def test_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    with pytest.raises(UserError, match="the tokenizer has 65 pieces, the model 64 embedding rows"):
        run_export(step_dir, tmp_path / "hf", vocab_size=65)


def test_longer_sequences_than_positions_are_refused(tmp_path: Path) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2())
    with pytest.raises(UserError, match="17 is more than the 16 positions"):
        run_export(step_dir, tmp_path / "hf", length=17)


LLAMA = {"use_rotary_position_embeddings": True, "swiglu": True, "normalization": "rmsnorm"}


@pytest.mark.parametrize(("arguments", "family", "wrong"), [
    ({"swiglu": True}, "GPT-2", "swiglu is True"), ({"normalization": "rmsnorm"}, "GPT-2", "normalization is rmsnorm"),
    ({"apply_layernorm_1p": True}, "GPT-2", "apply_layernorm_1p is True"),
    ({"num_key_value_heads": 2}, "GPT-2", "num_key_value_heads is 2"),
    ({"num_experts": [4]}, "GPT-2", "num_experts is"),
    (LLAMA | {"normalization": "layernorm"}, "Llama", "normalization is layernorm"),
    (LLAMA | {"rotary_percent": 0.5}, "Llama", "rotary_percent is 0.5"),
])  # fmt: skip
def test_other_shapes_are_refused(tmp_path: Path, arguments: dict[str, object], family: str, wrong: str) -> None:
    step_dir = write_checkpoint(tmp_path, random_gpt2(), **arguments)
    with pytest.raises(UserError, match=f"not a {family} \\({wrong}"):
        run_export(step_dir, tmp_path / "hf")


REAL_CHECKPOINT = Path(__file__).parent / "megatron_tp2_pp2" / "global_step8"  # made by engine/megatron_tiny_run.py


def golden_distance(folder: Path, **changes: object) -> float:
    """Largest difference to the real engine's own logits, relative to the largest of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    golden = load_file(REAL_CHECKPOINT / "golden_logits.safetensors")
    config = AutoConfig.from_pretrained(folder, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    expected = golden["logits"][..., : logits.shape[-1]]
    return float((logits - expected).abs().max() / expected.abs().max())


def test_a_real_checkpoint_gives_the_engines_own_logits(tmp_path: Path) -> None:
    result = run_export(REAL_CHECKPOINT, tmp_path / "hf", vocab_size=120, length=32)
    assert f"TP 2 x PP 2, pipeline form), query-key-value order per head (of engine commit {PINNED_COMMIT[:8]})" in (
        result.source
    )
    assert golden_distance(tmp_path / "hf") < 1e-5
    assert golden_distance(tmp_path / "hf", activation_function="gelu") > 5e-5  # the wrong GELU would show


def test_a_real_checkpoint_shows_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(qkv_layout._BY_COMMIT, PINNED_COMMIT, merge.PER_RANK)
    run_export(REAL_CHECKPOINT, tmp_path / "hf", vocab_size=120, length=32)
    assert golden_distance(tmp_path / "hf") > 1e-2


def test_a_real_checkpoint_of_an_unknown_commit_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qkv_layout, "_BY_COMMIT", {})
    result = run_export(REAL_CHECKPOINT, tmp_path / "hf", vocab_size=120, length=32)
    assert "order per head (proven by golden logits" in result.source


def test_a_checkpoint_of_the_other_engine_under_zero_is_no_job_folder(tmp_path: Path) -> None:
    step_dir = tmp_path / "global_step4"
    (step_dir / "global_step4").mkdir(parents=True)  # DeepSpeed's own, with a `latest` beside it
    (step_dir / "latest").write_text("global_step4")
    (step_dir / "model.safetensors").touch()
    (tmp_path / "latest").write_text("global_step4")
    assert kind.resolve(step_dir)[0] == kind.resolve(tmp_path)[0] == step_dir
