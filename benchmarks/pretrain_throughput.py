#!/usr/bin/env python3
"""How fast pretraining runs on this machine's GPUs, setting by setting, through the launcher that users call.

Random tokens of a vocabulary of 32,000, so that nothing is learned and nothing cached; the first steps are left out;
data loading, optimizer and logging are in. A run is killed after its last step, unless its save is wanted too.
FLOPs are counted by one formula for every engine and setting, from the shape that the run itself has resolved:
6 per token and weight of a matrix product, and attention's 12 x layers x length x hidden per token (its whole square;
half of that counted as "causal", which is what a kernel that skips the masked half computes).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flag_values import flag_number

from train import cli, outputs, process
from train.errors import UserError, refuse
from train.model_sizes import MODEL_SIZES
from train.recipe import ModelSettings, PretrainRecipe
from train.settings import build, read_yaml, setting

_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "step2_pretrain_model" / "pretrain.py"
_VOCABULARY = 32_000


@dataclass(frozen=True)
class ThroughputSettings:
    """What to measure."""

    output_dir: Path = setting(Path("output/benchmarks/pretrain_throughput"), help="folder for data, runs and results")
    model_size: str = setting("gpt_1.3B", help="named shape", choices=tuple(MODEL_SIZES))
    sequence_length: int = setting(2048, help="tokens per sequence")
    global_batch_size: int = setting(64, help="sequences per step")
    steps: int = setting(60, help="optimizer steps of each run")
    warm_up_steps: int = setting(10, help="first steps that are not counted")
    cases: tuple[str, ...] = setting(
        (
            "upstream: --micro_batch_size 8 ! TRAIN_DISABLED_PATCHES=speed",
            "defaults: --micro_batch_size 0",
            "transformers: --engine transformers --micro_batch_size 8",
        ),
        help="NAME: FLAGS of pretrain.sh [! VARIABLE=VALUE ...]",
    )
    save: bool = setting(False, help="let each run save its checkpoint when it has ended, and tell how fast that was")
    timeout_s: float = setting(1200.0, help="give one case up after so long")
    dry_run: bool = setting(False, help="print the commands", flag_only=True)


def flops_per_token(model: ModelSettings) -> tuple[float, float]:
    """FLOPs of forward and backward per token of a resolved model: attention counted whole, and causal."""
    layers, hidden, heads = model.num_layers or 0, model.hidden_size or 0, model.num_attention_heads or 1
    ffn = model.ffn_hidden_size or 4 * hidden
    key_value = hidden * (model.num_key_value_heads or heads) // heads
    matrices = 3 if model.architecture != "gpt2" else 2
    layer = 2 * hidden * hidden + 2 * hidden * key_value + matrices * hidden * ffn
    weights = layers * layer + _VOCABULARY * hidden
    attention = 12 * layers * model.sequence_length * hidden
    return 6.0 * weights + attention, 6.0 * weights + attention / 2


def measure(settings: ThroughputSettings) -> int:
    """Runs every case and prints a Markdown table; results.json keeps the numbers. 1 when a case failed."""
    if settings.steps <= settings.warm_up_steps:
        raise UserError(
            f"--steps {settings.steps} --warm_up_steps {settings.warm_up_steps}: no step is left to count; take more."
        )
    refuse(
        f"--cases {case!r}: NAME: FLAGS of pretrain.sh was expected, such as 'small: --micro_batch_size 1'."
        for case in settings.cases
        if not re.fullmatch(r"\s*[\w.+ -]*\w\s*", case.partition(":")[0]) or ":" not in case
    )
    documents = 2 * settings.global_batch_size * settings.steps
    data = settings.output_dir / "data" / f"{documents}x{settings.sequence_length}"
    commands = [_command(settings, data, case) for case in settings.cases]
    if settings.dry_run:
        for _, command in commands:
            print(command.text())
        return 0
    _write_data(data, documents, settings.sequence_length)
    print(f"{settings.model_size}, sequences of {settings.sequence_length}, global batch {settings.global_batch_size}")
    print("| case | ms/step | tokens/s per GPU | TFLOP/s full | causal | GiB | s to first step | last loss |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    results = []
    for name, command in commands:
        row = _run(settings, name, command)
        results.append(row)
        print(_line(row), flush=True)
    for row in results:
        for told in (*row.get("said", ()), *row.get("gpus_at_work", ())):
            print(f"{row['name']}: {told}")
    outputs.write_text(settings.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    return int(any("error" in row for row in results))


def _command(settings: ThroughputSettings, data: Path, case: str) -> tuple[str, process.Command]:
    name, _, rest = case.partition(":")
    words, _, variables = rest.partition("!")
    # a case may have a batch of its own, and as many steps as the others
    batch = flag_number(words, "--global_batch_size", settings.global_batch_size)
    batch_tokens = batch * flag_number(words, "--sequence_length", settings.sequence_length)
    given: dict[str, Any] = {
        "input_tokenizer_file": data / "numbers.model",
        "data_path": data / "random_text_document",
        "output_model_dir": settings.output_dir / "runs" / name.strip(),
        "job_name": "run",
        "model_size": settings.model_size,
        "sequence_length": settings.sequence_length,
        "global_batch_size": settings.global_batch_size,
        "train_tokens": settings.steps * batch_tokens,
        "lr_warmup_tokens": settings.warm_up_steps * batch_tokens,
        "precision": "bf16",
        "zero_stage": 1,
        "split": "100,0,0",
        "eval_interval": 0,
        "save_interval": 10 * settings.steps,
        "log_interval": 1,
        "engine": "megatron-deepspeed",
    }
    argv = [sys.executable, str(_SCRIPT), *(word for key, value in given.items() for word in (f"--{key}", str(value)))]
    environment = dict(pair.split("=", 1) for pair in variables.split())
    return name.strip(), process.Command((*argv, *words.split(), "--overwrite"), environment)


def _run(settings: ThroughputSettings, name: str, command: process.Command) -> dict[str, Any]:
    runs = settings.output_dir / "runs" / name
    metrics = runs / "metrics" / "run.jsonl"
    metrics.unlink(missing_ok=True)
    with process.marked(command) as (marked, mark):
        waiting = _Watch(metrics, mark, steps=settings.steps, kills=not settings.save)
        code, said = process.capture(marked, timeout_s=settings.timeout_s)
        waiting.end()
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "output.txt").write_text(said, encoding="utf-8")
    shutil.rmtree(runs / "checkpoint", ignore_errors=True)  # tens of gigabytes that nobody wants
    records = _records(metrics)
    if len(records) < settings.steps or (settings.save and code != 0):
        return {"name": name, "error": (said.strip().splitlines() or [""])[-1][:200], "exit_status": code}
    steady = [record["tokens_per_second"] for record in records[settings.warm_up_steps :]]
    gpus = int(re.search(r"^layout: world size (\d+)", said, re.MULTILINE)[1])  # type: ignore[index]
    recipe = build(PretrainRecipe, read_yaml(runs / "recipe" / "run.yaml"))  # a case may change any of it
    full, causal = flops_per_token(recipe.model)
    batch_tokens = recipe.tokens_per_step
    rate = 1 / statistics.fmean(1 / value for value in steady) / gpus  # tokens over seconds, not a mean of rates
    return {
        "name": name,
        "flops_per_token": full,
        "ms_per_step": 1000 * batch_tokens / (rate * gpus),
        "tokens_per_second_per_gpu": rate,
        "tflops_full": rate * full / 1e12,
        "tflops_causal": rate * causal / 1e12,
        "gpu_memory_gib": records[-1].get("gpu_memory_gib"),
        "first_step_s": batch_tokens / records[0]["tokens_per_second"],
        "start_to_first_step_s": waiting.seconds,
        "last_loss": records[-1]["loss"],
        "said": [line for line in said.splitlines() if line.startswith(("start: ", "saved global_step"))],
        "gpus_at_work": waiting.gpus,
        "gpus": gpus,
    }


def _records(metrics: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file, which may be written just now."""
    if not metrics.is_file():
        return []
    whole = metrics.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, whole) if "tokens_per_second" in record]


