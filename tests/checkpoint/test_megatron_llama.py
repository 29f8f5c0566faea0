"""Llama's shape out of Megatron-DeepSpeed: the real engine's own logits, and what every mistake would cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint import verify
from train.checkpoint.megatron import merge, qkv_layout
from train.checkpoint.megatron.export import export
from train.checkpoint.megatron.merge import PER_HEAD, PER_RANK, Layout, cut, join
from train.checkpoint.safetensors_folder import SafetensorsFolder
from train.checkpoint.streamed_model import compute_logits
from train.checkpoint.verify import read_golden_logits
from train.engine.megatron_deepspeed.checkout import PINNED_COMMIT

REAL = Path(__file__).parent / "megatron_llama_tp2" / "global_step8"  # made by engine/megatron_tiny_run.py
VOCABULARY = 120
Read = Callable[[str], torch.Tensor]


def exported(folder: Path, step_dir: Path = REAL) -> Path:
    folder.mkdir()
    export(step_dir, folder, vocab_size=VOCABULARY, model_max_length=32)
    return folder


def distance(folder: Path, change: Callable[[Read, str], torch.Tensor] | None = None, **config_changes: Any) -> float:
    """To the engine's own logits, relative to the largest of them; of the folder, or of one with a mistake."""
    from transformers import AutoConfig

    stored = SafetensorsFolder(folder)
    input_ids, golden, _ = read_golden_logits(REAL / "golden_logits.safetensors")
    config = AutoConfig.from_pretrained(folder, **config_changes)
    read = stored.read if change is None else lambda name: change(stored.read, name)
    logits = compute_logits(config, input_ids, stored.names, read)
    golden = golden[..., : logits.shape[-1]]
    return float((logits - golden).abs().max() / golden.abs().max())


def test_the_engines_own_logits(tmp_path: Path) -> None:
    folder = exported(tmp_path / "hf")
    assert distance(folder) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["rope_parameters"]["rope_theta"] == 50.0
    assert (config["num_key_value_heads"], config["rms_norm_eps"], config["vocab_size"]) == (4, 1e-4, VOCABULARY)
    assert config["tie_word_embeddings"] is False and config["attention_bias"] is False


def _gate_is_up(read: Read, name: str) -> torch.Tensor:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    part = name.split(".")[-2]
    return read(name.replace(part, other.get(part, part)))


def _glued(read: Read, name: str) -> torch.Tensor:
    """Gate and up as gluing the ranks' slices together would have them: [gate 0 | up 0 | gate 1 | up 1] in halves."""
    if "gate_proj" not in name and "up_proj" not in name:
        return read(name)
    gates = read(name.replace("up_proj", "gate_proj")).chunk(2)
    ups = read(name.replace("gate_proj", "up_proj")).chunk(2)
    return torch.cat((gates[0], ups[0], gates[1], ups[1])).chunk(2)["up_proj" in name]


def _keys_are_values(read: Read, name: str) -> torch.Tensor:
    return read(name.replace("k_proj", "#").replace("v_proj", "k_proj").replace("#", "v_proj"))


def _head_is_embedding(read: Read, name: str) -> torch.Tensor:
    return read("model.embed_tokens.weight" if name == "lm_head.weight" else name)


@pytest.mark.parametrize("mistake", [_gate_is_up, _glued, _keys_are_values, _head_is_embedding])
def test_a_mistake_in_the_weights_would_show(tmp_path: Path, mistake: Callable[[Read, str], torch.Tensor]) -> None:
    assert distance(exported(tmp_path / "hf"), mistake) > 1e-2


@pytest.mark.parametrize(("name", "value"), [
    ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}), ("rms_norm_eps", 1e-5),
])  # fmt: skip
def test_a_mistake_in_the_configuration_would_show(tmp_path: Path, name: str, value: Any) -> None:
    assert distance(exported(tmp_path / "hf"), **{name: value}) > 1e-4


def test_the_other_order_of_query_key_and_value_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(qkv_layout._BY_COMMIT, PINNED_COMMIT, merge.PER_RANK)
    assert distance(exported(tmp_path / "hf")) > 1e-2


def test_an_unknown_commit_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qkv_layout, "_BY_COMMIT", {})
    (tmp_path / "hf").mkdir()
    result = export(REAL, tmp_path / "hf", vocab_size=VOCABULARY, model_max_length=32)
    assert "order per head (proven by golden logits" in result.source


