"""How exactly exports of Megatron-DeepSpeed's checkpoints compute what the engine computed, layout by layout.

    python benchmarks/export_parity.py --engine_dirs .cache/megatron-deepspeed/COMMIT,.cache/megatron-deepspeed/OTHER

Each cell of the table is one run of the launchers on CPU processes: pretrain.sh trains a tiny model with large weights
and records its own logits, the converter of step 3 exports the checkpoint and verifies it against them. The number is
the largest difference of the logits, relative to the largest logit. Beside them stands what two mistakes would have
cost, the least over the engines: with smaller weights they would pass unseen.

Finished cells are kept in --output_dir and not run again, but for those that do not run, which say why. Exit code 3
when an export differs from its engine.
"""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import wrong_exports

from train import cli, outputs, process
from train.checkpoint import verification
from train.checkpoint.megatron import layout as megatron_layout
from train.checkpoint.megatron import qkv_layout
from train.checkpoint_folders import GOLDEN_LOGITS
from train.engine.megatron_deepspeed import checkout
from train.errors import EXIT_VERIFICATION, UserError, VerificationError
from train.settings import setting

_SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
_CONVERT = "step3_upload_pretrained_model/convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh"
_TIMEOUT_S = 600.0
_STEPS, _BATCH, _LENGTH = 4, 8, 32
# More heads and key-value groups than tensor ranks: with one of each per rank both orders of the rows are the same.
_MODEL = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 16, "init_method_std": 0.2}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT": {"architecture": "gpt2"},
    "Llama-GQA": {"architecture": "llama", "num_key_value_heads": 8, "ffn_hidden_size": 256},
}
_FP32 = {"precision": "fp32"}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {**_FP32, "num_processes": 1},
    "TP2": {**_FP32, "num_processes": 2, "tensor_parallel_size": 2},
    "TP4": {**_FP32, "num_processes": 4, "tensor_parallel_size": 4},
    "PP2": {**_FP32, "num_processes": 2, "pipeline_parallel_size": 2},
    "TP2 x PP2": {**_FP32, "num_processes": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "ZeRO-1, DP2, bf16": {"precision": "bf16", "num_processes": 2, "zero_stage": 1},
    "TP2, no pipeline": {**_FP32, "num_processes": 2, "tensor_parallel_size": 2, "no_pipeline_parallel": True},
}


@dataclass(frozen=True)
class ParitySettings:
    """Which cells of the table to make."""

    output_dir: Path = setting(Path("output/export_parity"), help="folder for the runs and the finished cells")
    engine_dirs: tuple[str, ...] = setting(
        (), help="checkouts of Megatron-DeepSpeed; without one, the installed one", separator=","
    )
    architectures: tuple[str, ...] = setting(tuple(_ARCHITECTURES), help=", ".join(_ARCHITECTURES), separator=",")
    layouts: tuple[str, ...] = setting(tuple(_LAYOUTS), help=f"of: {'; '.join(_LAYOUTS)}", separator=";")

    def problems(self) -> Iterator[str]:
        for name, given, known in (
            ("architectures", self.architectures, _ARCHITECTURES),
            ("layouts", self.layouts, _LAYOUTS),
        ):
            for wrong in sorted(set(given) - set(known)):
                yield f"--{name} {wrong}: it is one of {'; '.join(known)}."


@dataclass(frozen=True)
class Cell:
    """One run: what it trained, and what came of it.

    Attributes:
        difference: relative; None when the run did not end.
        mistakes: relative difference by mistake.
        problem: why there is no number, or why the number is a failure; "" when all is well.
    """

    difference: float | None
    mistakes: dict[str, float]
    problem: str


