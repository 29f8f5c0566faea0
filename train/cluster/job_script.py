"""A scheduler's job script, as text: what the job asks for, and a body that works by hand too (`bash SCRIPT`).

text = build("slurm", settings.job, task)
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train.cluster import directives
from train.cluster.job_folder import JobFiles
from train.cluster.settings import SubmitSettings
from train.errors import refuse

# What a job reads its number from.
_JOB_ID_VARIABLES = {"slurm": "SLURM_JOB_ID", "gridengine": "JOB_ID", "pbs": "PBS_JOBID"}


@dataclass(frozen=True)
class Task:
    """What a job runs.

    Attributes:
        command: the launcher and its arguments.
        files: where script, exit code and log go.
        working_dir: where the launcher starts; relative paths in settings begin here.
        environment: variables that the script sets. No secrets.
        first_arguments: arguments for the first start alone, such as --overwrite, which a requeued or following job
            must not repeat.
        required: exit record of the job before, where the scheduler itself cannot ask for success (Grid Engine).
    """

    command: tuple[str, ...]
    files: JobFiles
    working_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    first_arguments: tuple[str, ...] = ()
    required: Path | None = None


def build(scheduler: str, job: SubmitSettings, task: Task) -> str:
    """The job script.

    Raises:
        UserError: what is asked for cannot be said to this scheduler.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    refuse(directives.problems(scheduler, job, task.files))
    templates = Environment(
        loader=PackageLoader("train.cluster"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    return templates.get_template("job.sh.jinja").render(
        scheduler=scheduler,
        directives=list(directives.build(scheduler, job, task.files)),
        submit=shlex.join(submit_command(scheduler, job, task.files.script)),
        task=task,
        command=shlex.join(task.command),
        is_chain=job.num_jobs > 1,
        job_id=_JOB_ID_VARIABLES[scheduler],
        log=task.files.log_prefix,
        redirects=directives.redirects(scheduler, task.files),
    )


def submit_command(
    scheduler: str, job: SubmitSettings, script: Path, *, succeeded: str = "", ended: str = ""
) -> tuple[str, ...]:
    """The argv that submits `script`.

    Args:
        scheduler: slurm, gridengine or pbs.
        job: what is asked for.
        script: the job script.
        succeeded: id of a job that must have succeeded. Grid Engine only waits for it.
        ended: id of a job that must have ended, whatever its exit code.
    """
    if scheduler == "slurm":
        waits = [f"afterok:{succeeded}"] * bool(succeeded) + [f"afterany:{ended}"] * bool(ended)
        # without the second one a job whose condition can never be met stays in the queue for ever
        options = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
        return ("sbatch", *options, str(script))
    if scheduler == "gridengine":
        waits = [job_id for job_id in (succeeded, ended) if job_id]
        group = ["-g", job.account] if job.account and directives.is_abci(job) else []
        return ("qsub", *group, *(["-hold_jid", ",".join(waits)] if waits else []), str(script))
    waits = [f"afterok:{succeeded}"] * bool(succeeded) + [f"afterany:{ended}"] * bool(ended)
    return ("qsub", *(["-W", f"depend={','.join(waits)}"] if waits else []), str(script))
