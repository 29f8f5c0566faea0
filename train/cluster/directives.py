"""What a job asks of its scheduler, as the lines at the head of its script.

By the manuals: sbatch(1); submit(1) of Grid Engine, and ABCI's guide (`-l rt_F=NODES`, `qsub -g GROUP`); qsub(1B) of
PBS Professional and the guide of ABCI 3.0 (`-q rt_HF -l select=NODES -P GROUP`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from train.cluster.job_folder import JobFiles
from train.cluster.settings import SubmitSettings, wall_time_s

NAMES = {"slurm": "Slurm", "gridengine": "Grid Engine", "pbs": "PBS"}
_MARKERS = {"slurm": "#SBATCH", "gridengine": "#$", "pbs": "#PBS"}
_LONGEST_NAME = 100
_PLAIN_PATH = re.compile(r"[\w./+=@-]+", re.ASCII)
_TEXT_SETTINGS = ("queue", "account", "resource", "parallel_environment", "notify", "after_job")


def build(scheduler: str, job: SubmitSettings, files: JobFiles) -> Iterator[str]:
    """The lines, with the scheduler's marker in front."""
    lines = {"slurm": _slurm, "gridengine": _grid_engine, "pbs": _pbs}[scheduler](job, files)
    for words in (*lines, *job.scheduler_options):
        yield f"{_MARKERS[scheduler]} {words}"


def job_name(name: str) -> str:
    """`name` as every scheduler takes it: ASCII letters, digits and ._- only, and no digit first (Grid Engine)."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_LONGEST_NAME]
    return plain if plain[:1].isalpha() else f"job_{plain}"


def redirects(scheduler: str, files: JobFiles) -> bool:
    """Whether the script itself writes the log.

    PBS hands its copy of a job's output over only at the end; Grid Engine splits, expands and cuts paths at signs that
    a folder's name may have.
    """
    return scheduler == "pbs" or (scheduler == "gridengine" and not _PLAIN_PATH.fullmatch(files.log_prefix))


def problems(scheduler: str, job: SubmitSettings, files: JobFiles) -> Iterator[str]:
    """What cannot be said to this scheduler."""
    title = NAMES[scheduler]
    for name in _TEXT_SETTINGS:
        if re.search(r"[\s\"'\\]", getattr(job, name)):
            yield f"--{name} {getattr(job, name)!r}: a name without spaces, quotes and backslashes was expected."
    for line in job.scheduler_options:
        if "\n" in line or "\r" in line or not line.startswith("-"):
            yield f"--scheduler_options {line!r}: an option on one line was expected, such as --exclusive."
    if any(sign in files.log_prefix for sign in '\n\r"\\'):
        yield f"{str(files.root)!r} has a quote, a backslash or a line end, which job scripts cannot hold: rename it."
    if job.parallel_environment and scheduler != "gridengine":
        yield f"--parallel_environment {job.parallel_environment} is Grid Engine's, not {title}'s: leave it out."
    if scheduler == "gridengine":
        yield from _grid_engine_problems(job)
    elif job.resource:
        instead = "--queue (ABCI 3.0: --queue rt_HF)" if scheduler == "pbs" else "--queue and --scheduler_options"
        yield f"--resource {job.resource} is Grid Engine's; {title} is told by {instead}."


def _grid_engine_problems(job: SubmitSettings) -> Iterator[str]:
    if job.job_nodes > 1 and not job.resource and not job.parallel_environment:
        yield (
            f"--job_nodes {job.job_nodes}: Grid Engine gives several nodes by --parallel_environment NAME (qconf -spl"
            " lists them) or, on ABCI, by --resource rt_F."
        )
    if job.resource and job.parallel_environment:
        yield "--resource and --parallel_environment both say how many nodes: leave one of them out."
    if job.job_gpus_per_node and not job.resource:
        yield (
            f"--job_gpus_per_node {job.job_gpus_per_node}: each Grid Engine names its GPUs otherwise; say --resource"
            " rt_F (ABCI), or --scheduler_options='-l gpu=...' as your site has it."
        )


def _slurm(job: SubmitSettings, files: JobFiles) -> Iterator[str]:
    yield f"--job-name={job_name(files.name)}"
    yield f"--nodes={job.job_nodes}"
    yield "--ntasks-per-node=1"  # one agent on each node starts the ranks there
    if job.job_gpus_per_node:
        yield f"--gpus-per-node={job.job_gpus_per_node}"
    if job.job_cpus_per_node:
        yield f"--cpus-per-task={job.job_cpus_per_node}"
    if job.wall_time:
        yield f"--time={_hours(job.wall_time)}"
    if job.queue:
        yield f"--partition={job.queue}"
    if job.account:
        yield f"--account={job.account}"
    if job.notify:
        yield f"--mail-user={job.notify}"
        yield "--mail-type=BEGIN,END,FAIL"
    yield f'--output="{files.log_prefix.replace("%", "%%")}%j.log"'
    yield "--open-mode=append"  # a job that was pre-empted goes on in its log
    yield "--requeue"


def _grid_engine(job: SubmitSettings, files: JobFiles) -> Iterator[str]:
    yield f"-N {job_name(files.name)}"
    yield "-S /bin/bash"
    if job.resource:
        yield f"-l {job.resource}={job.job_nodes}"
    if job.parallel_environment:
        yield f"-pe {job.parallel_environment} {job.job_nodes * max(job.job_cpus_per_node, 1)}"
    if job.wall_time:
        yield f"-l h_rt={_hours(job.wall_time)}"
    if job.queue:
        yield f"-q {job.queue}"
    if job.account and not is_abci(job):  # ABCI takes its group on qsub's command line
        yield f"-P {job.account}"
    if job.notify:
        yield f"-M {job.notify}"
        yield "-m bea"
    yield "-j y"
    yield "-o /dev/null" if redirects("gridengine", files) else f"-o {files.log_prefix}$JOB_ID.log"
    yield "-r y"


def _pbs(job: SubmitSettings, files: JobFiles) -> Iterator[str]:
    yield f"-N {job_name(files.name)}"
    yield "-S /bin/bash"
    chunk = f"select={job.job_nodes}"
    if job.job_cpus_per_node:
        chunk += f":ncpus={job.job_cpus_per_node}"
    if job.job_gpus_per_node:
        chunk += f":ngpus={job.job_gpus_per_node}:mpiprocs={job.job_gpus_per_node}"
    yield f"-l {chunk}"
    if job.job_nodes > 1 and not is_abci(job):
        yield "-l place=scatter"  # else two chunks may come to lie on one node
    if job.wall_time:
        yield f"-l walltime={_hours(job.wall_time)}"
    if job.queue:
        yield f"-q {job.queue}"
    if job.account:
        yield f"-P {job.account}"
    if job.notify:
        yield f"-M {job.notify}"
        yield "-m bea"
    yield "-j oe"
    yield "-r y"


def is_abci(job: SubmitSettings) -> bool:
    """ABCI's resource types are the only ones that begin so."""
    return job.resource.startswith("rt_") or job.queue.startswith("rt_")


def _hours(wall_time: str) -> str:
    """HOURS:MINUTES:SECONDS, which all three take; days are Slurm's alone."""
    seconds = wall_time_s(wall_time) or 0
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