def measure(settings: ParitySettings) -> int:
    """Fills the cells that are not there yet and prints the table.

    Raises:
        UserError: a checkout is missing, or the corpus cannot be made.
        VerificationError: an export does not compute what its engine computed.
    """
    engines = {engine.commit[:8]: engine for engine in _engines(settings.engine_dirs)}
    corpus = _corpus(settings.output_dir / "corpus")
    cells = {
        (architecture, layout, name): _cell(settings.output_dir, corpus, architecture, layout, engine)
        for architecture in settings.architectures
        for layout in settings.layouts
        for name, engine in engines.items()
    }
    print(f"\n{versions()}\n\n{table(cells)}")
    wrong = [f"{', '.join(key)}: {cell.problem}" for key, cell in cells.items() if cell.problem and cell.difference]
    if wrong:
        raise VerificationError(wrong)
    return 0


def table(cells: dict[tuple[str, str, str], Cell]) -> str:
    """Markdown: a row per model and layout, a column per engine, and what the mistakes would have given.

    Problems stand below it, by number.
    """
    problems = list(dict.fromkeys(cell.problem for cell in cells.values() if cell.problem))
    engines = list(dict.fromkeys(engine for _, _, engine in cells))
    mistakes = (wrong_exports.QKV, wrong_exports.ACTIVATION)
    lines = ["| " + " | ".join(("model", "layout", *engines, *(f"*{name}*" for name in mistakes))) + " |"]
    lines.append("|---|---|" + "---:|" * (len(engines) + len(mistakes)))
    for architecture, layout in dict.fromkeys((architecture, layout) for architecture, layout, _ in cells):
        row = [cells[architecture, layout, engine] for engine in engines]
        shown = [
            f"({problems.index(cell.problem) + 1})"
            if cell.problem
            else f"{cell.difference:.1e}"
            if cell.difference
            else "0"
            for cell in row
        ]
        for name in mistakes:
            values = [cell.mistakes[name] for cell in row if name in cell.mistakes]
            shown.append(f"*{min(values):.1e}*" if values else "")
        lines.append("| " + " | ".join((architecture, layout, *shown)) + " |")
    notes = [f"({number}) {problem}" for number, problem in enumerate(problems, start=1)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def versions() -> str:
    """The day, and what computed."""
    names = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Python {platform.python_version()}, {names}"


def reason(output: str, code: int) -> str:
    """Why a launcher failed, in a few words, from what it printed and its exit code."""
    lines = [line.strip() for line in output.splitlines()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?\w*(Error|Exception): ", line)]
    words = (raised or errors or [f"exit code {code} without a message"])[0]
    return re.sub(r"\s+", " ", re.sub(r"^\[rank\d+\]: ", "", words)).replace("|", "/")[:120]


def _cell(folder: Path, corpus: Path, architecture: str, layout: str, engine: checkout.Checkout) -> Cell:
    name = "-".join(re.findall(r"\w+", f"{architecture} {layout} {engine.commit[:8]}"))
    record = folder / "cells" / f"{name}.json"
    if record.is_file():
        return Cell(**json.loads(record.read_text(encoding="utf-8")))
    print(f"{architecture}, {layout}, {engine.commit[:8]} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as runs:
        cell = _run(Path(runs), corpus, architecture, layout, engine)
    if not cell.problem:  # a problem may be mended
        outputs.write_text(record, json.dumps(vars(cell), indent=2) + "\n")
    print(f"    {cell.problem or f'{cell.difference:.2g}'} {cell.mistakes or ''}", flush=True)
    return cell


def _run(folder: Path, corpus: Path, architecture: str, layout: str, engine: checkout.Checkout) -> Cell:
    tokenizer, job = corpus / "tokenizer.model", "parity"
    flags = _MODEL | _ARCHITECTURES[architecture] | _LAYOUTS[layout]
    flags |= {"engine": "megatron-deepspeed", "device": "cpu", "sequence_length": _LENGTH, "lr": "1e-3"}
    flags |= {"global_batch_size": _BATCH, "micro_batch_size": 2, "train_tokens": _STEPS * _BATCH * _LENGTH}
    flags |= {"save_interval": _STEPS, "eval_interval": 0, "log_interval": 1, "job_name": job}
    flags |= {"input_tokenizer_file": tokenizer, "data_path": corpus / "text_text_document"}
    flags |= {"output_model_dir": folder / "pretrained"}
    environment = {checkout.DIRECTORY_VARIABLE: str(engine.path)}
    code, said = _launch("step2_pretrain_model/pretrain.sh", flags, environment)
    if code != 0:
        return Cell(None, {}, f"does not run: {reason(said, code)}")
    step_dir, exported = folder / "pretrained" / "checkpoint" / job / f"global_step{_STEPS}", folder / "exported"
    flags = {"input_tokenizer_file": tokenizer, "input_model_max_length": _LENGTH, "input_model_dir": step_dir}
    code, said = _launch(_CONVERT, flags | {"output_tokenizer_and_model_dir": exported}, {})
    if code != 0:
        found = re.search(r"own by ([\d.e+-]+)", said)
        different = float(found[1]) if code == EXIT_VERIFICATION and found else None
        return Cell(different, {}, f"not exported: {reason(said, code)}")
    record = verification.read(exported)
    assert record is not None
    order, _ = qkv_layout.find(megatron_layout.open_checkpoint(step_dir), vocab_size=record["config"]["vocab_size"])
    tensor = int(_LAYOUTS[layout].get("tensor_parallel_size", 1))
    golden = step_dir / GOLDEN_LOGITS
    mistakes = wrong_exports.mistakes(exported, golden, qkv_layout=order, tensor_parallel_size=tensor)
    return Cell(float(record["logits"]["relative_difference"]), mistakes, "")


def _launch(script: str, flags: dict[str, Any], environment: dict[str, str]) -> tuple[int, str]:
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {"TRAIN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return process.capture(process.Command(("bash", str(_SCRIPTS / script), *words), environment), timeout_s=_TIMEOUT_S)


def _engines(folders: Sequence[str]) -> Iterator[checkout.Checkout]:
    if not folders:
        found = checkout.find_checkout()
        if found is None:
            raise UserError(checkout.why_missing())
        yield found
    for folder in folders:
        path = Path(folder).absolute()
        if not checkout.helpers_file(path).is_file():
            raise UserError(f"--engine_dirs {folder}: no installed Megatron-DeepSpeed; run {checkout.INSTALL_COMMAND}.")
        yield checkout.Checkout(path, checkout.commit_of(path), "named")


def _corpus(folder: Path) -> Path:
    """A tokenizer and tokens of the standard library's docstrings, made by the launchers; kept."""
    if folder.is_dir():
        return folder
    from train.data.docstrings import docstring_documents

    with outputs.new_folder(folder) as unfinished:
        text = unfinished / "text.jsonl"
        with text.open("w", encoding="utf-8") as file:
            for document in itertools.islice(docstring_documents(), 300):
                file.write(json.dumps({"text": document["text"]}) + "\n")
        tokenizer = unfinished / "tokenizer"
        for program, script, flags in (
            (sys.executable, "step1_train_tokenizer/train_sentencepiece_tokenizer.py",
             {"input": text, "model_prefix": tokenizer, "vocab_size": 500}),
            ("bash", "step2_pretrain_model/preprocess_data.sh",
             {"input": text, "input_tokenizer_file": f"{tokenizer}.model", "output_prefix": unfinished / "text"}),
        ):  # fmt: skip
            words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            command = process.Command((program, str(_SCRIPTS / script), *words), {"TRAIN_PYTHON": sys.executable})
            code, said = process.capture(command, timeout_s=_TIMEOUT_S)
            if code != 0:
                raise UserError(f"{script} failed: {reason(said, code)}")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ParitySettings, measure, argv, description=__doc__, example="benchmarks/export_parity.py")


if __name__ == "__main__":
    raise SystemExit(main())
