"""How a run is: from its folder, and from the scheduler that it was handed to, where one can be asked.

status.sh output/gpt [--job_name NAME] [--json]
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import run_facts
from train.cluster import queue
from train.cluster.job_folder import read_exit
from train.errors import EXIT_OK
from train.monitor.progress import duration
from train.run_facts import RunFacts
from train.settings import setting

_LOCKS = Path("/proc/locks")
_SILENCE_FACTOR, _SILENCE_S = (
    10,
    300.0,
)  # so many usual intervals without a word, and at least so long, looks like a hang
_LOG_LINES = 5


@dataclass(frozen=True)
class StatusSettings:
    """Which run."""

    folder: Path = setting(help="--output_model_dir of a pretraining, or --output_dir of a finetuning")
    job_name: str | None = setting(None, help="one run of several in a pretraining's folder")
    json: bool = setting(False, help="print one JSON object for programs")


@dataclass(frozen=True)
class Job:
    """One job of the newest submission.

    Attributes:
        job_id: its number.
        state: queued, running, ended or unknown.
        reason: the scheduler's own words.
        exit_code: as the job itself recorded it; None when it is not the last one that ended.
        log: what it printed.
    """

    job_id: str
    state: str
    reason: str
    exit_code: int | None
    log: Path


def status(wanted: StatusSettings) -> int:
    """Prints the state of each run in a folder.

    Raises:
        UserError: the folder holds no run.
    """
    found = [(facts, jobs_of(facts)) for facts in run_facts.find(wanted.folder, wanted.job_name)]
    if wanted.json:
        runs = [as_plain(facts, jobs) for facts, jobs in found]
        print(json.dumps({"folder": str(wanted.folder.absolute()), "runs": runs}, indent=2, default=str))
        return 0
    print("\n\n".join("\n".join(describe(facts, jobs)) for facts, jobs in found))
    return 0


def jobs_of(facts: RunFacts) -> list[Job]:
    """The jobs of the newest submission, asked of their scheduler."""
    record = facts.job_folder.read()
    if record is None:
        return []
    ended = read_exit(record.exit_record)
    jobs = []
    for job_id, log in zip(record.ids, record.logs, strict=False):
        found = queue.ask(record.scheduler, job_id)
        code = ended[1] if ended is not None and ended[0] == job_id and not found.is_alive else None
        jobs.append(Job(job_id, found.state, found.reason, code, log))
    return jobs


def state_of(facts: RunFacts, jobs: list[Job]) -> str:
    """One word: running, queued, done, ended, or not begun. What runs now says more than what was written before."""
    states = {job.state for job in jobs}
    if queue.RUNNING in states or is_locked(facts.lock):
        return "running"
    if facts.is_done:
        return "done"
    if queue.QUEUED in states:
        return "queued"
    if queue.UNKNOWN in states and facts.exit_code is None and facts.silent_s is not None:
        return "not known"
    has_ended = queue.ENDED in states or facts.step is not None or facts.exit_code is not None
    return "ended" if has_ended or facts.checkpoint is not None else "not begun"


def is_silent(facts: RunFacts) -> bool:
    """Whether nothing was reported for much longer than usual."""
    if facts.silent_s is None or facts.usual_interval_s is None:
        return False
    return facts.silent_s > max(_SILENCE_S, _SILENCE_FACTOR * facts.usual_interval_s)


def describe(facts: RunFacts, jobs: list[Job]) -> list[str]:
    """The lines for people."""
    state = state_of(facts, jobs)
    lines = [f"{facts.name}: {state} ({facts.kind})"]
    for job in jobs:
        code = "" if job.exit_code is None else f", exit code {job.exit_code}"
        lines.append(f"  job {job.job_id}: {job.state}{f' ({job.reason})' if job.reason else ''}{code}")
    if facts.step is not None:
        lines.append(f"  step: {_step(facts)}")
    if facts.loss is not None:
        held_out = "" if facts.eval_loss is None else f", held out {facts.eval_loss:.4f}"
        speed = "" if facts.tokens_per_second is None else f", {facts.tokens_per_second:,.0f} tokens/s"
        lines.append(f"  loss: {facts.loss:.4f}{held_out}{speed}")
    if state in ("running", "not known") and facts.seconds_left is not None:
        lines.append(f"  left: about {duration(facts.seconds_left)}")
    if facts.checkpoint is not None:
        age = "" if facts.checkpoint_age_s is None else f", {duration(facts.checkpoint_age_s)} ago"
        lines.append(f"  checkpoint: {facts.checkpoint.name}{age}")
    if facts.silent_s is not None and state != "done":
        usual = "" if facts.usual_interval_s is None else f"; usually every {duration(facts.usual_interval_s)}"
        lines.append(f"  last progress line: {duration(facts.silent_s)} ago{usual}")
    if state == "running" and is_silent(facts):
        lines.append("  warning: nothing was reported for much longer than usual: it may hang")
    if state != "running" and facts.exit_code not in (None, EXIT_OK):
        lines.append(f"  ended with exit code {facts.exit_code}:")
        lines += [f"    {line}" for problem in facts.problems for line in problem.splitlines()]
    log = _log_of_interest(jobs)
    if log is not None:
        lines.append(f"  log: {log}")
        if state == "ended" and facts.exit_code in (None, EXIT_OK):  # the ranks said nothing: the launcher did
            lines += [f"    | {line}" for line in _last_lines(log)]
    return lines


def as_plain(facts: RunFacts, jobs: list[Job]) -> dict[str, Any]:
    """The same for programs."""
    plain = {
        field.name: getattr(facts, field.name)
        for field in dataclasses.fields(facts)
        if field.name not in ("job_folder", "lock")
    }
    return {
        **plain,
        "state": state_of(facts, jobs),
        "is_silent": is_silent(facts),
        "jobs": [dataclasses.asdict(job) for job in jobs],
    }


def is_locked(file: Path) -> bool:
    """Whether a process here holds the run's lock, from the kernel's table: taking it would be in the way."""
    try:
        status, table = file.stat(), _LOCKS.read_text(encoding="ascii")
    except OSError:
        return False
    mark = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any("FLOCK" in line and mark in line.split() for line in table.splitlines())


def _step(facts: RunFacts) -> str:
    if not facts.total_steps:
        return f"{facts.step:,}"
    return f"{facts.step:,} of {facts.total_steps:,} ({(facts.step or 0) / facts.total_steps:.0%})"


def _log_of_interest(jobs: list[Job]) -> Path | None:
    """The log of the job that runs, else of the one that ended last."""
    running = [job.log for job in jobs if job.state == queue.RUNNING]
    written = [job.log for job in jobs if job.log.is_file()]
    return next(iter((*running, *reversed(written))), None)


def _last_lines(log: Path) -> list[str]:
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
