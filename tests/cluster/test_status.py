"""The status of a run: from its files, from the scheduler, and from neither."""

from __future__ import annotations

import fcntl
import json
import os
import time

import pytest

from train import manifest, outcome, run_facts, settings, status
from train.cluster import queue
from train.cluster.job_folder import JobFolder, JobRecord
from train.cluster.queue import JobState
from train.errors import UserError
from train.finetune.folder import FinetuneFolder, checkpoint_mark
from train.finetune.settings import FinetuneSettings
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder
from train.status import StatusSettings


def pretraining(root, name="gpt", *, steps=50, interval=10, seconds_ago=30.0) -> RunFolder:
    """A run of 100 steps of 2,048 tokens, 50 of them done at 1,024 tokens a second."""
    plain = {
        "data": {"input_tokenizer_file": "t.model", "data_path": ["d"]},
        "training": {"train_tokens": 204800, "global_batch_size": 8, "lr": 1e-3},
        "checkpoint": {"output_model_dir": str(root), "job_name": name},
        "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "sequence_length": 256},
    }
    run = RunFolder(root, name)
    for file in (run.recipe, run.metrics):
        file.parent.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(settings.to_yaml(settings.build(PretrainRecipe, plain).resolved()))
    lines = [
        {"step": step, "tokens": step * 2048, "loss": 9 - step / 10, "tokens_per_second": 1024.0}
        for step in range(interval, steps + 1, interval)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    age(run.metrics, seconds_ago)
    return run


def finetuning(output, **more) -> FinetuneFolder:
    run = FinetuneFolder(output)
    (run.checkpoint_dir / "checkpoint-20").mkdir(parents=True)
    (run.checkpoint_dir / "checkpoint-20" / "trainer_state.json").write_text('{"max_steps": 80}')
    checkpoint_mark(run.checkpoint_dir / "checkpoint-20").touch()
    (run.checkpoint_dir / "checkpoint-30").mkdir()  # killed while it was saved
    plain = settings.build(FinetuneSettings, {"model_name_or_path": "m", "output_dir": str(output), **more})
    run.recipe.write_text(settings.to_yaml(plain))
    run.metrics.write_text('{"step": 20, "tokens": 2000, "loss": 1.5, "tokens_per_second": 50.0}\n{"step": 2')
    return run


def submitted(folder: JobFolder, *ids: str, ended: str = "") -> JobRecord:
    folder.root.mkdir(parents=True, exist_ok=True)
    files = folder.new_files()
    logs = tuple(files.log(job_id) for job_id in ids)
    record = JobRecord("slurm", ids, files.script, None, logs, files.exit_record, "2026-01-01T00:00:00Z")
    folder.write(record)
    if ended:
        files.exit_record.write_text(ended)
    return record


def age(path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def scheduler(monkeypatch) -> dict[str, JobState]:
    """What the scheduler answers, by job; it does not know others."""
    answers: dict[str, JobState] = {}
    monkeypatch.setattr(queue, "ask", lambda _, job_id: answers.get(job_id, JobState(queue.ENDED)))
    return answers


def told(capsys, folder, **more) -> str:
    assert status.status(StatusSettings(folder, **more)) == 0
    return capsys.readouterr().out


def test_a_running_pretraining(tmp_path, capsys, scheduler):
    run = pretraining(tmp_path)
    run.step_dir(40).mkdir(parents=True)
    age(run.step_dir(40), 60)
    submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7")
    scheduler["7"] = JobState(queue.RUNNING, "1:00:00 left")
    text = told(capsys, tmp_path)
    assert text.splitlines()[:2] == ["gpt: running (pretraining)", "  job 7: running (1:00:00 left)"]
    assert "step: 50 of 100 (50%)" in text and "loss: 4.0000, 1,024 tokens/s" in text
    assert "left: about 0:01:40" in text
    assert "checkpoint: global_step40, 0:01:0" in text
    assert "last progress line: 0:00:3" in text and "usually every 0:00:20" in text
    assert "may hang" not in text
    assert f"log: {tmp_path}/job/gpt.7.log" in text


@pytest.mark.parametrize(("seconds_ago", "hangs"), [(250, False), (400, True)])
def test_a_hang_shows(tmp_path, capsys, scheduler, seconds_ago, hangs):
    pretraining(tmp_path, seconds_ago=seconds_ago)
    submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7")
    scheduler["7"] = JobState(queue.RUNNING)
    assert ("warning: nothing was reported for much longer than usual" in told(capsys, tmp_path)) == hangs


def test_without_a_scheduler_the_lock_tells_that_it_runs(tmp_path, capsys):
    run = pretraining(tmp_path)
    with run.lock.open("a") as lock:
        assert "gpt: ended" in told(capsys, tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "gpt: running" in told(capsys, tmp_path)
    assert "gpt: ended" in told(capsys, tmp_path)


def test_how_it_ended_and_why(tmp_path, capsys, scheduler):
    run = pretraining(tmp_path)
    outcome.write(run.outcome, 4, ["the loss became NaN at step 51.\nLower --lr."])
    submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7", "8", ended="7 4\n")
    scheduler["7"] = JobState(queue.ENDED, "FAILED")
    scheduler["8"] = JobState(queue.QUEUED, "DependencyNeverSatisfied")
    text = told(capsys, tmp_path)
    assert "gpt: queued" in text
    assert "job 7: ended (FAILED), exit code 4" in text and "job 8: queued (DependencyNeverSatisfied)\n" in text
    assert "ended with exit code 4:\n    the loss became NaN at step 51.\n    Lower --lr.\n" in text


def test_a_job_that_ended_before_its_ranks_began_shows_its_log(tmp_path, capsys, scheduler):
    record = submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7", ended="7 2\n")
    record.logs[0].write_text("one\ntwo\nerror: --data_path d is not there\n")
    text = told(capsys, tmp_path)
    assert "gpt: ended" in text and "exit code 2" in text
    assert "    | error: --data_path d is not there" in text


def test_a_submitted_run_without_any_other_file(tmp_path, capsys, scheduler):
    submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7")
    scheduler["7"] = JobState(queue.QUEUED, "Priority")
    assert told(capsys, tmp_path).startswith("gpt: queued (pretraining)\n  job 7: queued (Priority)")


def test_where_the_scheduler_cannot_be_asked(tmp_path, capsys, scheduler):
    pretraining(tmp_path)
    submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7")
    scheduler["7"] = JobState(queue.UNKNOWN, "squeue: not found")
    text = told(capsys, tmp_path)
    assert "gpt: not known" in text and "job 7: unknown (squeue: not found)" in text and "step: 50 of 100" in text


def test_a_finished_pretraining(tmp_path, capsys):
    run = pretraining(tmp_path, steps=100)
    outcome.write(run.outcome, 0)
    manifest.write(run.manifest, step="pretrain_model", settings={}, inputs=[], results={}, started=0)
    text = told(capsys, tmp_path)
    assert "gpt: done" in text and "100 of 100 (100%)" in text and "left" not in text and "exit code" not in text


def test_several_runs_of_one_folder(tmp_path, capsys):
    for name in ("a", "b"):
        pretraining(tmp_path, name)
    text = told(capsys, tmp_path)
    assert "a: ended" in text and "b: ended" in text
    assert "a: ended" not in told(capsys, tmp_path, job_name="b")
    (tmp_path / "checkpoint" / "b").mkdir(parents=True)
    assert "a: ended" not in told(capsys, tmp_path / "checkpoint" / "b")


def test_an_unfinished_finetuning(tmp_path, capsys, scheduler):
    output = tmp_path / "chat"
    finetuning(output)
    submitted(JobFolder.of_finetuning(output), "9")
    scheduler["9"] = JobState(queue.RUNNING)
    text = told(capsys, output)
    assert "chat: running (finetuning)" in text and "step: 20 of 80 (25%)" in text
    assert "checkpoint: checkpoint-20, 0:00:0" in text
    assert "left: about 0:02:00" in text


def test_a_finetuning_says_its_own_steps(tmp_path, capsys):
    finetuning(tmp_path / "chat", max_steps=40)
    assert "step: 20 of 40 (50%)" in told(capsys, tmp_path / "chat")


def test_a_finished_finetuning(tmp_path, capsys):
    output = tmp_path / "chat"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 80, "tokens": 8000, "loss": 0.5, "tokens_per_second": 50.0}\n')
    file = output / manifest.FILE_NAME
    manifest.write(file, step="finetune_model", settings={}, inputs=[], results={"steps": 80}, started=0)
    text = told(capsys, output)
    assert "chat: done (finetuning)" in text and "step: 80 of 80" in text


def test_json_for_programs(tmp_path, capsys, scheduler):
    pretraining(tmp_path)
    submitted(JobFolder.of_pretraining(tmp_path, "gpt"), "7")
    scheduler["7"] = JobState(queue.RUNNING)
    (run,) = json.loads(told(capsys, tmp_path, json=True))["runs"]
    assert (run["name"], run["state"], run["step"], run["total_steps"]) == ("gpt", "running", 50, 100)
    assert run["jobs"][0]["job_id"] == "7" and run["seconds_left"] == 100 and run["is_silent"] is False


def test_a_damaged_recipe_costs_only_the_total(tmp_path, capsys):
    run = pretraining(tmp_path)
    run.recipe.write_text("model: 5")
    assert "step: 50\n" in told(capsys, tmp_path)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.touch()])
def test_a_folder_that_is_no_run(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="is no run: name the --output_model_dir"):
        run_facts.find(tmp_path / "x")


def test_a_name_that_is_not_there(tmp_path):
    pretraining(tmp_path)
    with pytest.raises(UserError, match=r"--job_name other: .* has gpt"):
        run_facts.find(tmp_path, "other")
    finetuning(tmp_path / "chat")
    with pytest.raises(UserError, match=r"--job_name other: .* is one finetuning run"):
        run_facts.find(tmp_path / "chat", "other")


def test_the_launcher_takes_the_folder_as_it_stands(tmp_path, launch):
    pretraining(tmp_path)
    done = launch("common/status.sh", tmp_path, "--job_name", "gpt")
    assert done.returncode == 0 and "gpt: ended (pretraining)" in done.stdout, done.stderr
    done = launch("common/status.sh", tmp_path / "no")
    assert done.returncode == 2 and "is no run" in done.stderr
