"""A finetuning saves and ends when it is asked to, proves nothing then, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import signal_at
from finetune_samples import argv, call  # type: ignore[import-not-found]

from train.cluster.launch import End
from train.early_end import END_BY_VARIABLE
from train.errors import EXIT_INTERRUPTED
from train.finetune import launch, prepare
from train.finetune.folder import FinetuneFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def files(files: dict[str, Any], question_file: Path) -> dict[str, Any]:
    return files | {
        "eval_data_files": question_file,
        "max_steps": 6,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "show_examples": 0,
    }


class Stop:
    """Runs a finetuning that is asked to end early, and returns what it says last."""

    def __init__(self, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._words, self._monkeypatch, self._capsys = words, monkeypatch, capsys

    def __call__(self, environment: dict[str, str]) -> str:
        with self._monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert call(*self._words) == EXIT_INTERRUPTED
        return self._capsys.readouterr().err.splitlines()[-1]


def records(folder: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in found]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_under_zero_3_it_saves_and_ends_whenever_it_is_asked_to(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = {"num_processes": 2, "zero_stage": 3}
    assert call(*argv(files, output_dir=tmp_path / "whole", **layout)) == 0
    stop = Stop(argv(files, **layout), monkeypatch, capsys)
    out = files["output_dir"]
    unfinished = FinetuneFolder(out)

    by_signal = "and ended early (asked by SIGTERM): the same command goes on from there."
    said = stop(signal_at.moment(tmp_path, r"^open .*metrics\.jsonl a ", nth=2, to="others"))
    assert said == f"error: saved step 2 {by_signal}"  # the first line told of an evaluation, the second of step 1
    assert unfinished.checkpoint() == unfinished.checkpoint_dir / "checkpoint-2"
    assert not out.exists() and not unfinished.model_dir.exists()

    said = stop(signal_at.moment(tmp_path, r"^open .*/checkpoint-4/.* w", to="all"))
    assert said == f"error: saved step 4 {by_signal}"
    said = stop({END_BY_VARIABLE: "1"})
    assert said.startswith("error: saved step 5 and ended early (the time budget is used up)")

    monkeypatch.setenv(END_BY_VARIABLE, str(time.time() + 1e6))
    assert call(*argv(files, **layout)) == 0
    assert records(out) == records(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(value.equal(expected[name]) for name, value in weights(out).items())


def test_asked_in_its_last_step_it_leaves_the_proof_to_the_next_call(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process, which saves nothing of its own accord, and evaluates after each epoch of two steps."""
    changes = {"save_steps": 0, "per_device_train_batch_size": 6, "max_steps": None, "num_train_epochs": 2}
    assert call(*argv(files, output_dir=tmp_path / "whole", **changes)) == 0
    stop = Stop(argv(files, **changes), monkeypatch, capsys)
    unfinished = FinetuneFolder(files["output_dir"])

    said = stop({END_BY_VARIABLE: "1"})
    assert said.startswith("error: saved step 1 and ended early")
    assert [record["step"] for record in records(unfinished.root) if "eval_loss" in record] == [0]
    said = stop(signal_at.moment(tmp_path, r"^open .*metrics\.jsonl a ", nth=3, alone=True))
    assert said.startswith("error: saved step 4 and ended early (asked by SIGTERM)")
    assert not files["output_dir"].exists() and not unfinished.model_dir.exists()

    assert call(*argv(files, **changes)) == 0
    assert records(files["output_dir"]) == records(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(value.equal(expected[name]) for name, value in weights(files["output_dir"]).items())


def test_the_time_budget_counts_while_the_examples_are_prepared(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizing a large set takes longer than the margin before the queue's wall time."""
    clock, prepared, given = time.time, prepare.prepare, []

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(time, "time", lambda: clock() + 3600)
        return prepared(*arguments)

    def run(plan: Any, *, log: Path) -> End:
        given.append(float(plan.job.environment[END_BY_VARIABLE]))
        return End(1, "")

    monkeypatch.setattr(prepare, "prepare", slow)
    monkeypatch.setattr(launch.launch, "run", run)
    began = clock()
    assert call(*argv(files, time_budget_min=30)) == 1
    capsys.readouterr()
    assert began <= given[0] - 30 * 60 < began + 1800
