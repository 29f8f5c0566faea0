"""Two GPUs of one host, over NCCL: layouts train, resume to the same losses, export and verify; every starter works.

Needs two NVIDIA GPUs, and a Megatron-DeepSpeed checkout for the layouts. Takes about a minute each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_runs  # type: ignore[import-not-found]
import pytest
import runs  # type: ignore[import-not-found]

from train.cluster.allocation import count_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 2, reason="needs two NVIDIA GPUs"),
]
_LAYOUTS: dict[str, dict[str, object]] = {
    "DP2": {},
    "TP2": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shape", gpu_runs.SHAPES)
def test_a_layout_trains_resumes_exports_and_verifies(shape: str, layout: str, corpus: Path, tmp_path: Path) -> None:
    gpu_runs.require_engine()
    command = gpu_runs.pretrain(
        corpus, tmp_path, engine="megatron-deepspeed", **gpu_runs.SHAPES[shape], **_LAYOUTS[layout]
    )
    before = gpu_runs.train(command, tmp_path)
    after = gpu_runs.go_on(command, tmp_path)
    # reductions over NCCL may differ in their order from run to run
    assert after == pytest.approx(before, rel=2e-3)
    logits = gpu_runs.export(corpus, tmp_path)
    print(f"{shape} {layout}: losses {before}, after resuming {after}, logits {logits}")


@pytest.mark.parametrize("starter", ["own", "torchrun", "deepspeed"])
def test_every_starter_starts_nccl(starter: str, corpus: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    command = gpu_runs.pretrain(corpus, tmp_path, engine="transformers", starter=starter, **gpu_runs.SHAPES["gpt"])
    found = gpu_runs.train(command, tmp_path)
    print(f"{starter}: {time.monotonic() - started:.1f} s, losses {found}")


def test_a_rank_killed_over_nccl_ends_the_run_by_its_name(corpus: Path, tmp_path: Path) -> None:
    more = {**gpu_runs.SHAPES["gpt"], "lr": 1e-4, "train_tokens": "1B"}
    command = gpu_runs.pretrain(corpus, tmp_path, engine="transformers", **more)
    running = subprocess.Popen(
        command, env={**os.environ, **runs.ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    runs.wait_for(lambda: len(runs.losses(tmp_path, "run")) > 3, running, 240)
    pattern = f"worker --recipe {tmp_path}"
    victim = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()[-1]
    os.kill(int(victim), signal.SIGKILL)
    started = time.monotonic()
    code, said = runs.finish(running, 120)
    print(f"ended {time.monotonic() - started:.1f} s after the rank was killed", file=sys.stderr)
    assert code == 137 and "rank 1 was killed by SIGKILL" in said, said[-4000:]
