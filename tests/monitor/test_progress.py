"""Progress: a line for people, an object for programs."""

from __future__ import annotations

import json

import pytest

from train.monitor import progress
from train.monitor.progress import Progress


def test_a_report_is_one_line_and_one_object(tmp_path, capsys):
    reporter = Progress(tmp_path / "m" / "run.jsonl", total_steps=200, tokens_per_step=1000)
    reporter.train(50, loss=3.5, lr=1e-3, grad_norm=0.5)
    reporter.evaluation(50, loss=0.0)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("step 50/200 (25%) | 50,000 tokens | loss 3.5000 | lr 1.00e-03 | grad norm 0.50 | ")
    assert shown[1] == "step 50: held-out loss 0.0000, perplexity 1.00"
    first, second = map(json.loads, (tmp_path / "m" / "run.jsonl").read_text().splitlines())
    assert first.pop("tokens_per_second") > 0
    assert first == {"step": 50, "tokens": 50000, "loss": 3.5, "lr": 1e-3, "grad_norm": 0.5}
    assert second == {"step": 50, "tokens": 50000, "eval_loss": 0.0, "eval_perplexity": 1.0}


@pytest.mark.parametrize("what", ["a save", "an evaluation"])
def test_between_two_lines_neither_time_nor_steps_of_a_pause_count(tmp_path, monkeypatch, what):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = Progress(tmp_path / "run.jsonl", total_steps=200, tokens_per_step=1000)
    now[0] += 10  # 5 steps, 500 tokens a second
    now[0] += 60
    if what == "a save":
        reporter.pause(5)
    else:
        reporter.evaluation(5, loss=1.0)
    now[0] += 10
    reporter.train(10, loss=3.5, lr=1e-3, grad_norm=None)
    last = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second"] == 500


def test_a_huge_loss_has_an_infinite_perplexity(tmp_path):
    Progress(tmp_path / "run.jsonl", total_steps=2, tokens_per_step=1).evaluation(1, loss=1e6)
    assert json.loads((tmp_path / "run.jsonl").read_text())["eval_perplexity"] is None


def test_what_lies_beyond_the_step_gone_back_to_is_dropped(tmp_path):
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "half')
    progress.cut_after(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    progress.cut_after(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_durations_are_readable():
    assert progress.duration(59) == "0:00:59"
    assert progress.duration(2 * 86400 + 3661) == "2 d 1:01:01"
