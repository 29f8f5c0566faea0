"""Four GPUs of one host: 1.3 billion parameters in every layout train, resume, change their layout, export and verify.

Needs four NVIDIA GPUs of 80 GB and a Megatron-DeepSpeed checkout, 60 GB of disk for each test, and two minutes. The
tests do not share GPUs' memory so much that several could not run at once: `pytest -n 3`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_runs  # type: ignore[import-not-found]
import pytest
import runs  # type: ignore[import-not-found]

from train.cluster.allocation import count_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 4, reason="needs four NVIDIA GPUs"),
]
_LAYOUTS: dict[str, dict[str, object]] = {
    "DP4": {},
    "TP2xDP2": {"tensor_parallel_size": 2},
    "PP2xDP2": {"pipeline_parallel_size": 2},
    "TP2xPP2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "TP4": {"tensor_parallel_size": 4},
    "PP4": {"pipeline_parallel_size": 4},
}


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: checkpoints are of 18 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def pretrain(corpus: Path, output: Path, **more: object) -> list[str]:
    gpu_runs.require_engine()
    size: dict[str, object] = {
        "model_size": "gpt_1.3B", "sequence_length": 2048, "global_batch_size": 16, "micro_batch_size": 2,
        "num_processes": 4, "engine": "megatron-deepspeed", "lr": 2e-4, "lr_warmup_tokens": 4 * 16 * 2048,
    }  # fmt: skip
    return list(gpu_runs.pretrain(corpus, output, **{**size, **more}))


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("model_size", ["gpt_1.3B", "llama_1.3B"])
def test_a_layout_trains_resumes_exports_and_verifies(model_size: str, layout: str, corpus: Path, output: Path) -> None:
    command = pretrain(corpus, output, model_size=model_size, **_LAYOUTS[layout])
    before = gpu_runs.train(command, output)
    after = gpu_runs.go_on(command, output)
    # reductions over NCCL may differ in their order from run to run
    assert after == pytest.approx(before, rel=2e-3)
    logits = gpu_runs.export(corpus, output, sequence_length=2048)
    print(f"{model_size} {layout}: losses {before}, after resuming {after}, logits {logits}")


def test_tensor_and_pipeline_ranks_become_data_ranks(corpus: Path, output: Path) -> None:
    before = gpu_runs.train(pretrain(corpus, output, **_LAYOUTS["TP2xPP2"]), output)
    after = gpu_runs.go_on(pretrain(corpus, output, **_LAYOUTS["DP4"]), output)
    assert after == pytest.approx(before, rel=2e-3)
    logits = gpu_runs.export(corpus, output, sequence_length=2048)
    print(f"TP2xPP2, from step {gpu_runs.SAVED} on DP4: losses {before}, {after}, logits {logits}")


def test_a_rank_killed_mid_step_ends_the_run_by_its_name_and_it_goes_on(corpus: Path, output: Path) -> None:
    command = pretrain(corpus, output, global_batch_size=512, train_tokens=6 * 512 * 2048, save_interval=2,
                       **_LAYOUTS["TP2xPP2"])  # fmt: skip
    running = subprocess.Popen(
        command, env={**os.environ, **runs.ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    runs.wait_for(lambda: len(runs.losses(output, "run")) >= 3, running, 240)
    ranks = subprocess.run(["pgrep", "-f", f"worker --recipe {output}"], capture_output=True, text=True, check=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    started = time.monotonic()
    code, said = runs.finish(running, 120)
    print(f"ended {time.monotonic() - started:.1f} s after the rank was killed", file=sys.stderr)
    assert code == 137 and "was killed by SIGKILL" in said, said[-4000:]
    assert "goes on from step 2" in gpu_runs.run(command)
    assert sorted(runs.losses(output, "run")) == list(range(1, 7))
