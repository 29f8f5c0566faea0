"""Every launcher answers --help and --dry_run at once: without importing what takes seconds, and with exit code 0."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(file for file in (ROOT / "scripts").rglob("*.py") if 'if __name__ == "__main__"' in file.read_text())
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "trl", "peft", "wandb", "pyarrow", "sentencepiece", "numpy")
# Runs a launcher as __main__ and reports, after it ended, which heavy packages it had imported.
PROBE = """
import atexit, json, os, runpy, sys
heavy = json.loads(sys.argv.pop(1))
atexit.register(lambda: os.write(3, json.dumps([name for name in heavy if name in sys.modules]).encode()))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DRY_RUNS = {
    "create_hostfile.py": ["--nodes_from", "none", "--slots", "8", "--output", "{out}"],
    "create_ssh_config_file.py": ["--nodes_from", "none", "--output", "{out}"],
    "make_sample_data.py": ["--output_dir", "{out}"],
    "demo.py": ["--output_dir", "{out}"],
    "run_all.py": ["--recipe", "demo"],
    "show_profile.py": None,
    "status.py": None,
    "report.py": ["--folder", "no", "--output", "{out}"],
    "measure_nodes.py": ["--device", "cpu", "--num_processes", "2", "--output", "{out}"],
    "install_megatron_deepspeed.py": [],
    "train_sentencepiece_tokenizer.py": ["--input", "no/such.jsonl", "--model_prefix", "{out}", "--vocab_size", "100"],
    "preprocess_data.py": ["--input", "no.jsonl", "--input_tokenizer_file", "no.model", "--output_prefix", "{out}"],
    "pretrain.py": ["--recipe", "gpt_0.125B", "--engine", "transformers", "--device", "cpu", "--input_tokenizer_file",
                    "no.model", "--data_path", "no", "--output_model_dir", "{out}"],
    "plan.py": None,
    "convert_huggingface_model_to_megatron_deepspeed.py": [
        "--input_model_dir", "no", "--output_checkpoint_dir", "{out}"],
    "convert_tokenizer_and_pretrained_model_to_huggingface_transformers.py": [
        "--input_tokenizer_file", "no.model", "--input_model_max_length", "2048", "--input_model_dir", "no",
        "--output_tokenizer_and_model_dir", "{out}"],
    "convert_tokenizer_from_sentencepiece_to_huggingface_transformers.py": [
        "--input_tokenizer_file", "no.model", "--input_model_max_length", "2048", "--output_tokenizer_dir", "{out}"],
    "check_checkpoint.py": None,
    "verify_model.py": None,
    "upload_tokenizer_and_pretrained_model_to_huggingface_hub.py": [
        "--input_tokenizer_and_model_dir", "no", "--output_model_name", "n"],
    "upload_tokenizer_and_finetuned_model_to_huggingface_hub.py": [
        "--input_tokenizer_and_model_dir", "no", "--output_model_name", "n"],
    "finetune.py": ["--model_name_or_path", "no", "--data_files", "no.jsonl", "--output_dir", "{out}"],
    "merge_adapter.py": ["--adapter", "no", "--output_dir", "{out}"],
    "generate.py": ["--model_name_or_path", "no", "--prompt", "x"],
    "evaluate.py": ["--model_name_or_path", "no", "--text_files", "no.jsonl"],
    "inspect_data.py": None,
}  # fmt: skip


def probe(file: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a launcher; returns how it ended and the heavy packages it imported."""
    import os

    reading, writing = os.pipe()
    code = PROBE.replace("os.write(3,", f"os.write({writing},")
    argv = [sys.executable, "-c", code, json.dumps(HEAVY), str(file), *arguments]
    done = subprocess.run(argv, pass_fds=[writing], capture_output=True, text=True, check=False, cwd=ROOT)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return done, json.loads(stream.read() or "[]")


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_help_needs_nothing_heavy(file):
    done, imported = probe(file, "--help")
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout and "--" in done.stdout
    assert imported == []


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_dry_run_shows_what_would_run_anywhere(file, tmp_path):
    """No input exists, nothing heavy is imported, nothing is written."""
    assert file.name in DRY_RUNS, "a new launcher says here how it is called"
    arguments = DRY_RUNS[file.name]
    if arguments is None:
        pytest.skip("it only reads: there is nothing to show before it runs")
    words = [word.format(out=tmp_path / "out") for word in arguments]
    done, imported = probe(file, *words, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert imported == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_a_wrong_flag_is_one_message_and_exit_code_2(file):
    done, _ = probe(file, "--no_such_flag_here", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--no_such_flag_here is not a setting" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_launchers_only_connect(file):
    """A main(argv) that calls cli.run, and no logic of their own."""
    tree = ast.parse(file.read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert functions == ["main"]
    assert len(file.read_text().splitlines()) <= 45


def test_every_bash_launcher_hands_over_to_its_python_one(launch):
    for file in sorted((ROOT / "scripts").rglob("*.sh")):
        if file.name in ("env.sh", "check_python.sh") or not file.with_suffix(".py").exists():
            continue
        done = launch(str(file.relative_to(ROOT / "scripts")), "--help")
        assert done.returncode == 0, f"{file}: {done.stderr}"
        assert file.with_suffix(".py").name in done.stdout


def test_without_the_package_a_launcher_says_what_to_do(launch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = launch("step2_pretrain_model/pretrain.sh", "--help", environment={"TRAIN_PYTHON": str(bare)})
    assert done.returncode == 2
    assert "has no package 'train': run 'make install'" in done.stderr
