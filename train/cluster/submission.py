"""A job that is ready to be handed over: its script, and the settings that the script reads. Nothing is written yet."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train import process
from train.cluster import job_script
from train.cluster.job_folder import JobFiles, JobFolder
from train.cluster.node_script import carried
from train.cluster.settings import ClusterSettings, SubmitSettings, wall_time_s
from train.errors import refuse

_PASSWORD_IN_ADDRESS = re.compile(r"://[^/\s@]+@")  # as in http_proxy=http://me:password@proxy


@dataclass(frozen=True)
class Submission:
    """What is ready to be submitted.

    Attributes:
        scheduler: slurm, gridengine or pbs.
        job: what is asked for.
        folder: where it is kept.
        files: its names.
        script: the job script.
        settings_yaml: what the script reads; None when it holds all flags.
    """

    scheduler: str
    job: SubmitSettings
    folder: JobFolder
    files: JobFiles
    script: str
    settings_yaml: str | None

    def show(self) -> None:
        """Prints what would be submitted."""
        print(f"# {self.files.script}\n{self.script.rstrip()}")
        if self.settings_yaml is not None:
            print(f"\n# {self.files.settings}\n{self.settings_yaml.rstrip()}")
        if self.job.num_jobs > 1:
            print(f"\n# {self.job.num_jobs} jobs in a row, each once the one before has ended")


def prepare(
    launcher: Path,
    settings_yaml: str,
    job: SubmitSettings,
    folder: JobFolder,
    *,
    cluster: ClusterSettings,
    first_arguments: Sequence[str] = (),
    required: Path | None = None,
) -> Submission:
    """The submission of a launcher that has a --recipe; nothing is written yet. Arguments as for `submit.submit`.

    Raises:
        UserError: the job could only end with an error once its nodes are there.
    """
    refuse(problems(job, cluster))
    files = folder.new_files()
    flags = ["--recipe", str(files.settings), *launcher_flags(job, cluster)]
    command = ("bash", str(launcher.absolute()), *flags)
    return build(command, settings_yaml, job, folder, files, first_arguments, required)


def problems(job: SubmitSettings, cluster: ClusterSettings) -> Iterator[str]:
    """What would be refused when the job starts, which may be days from now."""
    if cluster.num_nodes not in (0, job.job_nodes):
        yield f"--num_nodes {cluster.num_nodes}: the job asks for {job.job_nodes} (--job_nodes); leave --num_nodes out."
    if cluster.hostfile is not None:
        yield (
            f"--hostfile {cluster.hostfile}: which nodes the job gets is known when it starts, and it finds them by"
            f" itself; leave --hostfile or --submit {job.submit} out."
        )
    if cluster.launcher == "local" and job.job_nodes > 1:
        yield f"--launcher local starts on one node, and the job asks for {job.job_nodes} (--job_nodes): leave it out."
    if cluster.launcher == "srun" and job.submit != "slurm":
        yield f"--launcher srun is Slurm's, and the job is for --submit {job.submit}: leave it out."
    if cluster.nodes_from not in ("auto", "none", "openmpi", job.submit) and cluster.hostfile is None:
        yield f"--nodes_from {cluster.nodes_from}: the job is for --submit {job.submit}; leave it out."


def build(
    command: Sequence[str],
    settings_yaml: str | None,
    job: SubmitSettings,
    folder: JobFolder,
    files: JobFiles,
    first_arguments: Sequence[str] = (),
    required: Path | None = None,
) -> Submission:
    """The submission of any command."""
    assert job.submit is not None, "--submit names the scheduler"
    task = job_script.Task(
        command=tuple(command),
        files=files,
        working_dir=Path.cwd(),
        environment={**_open_variables(), "TRAIN_PYTHON": sys.executable},
        first_arguments=tuple(first_arguments),
        required=required,
    )
    return Submission(job.submit, job, folder, files, job_script.build(job.submit, job, task), settings_yaml)


def launcher_flags(job: SubmitSettings, cluster: ClusterSettings) -> list[str]:
    """What the launcher must hold to: the number of nodes asked for, and the time after which to save and end."""
    flags = ["--num_nodes", str(job.job_nodes)] if cluster.num_nodes == 0 else []
    seconds = wall_time_s(job.wall_time)
    if seconds is None:
        return flags
    budget_min = seconds / 60 - job.save_margin_min
    if cluster.time_budget_min:
        budget_min = min(budget_min, cluster.time_budget_min)
    return [*flags, "--time_budget_min", f"{budget_min:g}"]


def is_secret(name: str, value: str) -> bool:
    """Whether a variable must not reach a scheduler's files, by its name or by a password in the address it holds."""
    return process.is_secret(name) or _PASSWORD_IN_ADDRESS.search(value) is not None


def _open_variables() -> dict[str, str]:
    """What a job needs of this environment, without secrets."""
    return {name: value for name, value in carried(os.environ).items() if not is_secret(name, value)}
