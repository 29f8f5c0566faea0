"""Where a recorded step's time went, rank beside rank.

show_profile.sh output/step2_pretrain_model [--job_name NAME] [--step 12] [--rank 3]
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.finetune.folder import FinetuneFolder
from train.monitor.time_shares import COMMUNICATION, KINDS, NOTHING
from train.settings import setting

_FILE = re.compile(r"step(\d+)_rank(\d+)\.json")
_COLUMNS = 8
_NAME_WIDTH = 90
_GAPS = 10


@dataclass(frozen=True)
class ProfileSettings:
    """Which recording, and how much of it."""

    folder: Path = setting(help="--output_model_dir of a pretraining, or --output_dir of a finetuning")
    job_name: str | None = setting(None, help="one run of several in a pretraining's folder")
    step: int | None = setting(None, help="one recorded step of several; the last one recorded when not given")
    rank: int = setting(0, help="the rank whose longest kernels are listed")


def show(settings: ProfileSettings) -> int:
    """Prints the table of all ranks and the longest kernels of one.

    Raises:
        UserError: nothing was recorded there, or more than one run was and none is named.
    """
    folder = _profile_dir(settings)
    found = {(int(match[1]), int(match[2])): file for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))}
    steps = sorted({step for step, _ in found})
    if not steps:
        raise _nothing(folder)
    step = max(steps) if settings.step is None else settings.step
    if step not in steps:
        raise UserError(f"--step {step}: {folder} has {_listed(steps)}.")
    ranks = {rank: _read(file) for (of, rank), file in sorted(found.items()) if of == step}
    if settings.rank not in ranks:
        raise UserError(f"--rank {settings.rank}: {folder} has step {step} of {_listed(sorted(ranks), 'rank')}.")
    print(f"step {step:,} in {folder}\n")
    print("\n".join(table(ranks)))
    print(f"\nlongest on rank {settings.rank}:\n")
    print("\n".join(longest(ranks[settings.rank])))
    print(f"\nnothing ran longest on rank {settings.rank} between:\n")
    print("\n".join(gaps(ranks[settings.rank])))
    trace = folder / f"step{step}_rank{settings.rank}.trace.json.gz"
    print(f"\nthe whole of it: open {shlex.quote(str(trace))} at https://ui.perfetto.dev")
    return 0


def table(ranks: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A Markdown table: a row for each kind of work, in milliseconds, and a column for each rank.

    Of more than eight ranks the first and those at the ends are shown: the ones that wait least and most.
    """
    shown = sorted(ranks)
    title = "milliseconds"
    if len(shown) > _COLUMNS:
        by_waiting = sorted(shown, key=lambda rank: _waiting(ranks[rank]))
        shown = sorted({shown[0], *by_waiting[: _COLUMNS // 2 - 1], *by_waiting[-(_COLUMNS // 2) :]})
        title = f"milliseconds; {len(shown)} of {len(ranks)} ranks: the first, and those that wait least and most"
    lines = [f"| {title} | " + " | ".join(f"rank {rank}" for rank in shown) + " |", "|---|" + "---:|" * len(shown)]
    for kind in KINDS:
        cells = (_cell(ranks[rank]["kinds"].get(kind, 0.0), ranks[rank]["seconds"]) for rank in shown)
        lines.append(f"| {_LABELS.get(kind, kind)} | " + " | ".join(cells) + " |")
    lines.append("| the step | " + " | ".join(f"{1000 * ranks[rank]['seconds']:,.1f}" for rank in shown) + " |")
    hidden = (_cell(ranks[rank]["hidden_communication"], ranks[rank]["seconds"]) for rank in shown)
    lines.append("| communication beside computation | " + " | ".join(hidden) + " |")
    return lines


_LABELS = {
    COMMUNICATION: "communication alone, and waiting for other ranks in it",
    NOTHING: "nothing: waiting for Python, data or other ranks",
}


def longest(rank: Mapping[str, Any]) -> list[str]:
    """A Markdown table of the kernels that took the most time."""
    lines = ["| kernel | kind | calls | ms | |", "|---|---|---:|---:|---:|"]
    for kernel in rank["longest"]:
        name = _short(kernel["name"], _NAME_WIDTH)
        share = kernel["seconds"] / rank["seconds"]
        lines.append(
            f"| `{name}` | {kernel['kind']} | {kernel['calls']:,} | {1000 * kernel['seconds']:,.1f} | {share:.1%} |"
        )
    return lines


def gaps(rank: Mapping[str, Any]) -> list[str]:
    """A Markdown table of the kernels between which nothing ran for longest."""
    lines = ["| after | before | times | ms | |", "|---|---|---:|---:|---:|"]
    for gap in rank["gaps"][:_GAPS]:
        after, before = (_short(gap[name], _NAME_WIDTH // 2) for name in ("after", "before"))
        share = gap["seconds"] / rank["seconds"]
        lines.append(f"| `{after}` | `{before}` | {gap['calls']:,} | {1000 * gap['seconds']:,.1f} | {share:.1%} |")
    return lines


def _short(name: str, width: int) -> str:
    name = " ".join(name.replace("|", "/").split())
    return name if len(name) <= width else name[: width - 3] + "..."


def _waiting(rank: Mapping[str, Any]) -> float:
    return float(rank["kinds"][COMMUNICATION] + rank["kinds"][NOTHING])


def _cell(seconds: float, of_seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ({seconds / of_seconds:.0%})"


def _profile_dir(settings: ProfileSettings) -> Path:
    """The folder with the recordings of one run."""
    unfinished = FinetuneFolder(settings.folder.absolute()).profile_dir
    root = unfinished if unfinished.is_dir() else settings.folder / "profile"
    if not root.is_dir():
        raise _nothing(settings.folder)
    if any(_FILE.fullmatch(file.name) for file in root.iterdir()):
        return root
    jobs = sorted(path.name for path in root.iterdir() if path.is_dir())
    name = settings.job_name or (jobs[0] if len(jobs) == 1 else None)
    if name not in jobs:
        given = "--job_name is needed" if name is None else f"--job_name {name}"
        raise UserError(f"{given}: {root} has {', '.join(jobs) or 'no recording'}.")
    return root / name


def _nothing(folder: Path) -> UserError:
    return UserError(
        f"{folder}: nothing was recorded there; --profile_step of pretrain.sh and finetune.sh records a step."
    )


def _listed(numbers: Sequence[int], what: str = "step") -> str:
    return f"{what} {', '.join(map(str, numbers))}"


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        table({0: record}), longest(record), gaps(record)  # all that will be shown of it is there
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise UserError(f"{file} is damaged: record the step again.") from None
    return record