class _Watch(threading.Thread):
    """Waits for the first line of a metrics file, as a user does who watches; sees the GPUs' clocks at the last step.

    Args:
        metrics: the file.
        mark: of the run's processes.
        steps: how many there will be.
        kills: whether to kill the run after the last one.

    Attributes:
        seconds: from the command to the first line.
        gpus: what nvidia-smi said of each GPU before the last step ended; empty where it says nothing.
    """

    def __init__(self, metrics: Path, mark: str, *, steps: int, kills: bool) -> None:
        super().__init__(daemon=True)
        self.seconds = math.nan
        self.gpus: list[str] = []
        self._metrics, self._mark, self._steps, self._kills = metrics, mark, steps, kills
        self._is_over = threading.Event()
        self._began = time.monotonic()
        self.start()

    def run(self) -> None:
        has_asked = False
        while not self._is_over.wait(0.05):
            steps = len(_records(self._metrics))
            if steps and math.isnan(self.seconds):
                self.seconds = time.monotonic() - self._began
            if steps and steps >= self._steps - 1 and not has_asked:
                self.gpus, has_asked = _gpus_at_work(), True
            if steps == self._steps:
                if self._kills:
                    process.kill_marked(self._mark)
                return

    def end(self) -> None:
        self._is_over.set()
        self.join()


