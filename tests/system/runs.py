"""Small runs of steps 2 and 4 for the hosts of tests/system, and what the tests look at afterwards."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hosts import PROJECT_ROOT, Hosts  # type: ignore[import-not-found]

from train.data.docstrings import docstring_documents

ENVIRONMENT = {"TRAIN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
PRETRAIN = PROJECT_ROOT / "scripts" / "step2_pretrain_model" / "pretrain.sh"
FINETUNE = PROJECT_ROOT / "scripts" / "step4_finetune_model" / "finetune.sh"
STATUS = PROJECT_ROOT / "scripts" / "common" / "status.sh"
STEPS = 8
TINY: dict[str, object] = {
    "job_name": "tiny", "device": "cpu", "architecture": "llama", "num_layers": 2, "hidden_size": 32,
    "num_attention_heads": 2, "sequence_length": 32, "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-2,
    "train_tokens": STEPS * 4 * 32, "save_interval": 4, "eval_interval": 0, "log_interval": 1, "precision": "fp32",
    "num_processes": 1, "engine": "transformers",
}  # fmt: skip


def flags(given: Mapping[str, object]) -> list[str]:
    """`--name value` for each; a tuple is several values."""
    words = []
    for name, value in given.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def pretrain(corpus: Path, output: Path, **more: object) -> list[str]:
    """The command of a tiny pretraining run; `more` wins over what it is by itself."""
    data = {"input_tokenizer_file": corpus / "tok.model", "data_path": corpus / "text_text_document"}
    return ["bash", str(PRETRAIN), *flags({**data, "output_model_dir": output, **TINY, **more})]


def hostfile(folder: Path, *names: str, slots: int = 1) -> Path:
    """A hostfile of these hosts."""
    file = folder / f"hostfile_{'_'.join(names)}"
    file.write_text("".join(f"{name} slots={slots}\n" for name in names))
    return file


def losses(output: Path, job: str = "tiny") -> dict[int, float]:
    """Loss by step, as far as the run has come."""
    file = output / "metrics" / f"{job}.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


def hosts_of_ranks(hosts: Hosts, name: str) -> list[int]:
    """The ranks that run on a host, by their process ids on this machine."""
    return [
        process.pid for process in hosts.processes(name)
        if any(word.endswith(".worker") for word in process.argv) and "-m" in process.argv
    ]  # fmt: skip


def kill(pid: int) -> None:
    """Kills a process by its id on this machine."""
    os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], running: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Returns when `condition` holds.

    Raises:
        AssertionError: the run ended before, or it took too long; with all output so far.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if running.poll() is not None or time.monotonic() > deadline:
            running.kill()
            assert running.stdout is not None
            raise AssertionError(f"it ended, or took too long:\n{running.stdout.read()}")
        time.sleep(0.05)


def finish(running: subprocess.Popen[str], timeout_s: float = 90) -> tuple[int, str]:
    """Waits for the end; exit status and all output.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    try:
        said, _ = running.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        running.kill()
        print(running.communicate()[0])
        raise
    return running.returncode, said


def make_corpus(folder: Path) -> Path:
    """A tokenizer of step 1 and the tokens of its text, by the launchers; returns `folder`."""
    texts = [document["text"] for document in itertools.islice(docstring_documents(), 100)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    step1: dict[str, object] = {"input": folder / "text.jsonl", "model_prefix": folder / "tok", "vocab_size": 500}
    step2: dict[str, object] = {
        "input": folder / "text.jsonl", "input_tokenizer_file": folder / "tok.model", "output_prefix": folder / "text",
    }  # fmt: skip
    scripts = PROJECT_ROOT / "scripts"
    for script, given in (
        (scripts / "step1_train_tokenizer" / "train_sentencepiece_tokenizer.py", step1),
        (scripts / "step2_pretrain_model" / "preprocess_data.py", step2),
    ):
        subprocess.run([sys.executable, str(script), *flags(given)], check=True, capture_output=True)
    return folder


def make_model(hosts: Hosts, corpus: Path, folder: Path) -> Path:
    """A Hugging Face folder of steps 2 and 3, made on the host login."""
    run = pretrain(corpus, folder / "base", sequence_length=128, job_name="base", num_processes=1)
    step3 = PROJECT_ROOT / "scripts" / "step3_upload_pretrained_model"
    convert: dict[str, object] = {
        "input_tokenizer_file": corpus / "tok.model", "input_model_max_length": 128,
        "input_model_dir": folder / "base" / "checkpoint" / "base" / f"global_step{STEPS // 4}",
        "output_tokenizer_and_model_dir": folder / "model", "parity_documents": 50,
    }  # fmt: skip
    script = step3 / "convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh"
    for argv in (run, ["bash", str(script), *flags(convert)]):
        hosts.run("login", argv, env=ENVIRONMENT, timeout_s=180, check=True)
    return folder / "model"


def write_conversations(folder: Path) -> Path:
    """Conversations in the seeds' form."""
    file = folder / "conversations.jsonl"
    texts = [f"### Human: What is {a} plus {b}? ### Assistant: It is {a + b}." for a in range(8) for b in range(8)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def finetune(model: Path, output: Path, **more: object) -> list[str]:
    """The command of a tiny finetuning run; `more` wins."""
    output.parent.mkdir(parents=True, exist_ok=True)
    given: dict[str, object] = {
        "model_name_or_path": model, "output_dir": output, "data_files": write_conversations(output.parent),
        "device": "cpu", "num_processes": 1, "max_seq_length": 64, "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "show_examples": 0,
    }  # fmt: skip
    return ["bash", str(FINETUNE), *flags({**given, **more})]
