"""What a scheduler says about a job: whether it waits, runs or has ended, and why.

queue.ask("slurm", "4711")
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from train import process
from train.process import Command

QUEUED, RUNNING, ENDED, UNKNOWN = "queued", "running", "ended", "unknown"
_TIMEOUT_S = 20
_SLURM_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_SLURM_RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
_PBS_STATES = {**dict.fromkeys("QHWT", QUEUED), **dict.fromkeys("RBESU", RUNNING), **dict.fromkeys("FXCM", ENDED)}
# How each scheduler says that it does not know a job, or not any more.
_GONE = re.compile(
    r"Invalid job id|do not exist|unknown job|Unknown Job Id|has finished|has completed", re.IGNORECASE
)  # fmt: skip


@dataclass(frozen=True)
class JobState:
    """A job, as its scheduler sees it.

    Attributes:
        state: queued, running, ended or unknown.
        reason: the scheduler's own words, or why it could not be asked.
    """

    state: str
    reason: str = ""

    @property
    def is_alive(self) -> bool:
        return self.state in (QUEUED, RUNNING)


def ask(scheduler: str, job_id: str) -> JobState:
    """Asks about one job; never raises: a machine without the scheduler's commands gives `unknown`."""
    code, text = process.capture(Command(build_question(scheduler, job_id)), timeout_s=_TIMEOUT_S)
    if scheduler == "slurm":
        return parse_squeue(code, text)
    if scheduler == "pbs":
        return parse_pbs(code, text)
    found = parse_qstat(job_id, code, text)
    if found.state != QUEUED:
        return found
    code, text = process.capture(Command(("qstat", "-j", job_id)), timeout_s=_TIMEOUT_S)
    return JobState(found.state, "; ".join([found.reason, *parse_pending_reasons(text)]) if code == 0 else found.reason)


def build_question(scheduler: str, job_id: str) -> tuple[str, ...]:
    """The argv that asks about a job."""
    if scheduler == "slurm":
        return ("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%S|%L")
    return ("qstat", "-x", "-f", job_id) if scheduler == "pbs" else ("qstat", "-u", "*")


def parse_squeue(code: int, text: str) -> JobState:
    """Reads `squeue --format='%T|%r|%S|%L'`: state, reason, expected or true start, time left (squeue(1))."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 3]
    if not rows:
        return _without_answer(code, text)
    state, reason, start, left = (word.strip() for word in rows[-1])
    if state in _SLURM_QUEUED:
        when = f", expected to start at {start}" if start not in ("N/A", "") else ""
        return JobState(QUEUED, f"{reason}{when}")
    if state in _SLURM_RUNNING:
        words = [state.lower()] * (state != "RUNNING") + [f"{left} left"] * (left not in ("UNLIMITED", "INVALID", ""))
        return JobState(RUNNING, ", ".join(words))
    return JobState(ENDED, state if reason in ("None", "", state) else f"{state} ({reason})")


def parse_qstat(job_id: str, code: int, text: str) -> JobState:
    """Reads Grid Engine's listing, `job-ID prior name user state ...` (qstat(1)). A job that is not in it has ended."""
    if code:
        return _without_answer(code, text)
    for line in text.splitlines():
        words = line.split()
        if len(words) < 5 or words[0] != job_id:
            continue
        state = words[4]
        if "E" in state:
            return JobState(QUEUED, f"{state}: it stands in error, see qstat -j {job_id}")
        if "q" in state:
            return JobState(QUEUED, f"{state}: held, it waits for another job" if "h" in state else state)
        return JobState(RUNNING, "" if state == "r" else state)
    return JobState(ENDED)


def parse_pending_reasons(text: str) -> list[str]:
    """Why a job waits, from Grid Engine's `qstat -j ID`: jobs it waits for, errors, what the scheduler found."""
    found = []
    for line in text.splitlines():
        match = re.match(r"(jid_predecessor_list|error reason)\b[^:]*:\s+(.*)", line)
        if match:
            label = "after" if match[1].startswith("jid") else "error:"
            found.append(f"{label} {match[2].strip()}")
    scheduling = text.partition("scheduling info:")[2].strip()
    return list(dict.fromkeys(found)) + _first(line.strip() for line in scheduling.splitlines())


def parse_pbs(code: int, text: str) -> JobState:
    """Reads `qstat -x -f ID` of PBS: job_state, comment, Exit_status (qstat(1B))."""
    joined = re.sub(r"\n\t", "", text)  # long values go on in the next line
    values = dict(re.findall(r"^\s+(job_state|comment|Exit_status) = (.*)$", joined, re.MULTILINE))
    if "job_state" not in values:
        return _without_answer(code, text)
    state = _PBS_STATES.get(values["job_state"].strip(), UNKNOWN)
    reason = values.get("comment", "").strip()
    if state == ENDED and "Exit_status" in values:
        reason = f"exit code {values['Exit_status'].strip()}"
    return JobState(state, reason)


def _without_answer(code: int, text: str) -> JobState:
    if code == 0 or _GONE.search(text):
        return JobState(ENDED)
    return JobState(UNKNOWN, " / ".join(_first(line.strip() for line in text.splitlines())) or f"exit code {code}")


def _first(lines: Iterable[str], limit: int = 3) -> list[str]:
    return [line for line in lines if line][:limit]