def _gpus_at_work() -> list[str]:
    names = ("name", "clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")
    query = process.Command(("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"))
    code, said = process.capture(query, timeout_s=5)  # later it would be no figure of a step
    lines = [line.split(", ") for line in said.splitlines()] if code == 0 else []
    return [
        f"GPU {number} ({name}) at the last step: {clock}, {power}, {celsius} C, {busy} busy"
        for number, (name, clock, power, celsius, busy) in enumerate(lines)
    ]


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['name']} | exit status {row['exit_status']}: {row['error']} |||||||"
    cells = (
        row["name"],
        f"{row['ms_per_step']:,.0f}",
        f"{row['tokens_per_second_per_gpu']:,.0f}",
        f"{row['tflops_full']:.0f}",
        f"{row['tflops_causal']:.0f}",
        f"{row['gpu_memory_gib']}",
        f"{row['start_to_first_step_s']:.1f}",
        f"{row['last_loss']:.4f}",
    )
    return f"| {' | '.join(cells)} |"


def _write_data(folder: Path, documents: int, length: int) -> None:
    """A tokenizer of numbered pieces and random tokens, enough for two runs so that none comes twice; kept."""
    if folder.is_dir():
        return
    import numpy as np

    from train.data.indexed_dataset import IndexedDatasetWriter

    with outputs.new_folder(folder) as unfinished:
        (unfinished / "numbers.model").write_bytes(_numbered_pieces())
        random = np.random.default_rng(1)
        prefix = unfinished / "random_text_document"
        with IndexedDatasetWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), np.dtype(np.uint16)) as writer:
            for _ in range(documents):
                writer.add_document(random.integers(3, _VOCABULARY, length + 1, dtype=np.uint16))


def _numbered_pieces() -> bytes:
    """A SentencePiece model of 32,000 pieces that nobody has to train."""
    from sentencepiece import sentencepiece_model_pb2 as format

    model = format.ModelProto()
    kinds = format.ModelProto.SentencePiece
    for number, piece in enumerate(_pieces()):
        entry = model.pieces.add(piece=piece, score=-float(number))
        entry.type = kinds.UNKNOWN if number == 0 else kinds.USER_DEFINED if piece.startswith("<") else kinds.NORMAL
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.vocab_size = _VOCABULARY
    for name in ("bos_id", "eos_id", "pad_id"):
        setattr(model.trainer_spec, name, -1)
    return bytes(model.SerializeToString())


def _pieces() -> Iterator[str]:
    special = ("<unk>", "<s>", "</s>", "<pad>", "<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<BOS>", "<EOS>")
    yield from special
    yield from (f"piece{number}" for number in range(_VOCABULARY - len(special)))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ThroughputSettings, measure, argv, description=__doc__, example="benchmarks/pretrain_throughput.py")


if __name__ == "__main__":
    raise SystemExit(main())
