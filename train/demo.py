"""The five steps in a row on this machine's CPU, through the launchers a user runs, and a table of what came out.

    make demo

Each step skips itself when its output is there for the same settings and inputs, so an interrupted demo goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, process
from train.errors import EXIT_USER, UserError
from train.process import Command
from train.settings import setting

_SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# Packages that are installed anyway and document themselves well: more text than the standard library alone has.
_PACKAGES = "numpy,torch,datasets,huggingface_hub,rich"
_QUESTIONS = 3
_CLONE_TIMEOUT_S = 20


@dataclass(frozen=True)
class DemoSettings:
    """Where the demo writes, and what trains."""

    output_dir: Path = setting(Path("output/demo"), help="folder for everything the demo makes")
    engine: str = setting("auto", help="pretraining engine", choices=("auto", "transformers", "megatron-deepspeed"))
    vocab_size: int = setting(4000, help="pieces of the tokenizer")
    train_tokens: str = setting("1M", help="tokens to pretrain on")
    finetune_steps: int = setting(250, help="optimizer steps of finetuning")
    dry_run: bool = setting(False, help="print the commands, and run nothing", flag_only=True)


@dataclass(frozen=True)
class Stage:
    """One launcher of the demo.

    Attributes:
        step: the number and name the table shows.
        script: the launcher, relative to scripts/.
        flags: its flags by name.
        output: what it makes, for people to look at.
        manifest: what it writes when it is done, a folder or a file.
        summary: reads the results, in numbers, from the finished manifest's record.
    """

    step: str
    script: str
    flags: Mapping[str, object]
    output: Path
    manifest: Path
    summary: Callable[[dict[str, Any]], str]

    @property
    def command(self) -> Command:
        program = "bash" if self.script.endswith(".sh") else sys.executable
        words = [word for name, value in self.flags.items() for word in (f"--{name}", str(value))]
        return Command((program, str(_SCRIPTS / self.script), *words), {"TRAIN_PYTHON": sys.executable})


def demo(settings: DemoSettings) -> int:
    """Runs all stages, then shows the table."""
    stages = list(build_stages(settings))
    if settings.dry_run:
        for stage in stages:
            print(stage.command.text())
        return 0
    if settings.engine == "auto":
        _try_to_install_megatron()
    started = time.monotonic()
    rows = []
    for stage in stages:
        print(f"\n=== {stage.step}", flush=True)
        before = _finished_at(stage.manifest)
        begun = time.monotonic()
        code = process.run(stage.command)
        if code:
            goes_on = "" if code == EXIT_USER else "; called again, the demo goes on from here"
            raise UserError(f"{stage.step} ended with exit code {code}{goes_on}.", exit_code=code)
        done_before = before is not None and before == _finished_at(stage.manifest)
        seconds = "done before" if done_before else f"{time.monotonic() - begun:.0f} s"
        rows.append((stage.step, seconds, stage.summary(manifest.read(stage.manifest))))
    answers = _answers(settings)
    _show(rows, answers, title=f"five steps in {time.monotonic() - started:.0f} s")
    for stage in stages:
        print(f"{stage.step}: {stage.output}")
    return 0


def build_stages(settings: DemoSettings) -> Iterator[Stage]:
    """The launchers with their arguments, in order."""
    out = settings.output_dir
    data, tokenizer, tokens = out / "data", out / "tokenizer" / "demo.model", out / "tokens" / "docstrings"
    pretrained, base, chat = out / "pretrained", out / "huggingface" / "gpt_demo", out / "huggingface" / "gpt_demo_chat"
    yield Stage(
        "0 sample data",
        "common/make_sample_data.py",
        {"output_dir": data, "packages": _PACKAGES},
        data,
        data,
        lambda record: _numbers(record, "documents", "characters", "conversations"),
    )
    yield Stage(
        "1 train tokenizer",
        "step1_train_tokenizer/train_sentencepiece_tokenizer.py",
        {
            "input": data / "documents.jsonl",
            "model_prefix": tokenizer.with_suffix(""),
            "vocab_size": settings.vocab_size,
            "input_sentence_size": 200_000,
        },
        tokenizer,
        tokenizer.with_suffix(".manifest.json"),
        _tokenizer_summary,
    )
    yield Stage(
        "2 preprocess data",
        "step2_pretrain_model/preprocess_data.sh",
        {
            "input": data / "documents.jsonl",
            "input_tokenizer_file": tokenizer,
            "output_prefix": tokens,
            "count_eod_in_index": True,
        },
        tokens.with_name(tokens.name + "_text_document.bin"),
        tokens.with_name(tokens.name + "_text_document.manifest.json"),
        lambda record: _numbers(record, "documents", "tokens"),
    )
    yield Stage(
        "2 pretrain model",
        "step2_pretrain_model/pretrain.sh",
        {
            "recipe": "demo",
            "input_tokenizer_file": tokenizer,
            "data_path": tokens.parent,
            "output_model_dir": pretrained,
            "train_tokens": settings.train_tokens,
            "engine": settings.engine,
        },
        pretrained / "checkpoint" / "gpt_demo",
        pretrained / "manifest" / "gpt_demo.json",
        _pretrain_summary,
    )
    yield Stage(
        "3 convert",
        "step3_upload_pretrained_model/convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh",
        {
            "input_tokenizer_file": tokenizer,
            "input_model_max_length": 256,
            "input_model_dir": pretrained / "checkpoint" / "gpt_demo",
            "output_tokenizer_and_model_dir": base,
        },
        base,
        base,
        lambda record: _parity_summary(base),
    )
    yield _upload("3 upload folder", "step3_upload_pretrained_model", "pretrained", base, out / "upload" / base.name)
    yield Stage(
        "4 finetune",
        "step4_finetune_model/finetune.sh",
        {
            "recipe": "demo",
            "model_name_or_path": base,
            "data_files": data / "conversations.jsonl",
            "eval_data_files": data / "held_out_conversations.jsonl",
            "max_steps": settings.finetune_steps,
            "output_dir": chat,
        },
        chat,
        chat,
        _finetune_summary,
    )
    yield _upload("5 upload folder", "step5_upload_finetuned_model", "finetuned", chat, out / "upload" / chat.name)


def _upload(step: str, folder: str, kind: str, model: Path, prepared: Path) -> Stage:
    return Stage(
        step,
        f"{folder}/upload_tokenizer_and_{kind}_model_to_huggingface_hub.py",
        {
            "input_tokenizer_and_model_dir": model,
            "output_model_name": model.name,
            "test_prompt_text": "Return the",
            "output_dir": prepared,
        },
        prepared,
        prepared.with_name(prepared.name + ".manifest.json"),
        lambda record: _numbers(record, "files", "bytes"),
    )


def _try_to_install_megatron() -> None:
    """Clones the engine when that takes seconds; without a network the transformers engine does."""
    from train.engine.megatron_deepspeed import checkout

    if checkout.find_checkout() is None:
        print(f"Megatron-DeepSpeed is not installed: cloning it, for {_CLONE_TIMEOUT_S} s at most", flush=True)
        script = str(_SCRIPTS / "common" / "install_megatron_deepspeed.sh")
        command = Command(("bash", script, "--timeout_s", str(_CLONE_TIMEOUT_S)), {"TRAIN_PYTHON": sys.executable})
        code, text = process.capture(command, timeout_s=300)
        why = next((line for line in text.splitlines() if line.startswith("error:")), f"exit code {code}")
        print("installed" if code == 0 else f"not to be had now ({why.removeprefix('error: ')})", flush=True)


def _numbers(record: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{record['results'][name]:,} {name}" for name in names)


def _tokenizer_summary(record: dict[str, Any]) -> str:
    results = record["results"]
    report = results["report"]
    return (
        f"vocabulary {results['vocabulary_size']:,}, {report['characters_per_token']:.2f} characters per token on"
        f" {report['documents']:,} unseen documents"
    )


def _pretrain_summary(record: dict[str, Any]) -> str:
    results = record["results"]
    return (
        f"{results['engine']}: {results['tokens']:,} tokens, loss {results['first_loss']:.3f} ->"
        f" {results['last_loss']:.3f}, held-out loss {results['eval_loss']:.3f}"
    )


def _parity_summary(folder: Path) -> str:
    proof = json.loads((folder / "verification.json").read_text(encoding="utf-8"))
    tokenizer, logits = proof["tokenizer"], proof["logits"]
    return (
        f"tokenizer {tokenizer['mismatches']} mismatches in {tokenizer['texts']:,} texts,"
        f" logits differ by {logits['relative_difference']:.1e} of {logits['tolerance']:.0e} allowed"
    )


def _finetune_summary(record: dict[str, Any]) -> str:
    results = record["results"]
    return (
        f"loss {results['first_loss']:.3f} -> {results['last_loss']:.3f},"
        f" held-out answers' loss {results['first_eval_loss']:.3f} -> {results['eval_loss']:.3f}"
    )


def _finished_at(path: Path) -> str | None:
    try:
        return manifest.read(path)["finished_at"]
    except UserError:
        return None


def _answers(settings: DemoSettings) -> list[tuple[str, str, str, str]]:
    """Some held-out questions: the true answer, the base model's, the finetuned model's."""
    held_out = settings.output_dir / "data" / "held_out_conversations.jsonl"
    lines = held_out.read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line)["messages"] for line in lines[:: max(1, len(lines) // _QUESTIONS)]][:_QUESTIONS]
    questions = [messages[0]["content"] for messages in chosen]
    folder = settings.output_dir / "huggingface"
    base, chat = (_generate(folder / name, questions, settings.output_dir) for name in ("gpt_demo", "gpt_demo_chat"))
    truths = [messages[1]["content"] for messages in chosen]
    return list(zip(questions, truths, base, chat, strict=True))


def _generate(model: Path, questions: list[str], output_dir: Path) -> list[str]:
    prompts = output_dir / "questions.txt"
    prompts.write_text("\n".join(questions) + "\n", encoding="utf-8")
    argv = [sys.executable, str(_SCRIPTS / "step4_finetune_model" / "generate.py"), "--json"]
    argv += ["--model_name_or_path", str(model), "--prompt_file", str(prompts), "--max_new_tokens", "40"]
    code, text = process.capture(Command(tuple(argv)), timeout_s=300)
    if code:
        raise UserError(f"generating with {model} ended with exit code {code}: {text}", exit_code=code)
    return [json.loads(line)["answer"] for line in text.splitlines() if line.startswith("{")]


def _show(rows: list[tuple[str, str, str]], answers: list[tuple[str, str, str, str]], *, title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    steps = Table(title=title)
    for name in ("step", "time", "result"):
        steps.add_column(name)
    for row in rows:
        steps.add_row(*map(Text, row))
    talk = Table(title="questions that finetuning did not see: a model this small learns the form of an answer")
    for name in ("question", "true answer", "before finetuning", "after finetuning"):
        talk.add_column(name, overflow="fold")
    for answer in answers:
        talk.add_row(*(Text(" ".join(said.split()) or "(white space only)") for said in answer))
    console = Console()
    console.print(steps)
    console.print(talk)
