"""The transformers engine saves and ends when it is asked to, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import signal_at
from megatron_tiny_run import write_corpus

from train.early_end import END_BY_VARIABLE
from train.errors import EXIT_INTERRUPTED

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers_early_end")]
SCRIPT = "step2_pretrain_model/pretrain.py"
TINY = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "sequence_length": 32, "train_tokens": 1024,
    "global_batch_size": 4, "micro_batch_size": 1, "lr": "1e-2", "precision": "fp32", "device": "cpu",
    "engine": "transformers", "split": "90,10,0", "save_interval": 5, "eval_interval": 3, "eval_iters": 1,
    "log_interval": 1, "job_name": "tiny", "num_processes": 2, "num_workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The launcher's arguments, but for the output."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    paths = {"input_tokenizer_file": corpus / "tok.model", "data_path": corpus / "sums_text_document"}
    return [word for name, value in {**TINY, **paths}.items() for word in (f"--{name}", str(value))]


def records(output: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (output / "metrics" / "tiny.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in found]


def weights(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output / "checkpoint" / "tiny" / "global_step8" / "model.safetensors")


def saved(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoint" / "tiny").glob("*") if path.is_dir())


def test_it_saves_and_ends_whenever_it_is_asked_to(words: list[str], launch: Any, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = launch(SCRIPT, *words, "--output_model_dir", whole)
    assert done.returncode == 0, done.stdout + done.stderr

    def stop(environment: dict[str, str]) -> str:
        done = launch(SCRIPT, *words, "--output_model_dir", stopped, environment=environment)
        assert done.returncode == EXIT_INTERRUPTED, done.stdout + done.stderr
        assert not (stopped / "manifest" / "tiny.json").exists()
        return str(done.stderr.splitlines()[-1])

    by_signal = "and ended early (asked by SIGTERM): the same command goes on from there."
    # after step 2 the second rank gets a signal, the first one none
    said = stop(signal_at.moment(tmp_path, r"^open .*tiny\.jsonl a ", nth=2, to="others"))
    assert said == f"error: saved step 3 {by_signal}"
    assert saved(stopped) == ["global_step3"] and records(stopped)[-1]["step"] == 3

    # in the middle of a save all processes get two, those that load data too; nothing is written twice
    said = stop(signal_at.moment(tmp_path, r"^open .*/checkpoint-5/.* w", to="all"))
    assert said == f"error: saved step 5 {by_signal}"
    assert saved(stopped) == ["global_step3", "global_step5"] and records(stopped)[-1]["step"] == 5

    # each job gets one step further, however late it is
    said = stop({END_BY_VARIABLE: "1"})
    assert said == (
        "error: saved step 6 and ended early (the time budget is used up): the same command goes on from there."
    )

    done = launch(SCRIPT, *words, "--output_model_dir", stopped, environment={END_BY_VARIABLE: str(time.time() + 1e6)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(stopped) == records(whole)
    expected = weights(whole)
    assert all(bool((value == expected[name]).all()) for name, value in weights(stopped).items())


def test_the_last_step_is_no_early_end(words: list[str], launch: Any, tmp_path: Path) -> None:
    environment = signal_at.moment(tmp_path, r"^open .*/checkpoint-8/.* w", to="all")
    done = launch(SCRIPT, *words, "--output_model_dir", tmp_path / "out", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "manifest" / "tiny.json").exists()


def test_sigterm_during_start_up_ends_it_at_once(words: list[str], project_root: Path, tmp_path: Path) -> None:
    variables = signal_at.moment(tmp_path, r"^import train\.engine\.transformers\.trainer ", to="nobody")
    argv = [sys.executable, str(project_root / "scripts" / SCRIPT), *words, "--output_model_dir", str(tmp_path / "out")]
    code, said = signal_at.sigterm_when_reached(tmp_path, argv, variables)
    assert code == EXIT_INTERRUPTED, said
    assert "interrupted: the same command goes on from the last checkpoint" in said
    assert not list((tmp_path / "out").glob("checkpoint/tiny/*"))
