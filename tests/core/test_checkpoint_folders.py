"""A global_stepN folder is whole, or has another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import checkpoint_folders


def test_checkpoint_is_published_by_a_rename(tmp_path: Path) -> None:
    unfinished = tmp_path / ".global_step4.unfinished-save"
    unfinished.mkdir()
    (unfinished / "new").touch()
    assert list(checkpoint_folders.whole_checkpoints(tmp_path)) == []
    checkpoint_folders.publish(unfinished, tmp_path / "global_step4")
    assert [step for step, _ in checkpoint_folders.whole_checkpoints(tmp_path)] == [4] and (
        tmp_path / "latest"
    ).read_text() == "global_step4"


def test_step_that_is_trained_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    unfinished = tmp_path / ".global_step4.unfinished-save"
    for file in (tmp_path / "global_step4" / "old", unfinished / "new"):
        file.parent.mkdir()
        file.touch()
    checkpoint_folders.publish(unfinished, tmp_path / "global_step4")
    assert sorted(file.name for file in (tmp_path / "global_step4").iterdir()) == ["files.json", "new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["global_step4", "latest"]


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".global_step4.unfinished-save").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "global_step2").mkdir()
    checkpoint_folders.remove_leftovers(tmp_path)
    checkpoint_folders.remove_leftovers(tmp_path / "not there")
    assert [file.name for file in tmp_path.iterdir()] == ["global_step2"]


@pytest.mark.parametrize(("keep_last", "kept"), [(0, [2, 10, 9]), (1, [10]), (2, [9, 10]), (5, [2, 9, 10])])
def test_newest_checkpoints_are_kept(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"global_step{step}").mkdir()
    checkpoint_folders.prune(tmp_path, keep_last)
    assert sorted(step for step, _ in checkpoint_folders.whole_checkpoints(tmp_path)) == sorted(kept)


def test_weights_are_readable_by_the_team(tmp_path: Path) -> None:
    """safetensors writes files that only their owner can read; a cluster's checkpoints are shared."""
    unfinished = tmp_path / "checkpoint-4"
    unfinished.mkdir()
    (unfinished / "model.safetensors").touch(mode=0o600)
    checkpoint_folders.publish(unfinished, tmp_path / "global_step4")
    (tmp_path / "other").touch()
    assert (tmp_path / "global_step4" / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_is_set_aside_is_no_checkpoint_any_more_and_stays(tmp_path: Path) -> None:
    for name in ("global_step4.damaged", "global_step4.damaged-2"):
        (tmp_path / "global_step4").mkdir()
        (tmp_path / "global_step4" / name).touch()
        assert checkpoint_folders.set_aside(tmp_path / "global_step4") == tmp_path / name
        checkpoint_folders.remove_leftovers(tmp_path)
        assert (tmp_path / name / name).exists() and list(checkpoint_folders.whole_checkpoints(tmp_path)) == []


def test_the_form_for_other_layouts_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    step_dir = tmp_path / "global_step4"
    checkpoint_folders.universal_dir(step_dir).mkdir(parents=True)
    assert list(checkpoint_folders.whole_checkpoints(tmp_path)) == []
    checkpoint_folders.remove_universal(tmp_path, keep=checkpoint_folders.universal_dir(step_dir))
    assert checkpoint_folders.universal_dir(step_dir).is_dir()
    checkpoint_folders.prune(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
