"""The real Megatron-DeepSpeed saves and ends when it is asked to, in pipeline and tensor parallel, and goes on."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import signal_at
from megatron_tiny_run import flags

from train.early_end import END_BY_VARIABLE
from train.engine.megatron_deepspeed.patches import DISABLED_VARIABLE
from train.errors import EXIT_FAILURE, EXIT_INTERRUPTED

pytestmark = [pytest.mark.slow, pytest.mark.megatron, pytest.mark.xdist_group("megatron_engine")]
SCRIPT = "step2_pretrain_model/pretrain.py"
PP2 = {"pipeline_parallel_size": 2, "num_processes": 2}
TP2 = {"tensor_parallel_size": 2, "num_processes": 2, "no_pipeline_parallel": True, "zero_stage": 1}
SHAPE = {"train_tokens": 20 * 4 * 32, "save_interval": 5, "eval_interval": 3, "num_workers": 1}


def records(output: Path, job_name: str) -> list[dict[str, Any]]:
    found = map(json.loads, (output / "metrics" / f"{job_name}.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in found]


def saved(output: Path, job_name: str) -> list[str]:
    return sorted(path.name for path in (output / "checkpoint" / job_name).glob("*") if path.is_dir())


@pytest.mark.parametrize("layout", [PP2, TP2], ids=["pp2", "tp2_without_pipeline"])
def test_it_saves_and_ends_whenever_it_is_asked_to(
    layout: dict[str, Any], corpus: Path, output: Path, launch: Any, tmp_path: Path
) -> None:
    tried = "tp2" if layout is TP2 else "pp2"
    whole, stopped = f"whole_{tried}", f"stopped_{tried}"
    done = launch(SCRIPT, *flags(corpus, output, job_name=whole, **SHAPE, **layout))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def stop(environment: dict[str, str]) -> str:
        words = flags(corpus, output, job_name=stopped, **SHAPE, **layout)
        done = launch(SCRIPT, *words, environment=environment)
        assert done.returncode == EXIT_INTERRUPTED, done.stdout[-3000:] + done.stderr[-3000:]
        assert not (output / "manifest" / f"{stopped}.json").exists()
        return str(done.stderr.splitlines()[-1])

    by_signal = "and ended early (asked by SIGTERM): the same command goes on from there."
    # while step 2 is reported: the other rank may have told that it was not asked by then, and ends one step later
    said = stop(signal_at.moment(tmp_path, rf"^open .*{stopped}\.jsonl a ", nth=2, to="others"))
    step = records(output, stopped)[-1]["step"]
    assert step in (2, 3) and said == f"error: saved step {step} {by_signal}"
    assert saved(output, stopped) == [f"global_step{step}"]

    # in the middle of a save all processes get two, those that load data too; training had gone on, and is saved
    said = stop(signal_at.moment(tmp_path, r"^open .*/\.global_step5\.unfinished-save/.* w", to="all"))
    last = records(output, stopped)[-1]["step"]
    assert 5 <= last < 19 and said == f"error: saved step {last} {by_signal}"
    kept = {step, last} | set(range(5, last + 1, 5))
    assert saved(output, stopped) == sorted(f"global_step{one}" for one in kept)

    # each job gets one step further, however late it is
    said = stop({END_BY_VARIABLE: "1"})
    assert said == (
        f"error: saved step {last + 1} and ended early (the time budget is used up):"
        " the same command goes on from there."
    )

    words = flags(corpus, output, job_name=stopped, **SHAPE, **layout)
    done = launch(SCRIPT, *words, environment={END_BY_VARIABLE: str(time.time() + 1e6)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert records(output, stopped) == records(output, whole)


def test_without_the_patch_nothing_is_saved(corpus: Path, output: Path, launch: Any, tmp_path: Path) -> None:
    """The signal ends the ranks in the middle of a step, as it always did during start-up."""
    environment = signal_at.moment(tmp_path, r"^open .*bare\.jsonl a ", nth=2) | {DISABLED_VARIABLE: "early-end"}
    done = launch(SCRIPT, *flags(corpus, output, job_name="bare", **SHAPE, **PP2), environment=environment)
    assert done.returncode in (EXIT_FAILURE, EXIT_INTERRUPTED), done.stdout[-3000:] + done.stderr[-3000:]
    assert not saved(output, "bare") and "saved step" not in done.stderr


def test_sigterm_during_start_up_ends_it_at_once(
    corpus: Path, output: Path, project_root: Path, tmp_path: Path
) -> None:
    variables = signal_at.moment(tmp_path, r"^open .*/megatron/(__pycache__/)?training\.", to="nobody")
    words = flags(corpus, output, job_name="begun", **SHAPE, **PP2)
    argv = [sys.executable, str(project_root / "scripts" / SCRIPT), *words]
    code, said = signal_at.sigterm_when_reached(tmp_path, argv, variables)
    assert code == EXIT_INTERRUPTED, said
    assert "interrupted: the same command goes on from the last checkpoint" in said
    assert not saved(output, "begun")
