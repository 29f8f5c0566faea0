"""Steps 1 to 5 in a row, from one YAML: here, or as jobs of which each starts only if the one before it succeeded.

    run_all.sh --recipe FILE [--submit slurm|gridengine|pbs] [--dry_run]

A finished step skips itself, so the same command goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from train import micro_batch, process, settings, step_recipe
from train.cluster import allocation, submission, submit
from train.cluster.job_folder import JobFolder, JobRecord
from train.cluster.settings import SCHEDULERS, ClusterSettings
from train.cluster.submission import Submission
from train.engine import choose
from train.errors import EXIT_USER, UserError, refuse
from train.finetune.settings import FinetuneSettings
from train.process import Command
from train.recipe import PretrainRecipe
from train.settings import setting
from train.step_recipe import SCRIPTS, Step, StepRecipe

RECIPES = SCRIPTS / "common" / "recipes"


@dataclass(frozen=True)
class RunAllSettings:
    """What is run, and where."""

    recipe: str = setting(help="YAML file with a section of flags for each step, or the name of a shipped one: demo")
    submit: str | None = setting(None, help="hand the steps to this scheduler", choices=SCHEDULERS, flag_only=True)
    dry_run: bool = setting(False, help="print the commands or job scripts, and run nothing", flag_only=True)


def run_all(wanted: RunAllSettings) -> int:
    """Runs or submits all steps.

    Raises:
        UserError: problems of any step, before anything starts; or the first step that failed, with its exit code.
    """
    recipe = step_recipe.read(settings.find_recipe(wanted.recipe, RECIPES))
    if not wanted.dry_run:
        refuse(step_recipe.missing_inputs(recipe))
    if wanted.submit is not None:
        return _submit_all(recipe, wanted.submit, dry_run=wanted.dry_run)
    for step in recipe.steps:
        command = build_command(step)
        if wanted.dry_run:
            print(command.text())
            continue
        print(f"\n=== {step.kind.name}", flush=True)
        code = process.run(command, grace_s=_grace_s(step))
        if code:
            goes_on = "" if code == EXIT_USER else "; the same command goes on from here"
            raise UserError(f"{step.kind.name} ended with exit code {code}{goes_on}.", exit_code=code)
    return 0


def build_command(step: Step) -> Command:
    """The launcher of a step, to run here."""
    return Command((*_launcher(step), *step.words), {"TRAIN_PYTHON": sys.executable})


def _grace_s(step: Step) -> float:
    """Seconds that a step gets to end when it is asked to: longer than it gives its own ranks to save."""
    return (step.settings.cluster.grace_s if step.kind.trains else 0) + process.GRACE_S


def build_submissions(recipe: StepRecipe, scheduler: str) -> list[Submission]:
    """All job scripts; nothing is written yet.

    Raises:
        UserError: what any of them asks for cannot be said to this scheduler.
    """
    ready: list[Submission] = []
    problems: list[str] = []
    for step in recipe.steps:
        required = ready[-1].files.exit_record if ready and scheduler == "gridengine" else None
        try:
            ready.append(_build_submission(step, recipe, scheduler, required))
        except UserError as error:
            problems += [f"{step.kind.name}: {problem}" for problem in error.problems]
    refuse(problems)
    return ready


def _build_submission(step: Step, recipe: StepRecipe, scheduler: str, required: Path | None) -> Submission:
    job = dataclasses.replace(step.job, submit=scheduler)
    folder = _job_folder(step, recipe)
    if isinstance(step.settings, PretrainRecipe):
        parallel = step.settings.parallel
        where = allocation.of_job(job, num_processes=parallel.num_processes, device=parallel.device)
        # refuses a batch or layout that does not fit the job's nodes
        choose.choose(micro_batch.open_to_one(step.settings), where)
    if step.kind.trains:
        return submission.prepare(
            SCRIPTS / step.kind.script, settings.to_yaml(step.settings), job, folder,
            cluster=step.settings.cluster, required=required,
        )  # fmt: skip
    command = (*_launcher(step), *step.words)
    return submission.build(command, None, job, folder, folder.new_files(), required=required)


def _submit_all(recipe: StepRecipe, scheduler: str, *, dry_run: bool) -> int:
    ready = build_submissions(recipe, scheduler)
    if dry_run:
        for one in ready:
            one.show()
            print()
        return 0
    for one in ready:
        submit.refuse_second(one.folder, one.job)
    clusters = [step.settings.cluster for step in recipe.steps if step.kind.trains]
    submit.tell_about_secrets(next((one for one in clusters if one.secrets_file is not None), ClusterSettings()))
    records: list[JobRecord] = []
    for one in ready:
        try:
            records.append(submit.hand_over(one, succeeded=records[-1].ids[-1] if records else ""))
        except BaseException as error:
            notes = submit.cancel(scheduler, [job_id for record in records for job_id in record.ids])
            for before in ready[: len(records)]:
                for file in (before.folder.record, before.files.script, before.files.settings):
                    file.unlink(missing_ok=True)
            if isinstance(error, UserError):
                raise UserError([*error.problems, *notes]) from None
            raise
    for one, record in zip(ready, records, strict=True):
        submit.announce(one, record)
        print()
    if scheduler == "gridengine":
        print("Grid Engine waits for the end of a job, not for its success: each script looks at the exit code before.")
    return 0


def _launcher(step: Step) -> tuple[str, str]:
    program = "bash" if step.kind.script.endswith(".sh") else sys.executable
    return program, str(SCRIPTS / step.kind.script)


def _job_folder(step: Step, recipe: StepRecipe) -> JobFolder:
    """Where status.sh looks for it, for the steps that train; beside the others' scripts otherwise."""
    if isinstance(step.settings, PretrainRecipe):
        assert step.settings.checkpoint.job_name is not None, "resolved() comes first"
        return JobFolder.of_pretraining(step.settings.checkpoint.output_model_dir, step.settings.checkpoint.job_name)
    if isinstance(step.settings, FinetuneSettings):
        return JobFolder.of_finetuning(step.settings.output_dir)
    return JobFolder(recipe.output_dir / "job", step.kind.name)
