"""The runs of `finetune_throughput.py`: its settings, and for each case the command of either side.

for case in words(settings.cases):
    process.capture(build_run(settings, case, "trl").command)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import process
from train.cluster import network
from train.finetune.lora import ALPHA, DROPOUT, RANK
from train.model_sizes import MODEL_SIZES
from train.settings import setting

_FINETUNE = Path(__file__).resolve().parents[1] / "scripts" / "step4_finetune_model" / "finetune.py"
_PLAIN_TRL = Path(__file__).resolve().with_name("plain_trl.py")
SIDES = ("ours", "trl")
# method, ZeRO stage
_CASES = {"full": ("full", 0), "lora": ("lora", 0), "full_zero3": ("full", 3), "lora_zero3": ("lora", 3)}


@dataclass(frozen=True)
class ThroughputSettings:
    """What to measure."""

    output_dir: Path = setting(Path("output/benchmarks/finetune_throughput"), help="folder for data, runs and results")
    cases: tuple[str, ...] = setting(
        ("full", "lora", "full_zero3"), help=f"what is run: {', '.join(_CASES)}; commas may stand between them"
    )
    sides: tuple[str, ...] = setting(SIDES, help="who runs it: ours, trl")
    num_processes: int = setting(2, help="processes, each with a GPU, of the ZeRO-3 cases; the others have one")
    model_size: str = setting(
        "llama_1B", help="named shape", choices=tuple(name for name in MODEL_SIZES if name.startswith("llama"))
    )
    num_layers: int = setting(0, help="layers instead of the named shape's; 0 keeps them")
    hidden_size: int = setting(0, help="hidden size instead of the named shape's, the others in proportion; 0 keeps it")
    vocabulary_size: int = setting(32_000, help="words of the tokenizer")
    sequence_length: int = setting(1024, help="longest example, in tokens")
    micro_batch_size: int = setting(8, help="examples per process and micro batch")
    gradient_accumulation_steps: int = setting(1, help="micro batches per optimizer step")
    gradient_checkpointing: bool = setting(True, help="recompute activations")
    learning_rate: float = setting(2e-5, help="peak learning rate")
    steps: int = setting(30, help="optimizer steps of each run")
    warm_up_steps: int = setting(10, help="first steps that are not counted")
    logging_steps: int = setting(5, help="optimizer steps between two lines, at which the clock is read")
    repeats: int = setting(1, help="runs of each side, in turn; the table has their mean")
    device: str = setting("cuda", help="where to train", choices=("cuda", "cpu"))
    timeout_s: float = setting(600.0, help="give one run up after so long")
    dry_run: bool = setting(False, help="print the commands", flag_only=True)

    def problems(self) -> Iterator[str]:
        for name, known in (("cases", _CASES), ("sides", SIDES)):
            for word in words(getattr(self, name)):
                if word not in known:
                    yield f"--{name} {word}: it is one of {', '.join(known)}."
        for name in ("num_processes", "micro_batch_size", "gradient_accumulation_steps", "logging_steps", "repeats"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        if self.steps <= self.warm_up_steps:
            yield f"--steps {self.steps}: it must be above --warm_up_steps {self.warm_up_steps}."
        elif self.logging_steps > 0 and (self.warm_up_steps % self.logging_steps or self.steps % self.logging_steps):
            yield f"--logging_steps {self.logging_steps}: it must divide --steps and --warm_up_steps."
        if self.sequence_length < 64:
            yield f"--sequence_length {self.sequence_length}: it must be at least 64."


@dataclass(frozen=True)
class Run:
    """One side of one case: its name, its processes, where it leaves its lines, and its command."""

    case: str
    side: str
    processes: int
    folder: Path
    metrics: Path
    command: process.Command


def build_run(settings: ThroughputSettings, case: str, side: str, repeat: int = 0) -> Run:
    """The command of one side of a case."""
    method, zero_stage = _CASES[case]
    processes = settings.num_processes if zero_stage else 1
    folder = settings.output_dir.absolute() / "runs" / f"{case}-{side}-{repeat}"
    common: dict[str, Any] = {
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "learning_rate": settings.learning_rate,
        "logging_steps": settings.logging_steps,
        "device": settings.device,
        "zero_stage": zero_stage,
    }
    if side == "ours":
        metrics = folder / "output" / "metrics.jsonl"
        argv = [sys.executable, str(_FINETUNE), *_flags(common | _our_flags(settings, folder, method, processes))]
        argv += ["--overwrite", "--resume", "never"]
    else:
        metrics = folder / "metrics.jsonl"
        argv = [sys.executable]
        if processes > 1 or zero_stage:
            port = network.free_port(str(folder), host="127.0.0.1")
            argv += ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
            argv += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        argv += [str(_PLAIN_TRL), *_flags(common | _trl_flags(settings, folder, method, zero_stage))]
    environment = _environment(settings, processes)
    return Run(case, side, processes, folder, metrics, process.Command(tuple(argv), environment))


def _our_flags(settings: ThroughputSettings, folder: Path, method: str, processes: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model_name_or_path": model_dir(settings),
        "data_files": data_file(settings),
        "output_dir": folder / "output",
        "max_seq_length": settings.sequence_length,
        "bf16": True,
        "method": method,
        "save_steps": 0,
        "show_examples": 0,
        "num_processes": processes,
        "nodes_from": "none",
    }
    lora = {"peft_lora_r": RANK, "peft_lora_alpha": ALPHA, "peft_lora_dropout": DROPOUT}
    return flags | (lora if method == "lora" else {})


def _trl_flags(settings: ThroughputSettings, folder: Path, method: str, zero_stage: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model": model_dir(settings),
        "data": data_file(settings),
        "output_dir": folder,
        "max_length": settings.sequence_length,
        "dtype": "float32" if method == "full" and not zero_stage else "bfloat16",
    }
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
    return flags | (lora if method == "lora" else {})


def _environment(settings: ThroughputSettings, processes: int) -> dict[str, str]:
    """The same for both sides. A single process sees a single GPU: transformers would spread it over all."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(settings.output_dir.absolute() / "data" / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes)),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as step 4 has it: threads that spin slow shared cores down
        return environment
    if processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # as step 4 has it; memory is compared
    return environment


def words(given: Sequence[str]) -> list[str]:
    """The entries of a flag; commas may stand between them."""
    return [word for text in given for word in text.split(",") if word]


def _flags(given: dict[str, Any]) -> list[str]:
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def model_dir(settings: ThroughputSettings) -> Path:
    """The model that is trained; another shape is another folder."""
    parts = (settings.model_size, settings.num_layers, settings.hidden_size, settings.vocabulary_size)
    return settings.output_dir.absolute() / "data" / "-".join(map(str, (*parts, settings.sequence_length)))


def data_file(settings: ThroughputSettings) -> Path:
    """The conversations."""
    return settings.output_dir.absolute() / "data" / "conversations.jsonl"
