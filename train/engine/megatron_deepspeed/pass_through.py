"""`--megatron_arguments`: any further flag of upstream's pretrain_gpt.py, checked against upstream's own list.

    refuse(problems("--rampup-batch-size 4 4 100", rendered, known_flags(checkout)))
    arguments = rendered + words("--rampup-batch-size 4 4 100", rendered)

A flag that a recipe already renders is refused: one number, stated in one place.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import shlex
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from train.errors import UserError
from train.settings import is_number

# What a checkpoint decides as soon as there is one; further arguments say it for the beginning of a run.
_OF_A_CHECKPOINT = "--make-vocab-size-divisible-by"
# What settings of the recipe decide, whether this run's arguments name it or not: DeepSpeed's file, the checks and the
# record of the run go by the setting.
_SETTINGS = {
    "--bf16": "--precision bf16",
    "--fp16": "--precision fp16",
    "--no-pipeline-parallel": "--no_pipeline_parallel",
    "--sequence-parallel": "--sequence_parallel",
    "--checkpoint-activations": "--activation_checkpoint",
    "--train-iters": "--train_tokens",
    "--train-tokens": "--train_tokens",
    "--load": "--initial_checkpoint_dir",
    "--load-tag": "--initial_checkpoint_dir",
    "--finetune": "--initial_checkpoint_dir",
    "--universal-checkpoint": "other sizes, and start the run again",
}
_CHECKING_FILES = ("arguments.py", "microbatches.py")  # where upstream asserts that its arguments fit each other
_FLAG = re.compile(r"""add_argument\(\s*((?:['"]--?[\w-]+['"]\s*,?\s*)+)""")


def known_flags(checkout: Path) -> frozenset[str]:
    """Every flag that upstream's `megatron/arguments.py` and DeepSpeed's own parser know."""
    text = (checkout / "megatron" / "arguments.py").read_text(encoding="utf-8")
    names = {name for group in _FLAG.findall(text) for name in re.findall(r"--?[\w-]+", group)}
    return frozenset(names | {"--deepspeed", "--deepspeed_config"})


def words(text: str, rendered: Sequence[str] = ()) -> tuple[str, ...]:
    """The text of `--megatron_arguments` cut as a shell cuts it, without what the loaded checkpoint decides."""
    given = tuple(shlex.split(text))
    return _without(given, _OF_A_CHECKPOINT) if _OF_A_CHECKPOINT in rendered else given


def without(text: str, flag: str) -> str:
    """The text of `--megatron_arguments` without a flag and its values."""
    return shlex.join(_without(words(text), flag))


def _without(given: Sequence[str], flag: str) -> tuple[str, ...]:
    kept, drops = [], False
    for word in given:
        if word.startswith("--"):
            drops = word.partition("=")[0] == flag
        if not drops:
            kept.append(word)
    return tuple(kept)


def problems(text: str, rendered: Sequence[str], known: Collection[str]) -> list[str]:
    """What is wrong with further arguments; empty when nothing is.

    Args:
        text: what `--megatron_arguments` was given.
        rendered: the arguments that the recipe has become.
        known: upstream's flags.
    """
    found = []
    given = words(text, rendered)
    if given and not given[0].startswith("--"):
        found.append(f"--megatron_arguments {text!r}: {given[0]!r} is no flag; start with one, such as --swiglu.")
    short = [word for word in given if re.fullmatch(r"-[^-].*", word) and not is_number(word)]
    found += [f"--megatron_arguments: {word} is no flag of a training; flags begin with two dashes." for word in short]
    taken = {word for word in rendered if word.startswith("--")}
    for flag in (word.partition("=")[0] for word in given if word.startswith("--")):
        if flag in taken:
            found.append(f"--megatron_arguments: {flag} is already rendered from the recipe; set it there.")
        elif flag in _SETTINGS:
            found.append(f"--megatron_arguments: {flag} is a setting of its own; pass {_SETTINGS[flag]}.")
        elif flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            meant = f" did you mean {near[0]}?" if near else ""
            found.append(f"--megatron_arguments: Megatron-DeepSpeed has no {flag};{meant or ' see its --help.'}")
    if "--reset-attention-mask" in given and ("--no-pipeline-parallel" not in taken or "--use-flash-attn-v2" in taken):
        found.append(
            "--megatron_arguments: --reset-attention-mask has no effect with the pipeline module, nor with flash"
            " attention, which both know one mask only; add --no_pipeline_parallel, and on GPUs --attention eager."
        )
    return found


@contextlib.contextmanager
def refusals_told(text: str) -> Iterator[None]:
    """Tells what upstream itself says against the values of further arguments, in place of its traceback.

    Args:
        text: what `--megatron_arguments` was given; without any a refusal is a mistake of this project's.

    Raises:
        UserError: upstream's parser, or a check of its own, refused them.
    """

    def error(_parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise UserError(f"--megatron_arguments {text!r}: Megatron-DeepSpeed says: {message}; change them.")

    former = argparse.ArgumentParser.error
    try:
        if text:
            argparse.ArgumentParser.error = error  # type: ignore[method-assign, assignment]
        yield
    except AssertionError as refusal:
        place = traceback.extract_tb(refusal.__traceback__)[-1]
        if not text or Path(place.filename).name not in _CHECKING_FILES:
            raise
        said = str(refusal) or place.line or "an assertion failed"
        raise UserError(f"--megatron_arguments {text!r}: Megatron-DeepSpeed says: {said}; change them.") from None
    finally:
        argparse.ArgumentParser.error = former  # type: ignore[method-assign]
