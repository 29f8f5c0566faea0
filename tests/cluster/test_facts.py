"""What a node tells of itself: true, plain, and soon."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from train.cluster import facts


def stand_in(folder: Path, name: str, script: str) -> str:
    """A PATH on which `name` is a script of ours."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_facts_are_plain_data_and_true(tmp_path):
    found = facts.collect({"job": "j", "paths": [str(tmp_path), str(tmp_path / "no")], "interface": "lo"})
    assert json.loads(json.dumps(found)) == found
    assert (found["interpreter"], found["host"]) == (sys.executable, os.uname().nodename)
    assert found["boot"] and found["boot"] == facts.collect({})["boot"]
    assert found["unseen"] == [str(tmp_path / "no")]
    assert found["interface_address"] == "127.0.0.1"
    assert found["torch"].startswith(importlib.metadata.version("torch"))
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert abs(found["clock"] - time.time()) < 60
    assert found["temporary folder"] == tempfile.gettempdir() and found["free MiB there"] > 0


def test_nothing_heavy_is_imported():
    code = "import sys; from train.cluster import facts; facts.collect({});"
    code += "print([name for name in ('torch', 'numpy', 'deepspeed', 'transformers', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("visible", "count"), [(None, 3), ("0,2", 2), ("0", 1), ("", 0), ("-1", 0)])
def test_gpus_are_those_that_the_ranks_may_use(tmp_path, monkeypatch, visible, count):
    listed = "".join(f"GPU {number}: NVIDIA H200 (UUID: GPU-{number})\\n" for number in range(3))
    answer = f"if [ $1 = --list-gpus ]; then printf '{listed}'; exit; fi; "
    answer += "printf 'NVIDIA H200, 580.65.06\\nNVIDIA H200, 580.65.06\\nNVIDIA H200, 580.65.06\\n'"
    monkeypatch.setenv("PATH", stand_in(tmp_path, "nvidia-smi", answer))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = facts.collect({})
    assert (found["GPUs"], found["GPU"]) == (count, "NVIDIA H200" if count else None)
    assert found["driver"] == ("580.65.06" if count else None)


def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path, monkeypatch):
    failing = "echo 'NVIDIA-SMI has failed because it could not communicate, driver'; exit 9"
    monkeypatch.setenv("PATH", stand_in(tmp_path, "nvidia-smi", failing))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert facts.collect({})["GPUs"] == 0


def test_the_engines_commit_is_asked_of_the_node(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert facts.collect({"engine_dir": str(tmp_path)})["engine"] == commit
    assert facts.collect({"engine_dir": str(tmp_path / "no")})["engine"] == f"none in {tmp_path}/no"
    assert facts.collect({})["engine"] is None


def test_a_full_disk_is_told_though_python_would_pass_it_over(tmp_path, monkeypatch):
    """tempfile takes the next folder then, and at last the one in which the agent stands, which all nodes share."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert facts.collect({})["temporary folder"] == str(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no"))
    monkeypatch.setenv("TEMP", str(tmp_path))
    assert facts.collect({})["temporary folder"] == str(tmp_path)