def test_shards_hold_what_one_file_does(tmp_path: Path) -> None:
    whole = load_file(exported(tmp_path / "hf") / "model.safetensors")
    (tmp_path / "shards").mkdir()
    export(REAL, tmp_path / "shards", vocab_size=VOCABULARY, model_max_length=32, shard_bytes=10_000)
    stored = SafetensorsFolder(tmp_path / "shards")
    assert len(set(stored.files.values())) > 2 and set(stored.names) == set(whole)
    assert all(torch.equal(stored.read(name), whole[name]) for name in whole)


BF16 = Path(__file__).parent / "megatron_tp2_dp2_zero1_bf16" / "global_step8"  # its initial weights are as large


def check_bf16(
    folder: Path, change: Callable[[Read, str], torch.Tensor] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What verification says of an export of `BF16`, or of one with a mistake."""
    from types import SimpleNamespace

    from transformers import AutoConfig

    stored: Any = SafetensorsFolder(folder)
    if change is not None:
        right = SafetensorsFolder(folder)
        stored.read = lambda name: change(right.read, name)
    model = SimpleNamespace(config=AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    problems: list[str] = []
    source = verify.Source(golden_logits=BF16 / "golden_logits.safetensors")
    return verify._check_logits(model, stored, source, problems), problems


def test_rounding_in_bf16_is_measured_where_large_weights_make_more_of_it(tmp_path: Path) -> None:
    record, problems = check_bf16(exported(tmp_path / "hf", BF16))
    assert problems == []
    assert record["relative_difference"] > verify.LOGITS_TOLERANCE["bfloat16"]  # or this test would show nothing
    assert record["tolerance"] == min(2 * record["rounding"], 0.25)
    assert record["tolerance_is"] == verify.ROUNDING_MEASURE


@pytest.mark.parametrize("mistake", [_gate_is_up, _glued, _keys_are_values])
def test_rounding_excuses_no_mistake(tmp_path: Path, mistake: Callable[[Read, str], torch.Tensor]) -> None:
    record, problems = check_bf16(exported(tmp_path / "hf", BF16), mistake)
    assert record["tolerance"] <= 0.25
    assert len(problems) == 1 and "the logits differ from the training process's own" in problems[0]


@pytest.mark.parametrize("order", [PER_HEAD, PER_RANK])
@pytest.mark.parametrize(("name", "rows"), [
    ("self_attention.query_key_value.weight", (16, 8, 8)), ("mlp.dense_h_to_4h.weight", (12, 12)),
    ("mlp.dense_4h_to_h.weight", (6,)), ("self_attention.dense.weight", (6,)), ("input_layernorm.weight", (5,)),
])  # fmt: skip
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cutting_and_joining_are_each_others_reverse(order: str, name: str, rows: tuple[int, ...], ranks: int) -> None:
    layout = Layout(heads=8, groups=4, order=order, gated=True)
    parts = [torch.randn(count, 8) for count in rows]
    slices = [cut(name, parts, rank=rank, ranks=ranks, layout=layout) for rank in range(ranks)]
    for number, part in enumerate(parts):
        assert torch.equal(join(name, slices, parts=(number,), layout=layout), part)
    if "dense.weight" not in name and "4h_to_h" not in name:
        assert torch.equal(join(name, slices, parts=range(len(parts)), layout=layout), torch.cat(parts))


def test_the_order_per_head_is_groups_of_queries_key_and_value() -> None:
    """Written out for 4 queries and 2 keys, one number a head: what upstream's `split_tensor` takes apart."""
    layout = Layout(heads=4, groups=2, order=PER_HEAD)
    parts = [torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])]
    name = "self_attention.query_key_value.bias"
    assert cut(name, parts, rank=0, ranks=1, layout=layout).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert cut(name, parts, rank=1, ranks=2, layout=layout).tolist() == [2, 3, 11, 21]
    per_rank = Layout(heads=4, groups=2, order=PER_RANK)
    assert cut(name, parts, rank=1, ranks=2, layout=per_rank).tolist() == [2, 3, 11, 21]
    assert cut(name, parts, rank=0, ranks=1, layout=per_rank).tolist() == [0, 1, 2, 3, 10, 11, 20, 21]
