"""A checkpoint in DeepSpeed's universal form holds every parameter whole; what cannot be reshaped is refused.

That a run goes on from it with the same losses is shown with the engine itself: tests/engine/test_megatron_resume.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.checkpoint.megatron import parameters, reader, reshape, universal
from train.checkpoint.megatron.parameters import Cut
from train.checkpoint.megatron.reshape import Target
from train.checkpoint.megatron.saved_layout import SavedLayout, read_layout
from train.errors import UserError, VerificationError

HERE = Path(__file__).parent
AS_SAVED, ONE = Target(2, 1, 2), Target(1, 1, 1)


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    """A Llama shape with grouped queries, saved in TP2 x DP2, ZeRO-1, bf16."""
    return Path(shutil.copytree(HERE / "megatron_tp2_dp2_zero1_bf16" / "global_step8", tmp_path / "global_step8"))


@pytest.fixture
def plain_dir(tmp_path: Path) -> Path:
    """A GPT, saved in TP2 x PP2, without ZeRO."""
    return Path(shutil.copytree(HERE / "megatron_tp2_pp2" / "global_step8", tmp_path / "b" / "global_step8"))


def whole(folder: Path, name: str) -> dict[str, Any]:
    return dict(torch.load(folder / "zero" / name / "fp32.pt", weights_only=True))


def test_every_parameter_is_whole_and_cut_where_the_ranks_cut_it(step_dir: Path) -> None:
    folder = step_dir.with_name("whole")
    universal.convert(step_dir, folder, source="x")
    names = {path.name for path in (folder / "zero").iterdir() if path.is_dir()}
    assert len(names) == 15 and all(
        sorted(file.name for file in (folder / "zero" / name).iterdir())
        == ["exp_avg.pt", "exp_avg_sq.pt", "fp32.pt", "step.pt"]
        for name in names
    )
    for number in range(1, 6):
        ranks = [reader.load(step_dir / f"layer_{number:02}-model_{rank:02}-model_states.pt") for rank in (0, 1)]
        for name in ranks[0]:
            record, slices = whole(folder, f"{number}.{name}"), [weights[name] for weights in ranks]
            if name == "mlp.dense_h_to_4h.weight":  # gate of both ranks, then up of both
                expected = torch.cat([slices[0][:16], slices[1][:16], slices[0][16:], slices[1][16:]])
                assert record["param_n_sub_params"] == 2
            elif parameters.cut_of(name, gated=True) is Cut.NONE:
                expected = slices[0]
                assert "cat_dim" not in record
            else:
                expected = torch.cat(slices, dim=record["cat_dim"])
                assert record["cat_dim"] == int(name in ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"))
            # 32 bits, of which the weights are the roundings; the vocabulary keeps its padding
            assert record["param"].dtype == torch.float32 and torch.equal(record["param"].bfloat16(), expected), name
    assert whole(folder, "1.word_embeddings.weight")["param"].shape == (256, 16)
    assert float(torch.load(folder / "zero" / "4.weight" / "step.pt", weights_only=True)) == 8
    shared = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=True)
    assert [group["weight_decay"] for group in shared["param_groups"]] == [0.1, 0.0] and shared["clip_grad"] == 1.0


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("2.mlp.dense_4h_to_h.weight", Cut.COLUMNS),
        ("language_model.encoder.layers.0.mlp.dense_4h_to_h.weight", Cut.COLUMNS),
        ("2.mlp.dense_4h_to_h.bias", Cut.NONE),
        ("2.mlp.dense_h_to_4h.bias", Cut.ROWS),
        ("tied_modules.embed.word_embeddings.weight", Cut.ROWS),
        ("tied_modules.embed.position_embeddings.weight", Cut.NONE),
        ("language_model.output_layer.weight", Cut.ROWS),
        ("6.lm_head.weight", Cut.ROWS),
        ("5.weight", Cut.NONE),
        ("input_layernorm.weight", Cut.NONE),
    ],
)
def test_names_say_how_a_parameter_is_cut(name: str, cut: Cut) -> None:
    assert parameters.cut_of(name, gated=False) is cut
    gated = Cut.GATED_ROWS if "dense_h_to_4h" in name else cut
    assert parameters.cut_of(name, gated=True) is gated


def test_the_same_layout_needs_no_other_form(step_dir: Path, plain_dir: Path, capsys: Any) -> None:
    assert reshape.prepare_load(step_dir, AS_SAVED).tag == "global_step8"
    assert not universal_of(step_dir).exists() and capsys.readouterr().out == ""
    load = reshape.prepare_load(plain_dir, Target(2, 2, 4))
    assert load.tag == "global_step8" and not load.is_universal
    assert (
        "TP 2 x PP 2 x DP 1, ZeRO 0, goes on in TP 2 x PP 2 x DP 4: ZeRO 0 spreads nothing" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("further", "kept"), [({}, (2, 2)), ({"layers_per_stage": [1, 3]}, (1, 3))])
def test_a_run_keeps_the_stages_that_it_has(
    plain_dir: Path, further: dict[str, Any], kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a run that began before stages were balanced, without a form in which it could go on in others."""
    layout = read_layout(plain_dir)
    said = vars(layout.arguments) | {"num_layers": 4, "padded_vocab_size": 2**20} | further  # 3 1 would be balanced
    layout = dataclasses.replace(layout, arguments=argparse.Namespace(**said))
    monkeypatch.setattr(reshape, "read_layout", lambda _folder: layout)
    load = reshape.prepare_load(plain_dir, Target(2, 2, 1), is_last=True)
    assert (load.tag, load.is_universal, load.layers_per_stage) == ("global_step8", False, kept)
    assert reshape.prepare_load(plain_dir, Target(2, 2, 1, kept)).tag == "global_step8"
    with pytest.raises(UserError, match="cannot go on in TP 2 x PP 2 x DP 1 with --layers_per_stage 3 1: without ZeRO"):
        reshape.prepare_load(plain_dir, Target(2, 2, 1, (3, 1)))


