"""How fast preprocess_data.py encodes, beside Megatron-DeepSpeed's tools/preprocess_data.py on the same input.

    python benchmarks/preprocess_speed.py --input_tokenizer_file tokenizer.model --workers 1 2 \
        --megatron_dir .cache/megatron-deepspeed/COMMIT

The input is the docstrings of the standard library, repeated to the size asked for. Seconds are those of the whole
command, start-up included, the best of `--repeats`; CPU seconds tell more on a machine that others use too. The
outputs are compared byte for byte.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train import cli
from train.data.docstrings import docstring_documents
from train.errors import UserError
from train.process import Command, capture
from train.settings import setting

_OURS = Path(__file__).resolve().parent.parent / "scripts" / "step2_pretrain_model" / "preprocess_data.py"
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to measure."""

    input_tokenizer_file: Path = setting(help="SentencePiece model")
    megatron_dir: Path | None = setting(None, help="Megatron-DeepSpeed checkout; without one only ours is measured")
    workers: tuple[int, ...] = setting((1, 2), help="numbers of worker processes to measure")
    megabytes: int = setting(64, help="size of the input")
    document_characters: int = setting(2000, help="length of a document")
    repeats: int = setting(3, help="runs of each; the fastest counts")


def measure(settings: BenchmarkSettings) -> int:
    """Prints a table: tool, workers, seconds, MB/s, CPU seconds, and the machine's load before it.

    Raises:
        UserError: a run failed, or the bytes differ.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _write_input(folder / "in.jsonl", settings.megabytes * 1_000_000, settings.document_characters)
        print(f"{size / 1e6:.0f} MB, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
        print(f"{'tool':<10}{'workers':>8}{'seconds':>9}{'MB/s':>7}{'CPU s':>8}")
        for workers in settings.workers:
            _measure_one("ours", _our_command(settings, folder, workers), workers, size, settings.repeats)
            if settings.megatron_dir is not None:
                command = _their_command(settings, settings.megatron_dir, folder, workers)
                _measure_one("megatron", command, workers, size, settings.repeats)
                _compare(folder)
    return 0


def _write_input(file: Path, size: int, document_characters: int) -> int:
    text = "\n\n".join(document["text"] for document in docstring_documents())
    pieces = [text[start : start + document_characters] for start in range(0, len(text), document_characters)]
    lines = [json.dumps({"text": piece}, ensure_ascii=False).encode() + b"\n" for piece in pieces]
    written = 0
    with file.open("wb") as stream:
        while written < size:
            for line in lines:
                written += stream.write(line)
    return written


def _our_command(settings: BenchmarkSettings, folder: Path, workers: int) -> Command:
    arguments = ["--input", folder / "in.jsonl", "--input_tokenizer_file", settings.input_tokenizer_file]
    arguments += ["--output_prefix", folder / "ours", "--overwrite", "--workers", workers]
    return Command((sys.executable, str(_OURS), *map(str, arguments)))


def _their_command(settings: BenchmarkSettings, checkout: Path, folder: Path, workers: int) -> Command:
    arguments = ["--input", folder / "in.jsonl", "--tokenizer-type", "SentencePieceTokenizer", "--append-eod"]
    arguments += ["--tokenizer-model", settings.input_tokenizer_file, "--output-prefix", folder / "megatron"]
    program = checkout / "tools" / "preprocess_data.py"
    return Command((sys.executable, str(program), *map(str, arguments), "--workers", str(workers)))


def _measure_one(name: str, command: Command, workers: int, size: int, repeats: int) -> None:
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        status, output = capture(command, timeout_s=_TIMEOUT_S)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(_cpu_seconds() - cpu_started)
        if status:
            raise UserError(f"{command.text()} failed with {status}:\n{output[-2000:]}")
    rate = size / min(seconds) / 1e6
    print(f"{name:<10}{workers:>8}{min(seconds):>9.1f}{rate:>7.1f}{min(cpu_seconds):>8.1f}", flush=True)


def _cpu_seconds() -> float:
    """What all finished child processes have used, their own children included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _compare(folder: Path) -> None:
    for extension in ("bin", "idx"):
        ours, theirs = (folder / f"{name}_text_document.{extension}" for name in ("ours", "megatron"))
        if ours.read_bytes() != theirs.read_bytes():
            raise UserError(f"the .{extension} files differ: ours is not what Megatron-DeepSpeed's tool writes.")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; see --help."""
    example = "python benchmarks/preprocess_speed.py --input_tokenizer_file tokenizer.model --workers 1 2"
    return cli.run(BenchmarkSettings, measure, argv, description=__doc__, example=example)


if __name__ == "__main__":
    raise SystemExit(main())
