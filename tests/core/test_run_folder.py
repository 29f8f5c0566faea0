"""The run folder knows its files; only whole checkpoints count."""

from __future__ import annotations

import json

from train import checkpoint_folders, run_folder
from train.run_folder import RunFolder


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    run = RunFolder(tmp_path, "job")
    for name in ("global_step9", "global_step10", "checkpoint-11", "global_step12.part", "global_stepx"):
        (run.checkpoint_dir / name).mkdir(parents=True)
    (run.checkpoint_dir / "global_step99").write_text("a file is no checkpoint")
    assert [step for step, _ in checkpoint_folders.whole_checkpoints(run.checkpoint_dir)] == [9, 10]
    assert run.latest_step() == 10


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert RunFolder(tmp_path, "job").latest_step() is None


def test_a_checkpoint_knows_its_run(tmp_path):
    run = RunFolder(tmp_path, "job")
    assert run_folder.of_checkpoint(run.step_dir(3)) == run
    assert run_folder.of_checkpoint(tmp_path / "elsewhere" / "global_step3") is None


def test_a_metrics_line_that_is_being_written_is_left_out(tmp_path):
    run = RunFolder(tmp_path, "job")
    run.metrics.parent.mkdir()
    run.metrics.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1}]
    assert RunFolder(tmp_path, "other").read_metrics() == []
