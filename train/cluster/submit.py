"""Hands a run to a scheduler: job script and settings into the run's folder, sbatch or qsub, and who to ask about it.

    return submit(pretrain_sh, settings.to_yaml(recipe), recipe.job, JobFolder.of_pretraining(root, name), ...)

Secrets stay here: variables that look like one are taken from sbatch's and qsub's environment, since a scheduler keeps
what it is handed in files.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from train import outputs, process
from train.cluster import job_script, queue, submission
from train.cluster.directives import NAMES
from train.cluster.job_folder import JobFolder, JobRecord
from train.cluster.settings import ClusterSettings, SubmitSettings
from train.cluster.submission import Submission
from train.errors import UserError
from train.process import Command

_STATUS_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "common" / "status.sh"
_TIMEOUT_S = 120  # a busy scheduler takes its time
# How each scheduler says that it has taken a job; its other words may stand around it.
_ANSWERS = {
    "slurm": r"^Submitted batch job (\d+)",
    "gridengine": r'^Your job (\d+) \(".*"\) has been submitted',
    "pbs": r"^(\d+(?:\.[\w.-]+)?)\s*$",
}
_PROGRAMS = {"slurm": ("sbatch", "scancel"), "gridengine": ("qsub", "qdel"), "pbs": ("qsub", "qdel")}
_OWN_JOB = re.compile(r"SLURM_(?!CONF$)")  # a job that is submitted in a job must not take itself for that one


def submit(
    launcher: Path,
    settings_yaml: str,
    job: SubmitSettings,
    folder: JobFolder,
    *,
    cluster: ClusterSettings,
    first_arguments: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Submits a launcher that has a --recipe: `--num_jobs` jobs in a row, each once the one before has ended.

    Args:
        launcher: the .sh of step 2 or 4.
        settings_yaml: the resolved settings; the job's --recipe.
        job: what is asked for; `job.submit` names the scheduler.
        folder: where script, settings and logs go.
        cluster: its number of nodes and time budget are filled in from `job`.
        first_arguments: flags for the first start alone, such as --overwrite.
        dry_run: print the script, and call nothing.

    Raises:
        UserError: the scheduler refused, or cannot be told; nothing is left in its queue then.
    """
    ready = submission.prepare(launcher, settings_yaml, job, folder, cluster=cluster, first_arguments=first_arguments)
    if dry_run:
        ready.show()
        return 0
    refuse_second(folder, job)
    tell_about_secrets(cluster)
    announce(ready, hand_over(ready, succeeded=job.after_job))
    return 0