def test_stages_that_nothing_tells_take_the_other_form(step_dir: Path) -> None:
    layout = read_layout(step_dir)
    said = vars(layout.arguments) | {"num_layers": 5, "pipeline_model_parallel_size": 2}
    layout = dataclasses.replace(layout, pipeline_parallel_size=2, arguments=argparse.Namespace(**said))
    assert reshape.needs_universal(layout, Target(2, 2, 2))
    assert not reshape.needs_universal(
        dataclasses.replace(layout, arguments=argparse.Namespace(**said, layers_per_stage=[4, 1])), Target(2, 2, 2)
    )


def universal_of(step_dir: Path) -> Path:
    return step_dir.with_name("global_step8_universal")


def test_the_other_form_is_made_once(step_dir: Path, capsys: Any) -> None:
    load = reshape.prepare_load(step_dir, Target(1, 2, 4))
    assert (load.tag, load.is_universal, load.vocabulary_divisor) == ("global_step8_universal", True, 256)
    assert "goes on in TP 1 x PP 2 x DP 4: making global_step8_universal" in capsys.readouterr().out
    made = (universal_of(step_dir) / "source.txt").stat().st_mtime_ns
    assert reshape.prepare_load(step_dir, ONE).tag == load.tag
    assert "which is there already" in capsys.readouterr().out
    assert (universal_of(step_dir) / "source.txt").stat().st_mtime_ns == made
    (step_dir / "files.json").write_text((step_dir / "files.json").read_text() + "\n")  # trained again
    reshape.prepare_load(step_dir, ONE)
    assert (universal_of(step_dir) / "source.txt").stat().st_mtime_ns > made


def test_a_conversion_that_fails_leaves_nothing(step_dir: Path) -> None:
    (step_dir / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match="truncated or damaged"):
        reshape.prepare_load(step_dir, ONE)
    assert [path.name for path in step_dir.parent.iterdir() if path.is_dir()] == ["global_step8"]


def test_replicas_that_differ_are_refused(step_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "cut_of", lambda name, gated: Cut.NONE)
    with pytest.raises(VerificationError, match=r"differs between tensor ranks 0 and 1 by .* no other layout"):
        universal.convert(step_dir, universal_of(step_dir), source="x")
    assert not universal_of(step_dir).exists()


@pytest.mark.parametrize(
    ("changes", "target", "reason"),
    [
        ({"zero_stage": 0}, Target(1, 2, 1), "without ZeRO the optimizer state has no universal form"),
        ({"zero_stage": 3}, Target(1, 2, 1), "ZeRO 3 is not reshaped"),
        ({"num_experts": [4]}, Target(2, 1, 1), "it has experts"),
        (
            {"folder": Path("/nowhere")},
            ONE,
            r"engine commit \(not recorded\) is not known to keep query, key and value",
        ),
        ({"padded_vocab_size": 252}, Target(8, 1, 1), "its 252 vocabulary rows do not divide by 8 tensor ranks"),
    ],
)
def test_what_cannot_be_reshaped_says_why(step_dir: Path, changes: dict[str, Any], target: Target, reason: str) -> None:
    layout = read_layout(step_dir)
    own = {field.name for field in dataclasses.fields(SavedLayout)}
    said = vars(layout.arguments) | {name: value for name, value in changes.items() if name not in own}
    changed = {name: value for name, value in changes.items() if name in own}
    layout = dataclasses.replace(layout, arguments=argparse.Namespace(**said), **changed)
    (found,) = reshape.why_not(layout, target)
    assert re.search(reason, found)


def test_an_optimizer_state_without_places_is_told(step_dir: Path) -> None:
    file = step_dir / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {}}, file)
    with pytest.raises(UserError, match=f"{file.name} does not say where its parameters lie"):
        universal.convert(step_dir, step_dir.with_name("u"), source="x")
    assert not step_dir.with_name("u").exists()


def test_a_refusal_names_checkpoint_and_both_layouts(plain_dir: Path) -> None:
    with pytest.raises(
        UserError, match=r"was saved in TP 2 x PP 2 x DP 1, ZeRO 0 and cannot go on in TP 1 x PP 1 x DP 1"
    ):
        reshape.prepare_load(plain_dir, ONE)


def test_a_run_that_is_over_is_not_reshaped(step_dir: Path) -> None:
    assert reshape.prepare_load(step_dir, AS_SAVED, is_last=True).tag == "global_step8"
    with pytest.raises(
        UserError, match="cannot go on in TP 1 x PP 1 x DP 1: the run is over, nothing is left to train"
    ):
        reshape.prepare_load(step_dir, ONE, is_last=True)
    assert not universal_of(step_dir).exists()


def test_a_full_disk_is_told_before_anything_is_written(step_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the universal form of global_step8 needs"):
        reshape.prepare_load(step_dir, ONE)
    assert not universal_of(step_dir).exists()


def test_the_embedding_keeps_its_rows(step_dir: Path) -> None:
    layout = read_layout(step_dir)  # 120 pieces, padded to 256 by two tensor ranks
    assert [reshape.vocabulary_divisor(layout, size) for size in (1, 2, 4)] == [256, None, 64]
    once_reshaped = dataclasses.replace(
        layout,
        tensor_parallel_size=1,
        arguments=argparse.Namespace(**vars(layout.arguments) | {"make_vocab_size_divisible_by": 256}),
    )
    assert [reshape.vocabulary_divisor(once_reshaped, size) for size in (1, 2)] == [256, 128]
