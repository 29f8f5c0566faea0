"""The demo, smaller: the five steps through their launchers, interrupted and gone on with, then skipped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ["--engine", "transformers", "--train_tokens", "150K", "--finetune_steps", "40"]


def run_demo(project_root: Path, output: Path) -> subprocess.CompletedProcess[str]:
    script = project_root / "scripts" / "common" / "demo.sh"
    return subprocess.run(
        ["bash", str(script), "--output_dir", str(output), *SMALL],
        env={**os.environ, "TRAIN_PYTHON": sys.executable, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_demo_goes_on_after_an_interruption_and_its_figures_are_true(project_root, tmp_path):
    output = tmp_path / "the demo"
    script = str(project_root / "scripts" / "common" / "demo.sh")
    environment = {**os.environ, "TRAIN_PYTHON": sys.executable}
    begun = subprocess.Popen(
        ["bash", script, "--output_dir", str(output), *SMALL],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    metrics = output / "pretrained" / "metrics" / "gpt_demo.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists():
        assert begun.poll() is None and time.monotonic() < deadline, "it did not begin to pretrain"
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGINT)
    assert begun.wait(timeout=60) == 130

    done = run_demo(project_root, output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout[done.stdout.index("five steps in") :]
    first, last = map(float, re.findall(r"tokens, loss ([\d.]+) -> ([\d.]+)", table)[0])
    assert last < first - 2
    before, after = map(float, re.findall(r"held-out answers' loss ([\d.]+) -> ([\d.]+)", table)[0])
    assert after < before - 0.5
    assert re.search(r"tokenizer 0 mismatches in 7,\d{3} texts", " ".join(table.split()))
    assert table.count("done before") == 3, "data, tokenizer and tokens were made before the interruption"

    results = json.loads((output / "huggingface" / "gpt_demo_chat" / "manifest.json").read_text())["results"]
    assert f"{results['last_loss']:.3f}" in table
    for name in ("gpt_demo", "gpt_demo_chat"):
        folder = output / "upload" / name
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
            file.name for file in folder.iterdir()
        }

    again = run_demo(project_root, output)
    assert again.returncode == 0, again.stderr
    assert again.stdout[again.stdout.index("five steps in") :].count("done before") == 8


def test_a_step_that_fails_ends_the_demo_with_its_exit_code(project_root, tmp_path):
    (tmp_path / "data").write_text("a file where the demo needs a folder")
    done = run_demo(project_root, tmp_path)
    assert done.returncode == 2
    assert "0 sample data ended with exit code 2" in done.stderr