def hand_over(ready: Submission, *, succeeded: str = "") -> JobRecord:
    """Writes the files and submits the chain.

    Args:
        ready: what to submit.
        succeeded: id of a job that must have succeeded before any of the chain starts.

    Raises:
        UserError: the scheduler refused a job; those of this chain that it had taken already are cancelled.
    """
    files = ready.files
    outputs.write_text(files.script, ready.script)
    files.script.chmod(0o755)
    if ready.settings_yaml is not None:
        outputs.write_text(files.settings, ready.settings_yaml)
    ids: list[str] = []
    try:
        for _ in range(ready.job.num_jobs):
            ids.append(_submit_one(ready, succeeded=succeeded, ended=ids[-1] if ids else ""))
    except BaseException as error:
        notes = cancel(ready.scheduler, ids)
        for file in (files.script, files.settings):
            file.unlink(missing_ok=True)
        if isinstance(error, UserError):
            raise UserError([*error.problems, *notes]) from None
        raise
    record = JobRecord(
        scheduler=ready.scheduler,
        ids=tuple(ids),
        script=files.script,
        settings=None if ready.settings_yaml is None else files.settings,
        logs=tuple(files.log(job_id) for job_id in ids),
        exit_record=files.exit_record,
        submitted_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    ready.folder.write(record)
    return record


def announce(ready: Submission, record: JobRecord) -> None:
    """Prints the jobs, their logs and how to watch them."""
    jobs = "jobs" if len(record.ids) > 1 else "job"
    print(f"submitted: {NAMES[record.scheduler]} {jobs} {', '.join(record.ids)} ({ready.folder.name})")
    print(f"script:    {record.script}")
    print(f"log:       {record.logs[0]}")
    print(f"watch:     tail -F {shlex.quote(str(record.logs[0]))}")
    run = ready.folder.run
    if run is not None:
        name = f" --job_name {shlex.quote(ready.folder.name)}" if run.name != ready.folder.name else ""
        print(f"status:    bash {shlex.quote(str(_STATUS_SCRIPT))} {shlex.quote(str(run))}{name}")
    print(f"cancel:    {shlex.join((_PROGRAMS[record.scheduler][1], *record.ids))}", flush=True)


def cancel(scheduler: str, ids: Sequence[str]) -> list[str]:
    """Takes jobs out of the queue again; returns what to tell of it."""
    if not ids:
        return []
    program = _PROGRAMS[scheduler][1]
    code, text = process.capture(Command((program, *ids)), timeout_s=_TIMEOUT_S)
    if code:
        return [f"{', '.join(ids)} was submitted before and could not be cancelled ({_one_line(text)}): {program} it."]
    return [f"{', '.join(ids)} was submitted before and is cancelled again: nothing of this chain is left."]


def parse_job_id(scheduler: str, answer: str) -> str | None:
    """The job's number in what sbatch or qsub said; None when it said no such thing."""
    found = re.findall(_ANSWERS[scheduler], answer, re.MULTILINE)
    return found[-1] if found else None


def tell_about_secrets(cluster: ClusterSettings, environment: Mapping[str, str] | None = None) -> None:
    """Says which secrets stay behind, and what to do instead."""
    variables = os.environ if environment is None else environment
    names = sorted(name for name, value in variables.items() if value and submission.is_secret(name, value))
    if names and cluster.secrets_file is None:
        print(
            f"note: {', '.join(names)}: set here, and not handed to the scheduler, which would keep it in files; name a"
            " file with --secrets_file, or log in once with `hf auth login` or `wandb login`.",
            flush=True,
        )


def _submit_one(ready: Submission, *, succeeded: str, ended: str) -> str:
    scheduler, script = ready.scheduler, ready.files.script
    argv = job_script.submit_command(scheduler, ready.job, script, succeeded=succeeded, ended=ended)
    left_out = [
        name
        for name, value in sorted(os.environ.items())
        if _OWN_JOB.match(name) or name == process.MARK or submission.is_secret(name, value)
    ]
    without = ["env", *(word for name in left_out for word in ("-u", name))] if left_out else []
    # the folder: PBS leaves its own copy of the output where qsub was called
    command = Command((*without, *argv), working_dir=script.parent, hides_secrets=True)
    code, text = process.capture(command, timeout_s=_TIMEOUT_S)
    program, title = argv[0], NAMES[scheduler]
    if code == 127:
        raise UserError(
            f"--submit {scheduler}: there is no {program} on this machine; submit on a login node of {title}."
        )
    if code:
        raise UserError(f"{program} refused the job (exit code {code}): {_one_line(text)}")
    job_id = parse_job_id(scheduler, text)
    if job_id is None:
        raise UserError(
            f"{program} gave no job number of {title}, but said: {_one_line(text)}; is --submit {scheduler} right? Look"
            " into the queue, a job may be there."
        )
    return job_id


def refuse_second(folder: JobFolder, job: SubmitSettings) -> None:
    """Refuses a second chain of jobs for a run whose first one is still there.

    Raises:
        UserError: a job of the run waits or runs.
    """
    record = folder.read()
    if record is None or job.after_job:
        return
    alive = [job_id for job_id in record.ids if queue.ask(record.scheduler, job_id).is_alive]
    if alive:
        raise UserError(
            f"{folder.name} is submitted already, and {', '.join(alive)} is still in the queue: wait for it, cancel it"
            f" ({_PROGRAMS[record.scheduler][1]} {' '.join(alive)}), or put this one behind it with --after_job."
        )


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.splitlines() if line.strip()) or "it said nothing"
