"""The same run in another layout is not another run; its record tells of every layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from train import run_identity, settings
from train.cluster.allocation import Allocation
from train.errors import UserError
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

WORDS = ["--num_layers", "4", "--hidden_size", "64", "--num_attention_heads", "4", "--global_batch_size", "8", "--lr",
         "1e-3", "--train_tokens", "1M", "--input_tokenizer_file", "t", "--data_path", "d", "--output_model_dir", "o",
         "--job_name", "job"]  # fmt: skip
OTHER_LAYOUT = ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "2", "--micro_batch_size", "2"]


def identity(*words: str, engine: str = "megatron-deepspeed", processes: int = 4) -> dict[str, Any]:
    recipe = settings.parse(PretrainRecipe, [*WORDS, *words], program="p", description="").resolved()
    return run_identity.build(recipe, engine, Allocation(("host",), processes, "cpu", "for the test"), [])


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    """A run with a checkpoint."""
    found = RunFolder(tmp_path, "job")
    found.step_dir(4).mkdir(parents=True)
    found.identity.parent.mkdir()
    return found


def begin(run_folder: RunFolder, record: dict[str, Any]) -> None:
    run_folder.identity.write_text(json.dumps(run_identity.with_stretches(record, [{"after_step": 0}])))


def test_megatron_goes_on_in_another_layout(run_folder: RunFolder) -> None:
    begin(run_folder, identity())
    run_identity.check(run_folder, identity(*OTHER_LAYOUT, processes=8))


@pytest.mark.parametrize("engine", ["megatron-deepspeed", "transformers"])
def test_how_it_is_computed_may_change(run_folder: RunFolder, engine: str) -> None:
    begin(run_folder, identity("--activation_checkpoint", "False", "--torch_compile", "False", engine=engine))
    run_identity.check(run_folder, identity(engine=engine))
    run_identity.check(run_folder, identity("--activation_checkpoint", "True", engine=engine))


def test_another_version_of_the_engine_is_refused(run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """6acc370a's weights under 4efb479d: query, key and value are read in another order, and the loss jumps."""
    monkeypatch.setattr(run_identity.choose, "commit", lambda _engine: "6acc370a")
    began = identity()
    begin(run_folder, began)
    run_identity.check(run_folder, identity())
    monkeypatch.setattr(run_identity.choose, "commit", lambda _engine: "4efb479d")
    with pytest.raises(UserError, match=r"holds another run .engine_commit: '6acc370a' there, '4efb479d' now"):
        run_identity.check(run_folder, identity())
    del began["engine_commit"]  # as versions before this one recorded it
    begin(run_folder, began)
    run_identity.check(run_folder, identity())


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--zero_stage", "1"], "parallel zero_stage: 0 there, 1 now"),
        (["--no_pipeline_parallel", "True"], "parallel no_pipeline_parallel: False there, True now"),
        (["--global_batch_size", "16"], "training global_batch_size: 8 there, 16 now"),
        (["--seed", "7"], "training seed: 1234 there, 7 now"),
    ],
)
def test_another_run_is_refused_in_any_layout(run_folder: RunFolder, words: list[str], difference: str) -> None:
    begin(run_folder, identity())
    with pytest.raises(UserError, match=f"holds another run .{difference}"):
        run_identity.check(run_folder, identity(*words, *OTHER_LAYOUT))


def test_the_transformers_engine_keeps_its_layout(run_folder: RunFolder) -> None:
    begin(run_folder, identity("--zero_stage", "1", engine="transformers", processes=2))
    with pytest.raises(UserError, match="processes: 2 there, 4 now"):
        run_identity.check(run_folder, identity("--zero_stage", "1", engine="transformers", processes=4))


@pytest.mark.parametrize("engine", ["transformers", "megatron-deepspeed"])
def test_a_run_begun_before_there_was_a_setting_goes_on(run_folder: RunFolder, engine: str) -> None:
    began = identity(engine=engine)
    del began["settings"]["parallel"]["layers_per_stage"], began["settings"]["parallel"]["no_pipeline_parallel"]
    begin(run_folder, began)
    run_identity.check(run_folder, identity(engine=engine))
    with pytest.raises(UserError, match="no_pipeline_parallel: None there, True now"):
        run_identity.check(run_folder, identity("--no_pipeline_parallel", "True", engine=engine))


def test_checkpoints_that_nobody_began_are_refused(run_folder: RunFolder) -> None:
    with pytest.raises(UserError, match="holds checkpoints that no run here has begun"):
        run_identity.check(run_folder, identity())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"engine": 1}'])
def test_a_damaged_record_is_told(run_folder: RunFolder, text: str) -> None:
    run_folder.identity.write_text(text)
    with pytest.raises(UserError, match="is damaged, so nothing tells which run"):
        run_identity.check(run_folder, identity())


def test_each_stretch_has_its_layout() -> None:
    first, second = {"world_size": 4}, {"world_size": 1}
    found = run_identity.stretches(None, first, 0)
    assert found == [{"after_step": 0, "world_size": 4}]
    found = run_identity.stretches({"stretches": found}, first, 4)
    assert found == [{"after_step": 0, "world_size": 4}]
    found = run_identity.stretches({"stretches": found}, second, 8)
    assert found == [{"after_step": 0, "world_size": 4}, {"after_step": 8, "world_size": 1}]
    # stepped back: what was trained after step 4 is trained again
    assert run_identity.stretches({"stretches": found}, second, 4) == [
        {"after_step": 0, "world_size": 4},
        {"after_step": 4, "world_size": 1},
    ]
    assert run_identity.stretches({}, second, 4) == [{"after_step": 4, "world_size": 1}]


def test_without_checkpoints_any_run_may_begin(tmp_path: Path) -> None:
    run_identity.check(dataclasses.replace(RunFolder(tmp_path, "job")), identity())


@pytest.mark.parametrize(("asked", "may"), [("auto", True), ("transformers", True), ("megatron-deepspeed", False)])
def test_a_finished_run_is_of_the_engine_that_trained_it(asked: str, may: bool) -> None:
    recipe = settings.parse(PretrainRecipe, [*WORDS, "--engine", asked], program="p", description="")
    found = run_identity.may_differ_when_done(recipe, "transformers")
    assert (("parallel", "engine") in found) == may
    assert ("logging",) in found and ("parallel", "tensor_parallel_size") not in found
