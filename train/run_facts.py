"""What the files of a pretraining or finetuning run tell of it: how far, how fast, what is saved, how it ended.

Reads only; works while the run runs, on any machine that sees the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outcome, settings
from train.checkpoint_folders import whole_checkpoints
from train.cluster.job_folder import JobFolder
from train.errors import UserError
from train.finetune.folder import FinetuneFolder, checkpoint_mark
from train.finetune.settings import FinetuneSettings
from train.monitor import progress
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder


@dataclass(frozen=True)
class RunFacts:
    """A run, from its files.

    Attributes:
        name: the job's name, or the output folder's.
        kind: pretraining or finetuning.
        job_folder: where its submissions are.
        lock: what a launch on this machine holds while it runs.
        is_done: the finished run's manifest is there.
        step, total_steps: optimizer steps; None where nobody knows.
        loss, eval_loss, tokens_per_second: as last reported.
        seconds_left: estimated from the last report; None without one.
        checkpoint: the newest whole one.
        checkpoint_age_s, silent_s: seconds since it, and since the last progress line.
        usual_interval_s: between progress lines, at the present speed.
        exit_code, problems: what the ranks said at their end.
    """

    name: str
    kind: str
    job_folder: JobFolder
    lock: Path
    is_done: bool
    step: int | None
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: Path | None
    checkpoint_age_s: float | None
    silent_s: float | None
    usual_interval_s: float | None
    exit_code: int | None
    problems: tuple[str, ...]


def find(folder: Path, job_name: str | None = None) -> list[RunFacts]:
    """The runs of a folder: --output_model_dir of step 2 or a job's folder in it, or --output_dir of step 4.

    Raises:
        UserError: it is neither, or has no run of that name.
    """
    folder = folder.absolute()
    finetuning = FinetuneFolder(folder)
    if finetuning.root.is_dir() or _is_finetuned(folder) or JobFolder.of_finetuning(folder).record.is_file():
        if job_name not in (None, folder.name):
            raise UserError(
                f"--job_name {job_name}: {folder} is one finetuning run, {folder.name}; leave the flag out."
            )
        return [_of_finetuning(finetuning)]
    if folder.parent.name == "checkpoint" and folder.is_dir():
        folder, job_name = folder.parent.parent, job_name or folder.name
    names = sorted(_pretraining_names(folder))
    if not names:
        raise UserError(
            f"{folder} is no run: name the --output_model_dir of a pretraining, or the --output_dir of a finetuning."
        )
    if job_name is not None and job_name not in names:
        raise UserError(f"--job_name {job_name}: {folder} has {', '.join(names)}.")
    return [_of_pretraining(RunFolder(folder, name)) for name in names if job_name in (None, name)]


def _of_pretraining(run: RunFolder) -> RunFacts:
    jobs = JobFolder.of_pretraining(run.root, run.job_name)
    recipe = _settings(PretrainRecipe, run.recipe, jobs)
    saved = list(whole_checkpoints(run.checkpoint_dir))
    return _facts(
        run.job_name, "pretraining", jobs, run.lock,
        is_done=run.manifest.is_file(),
        metrics=run.metrics,
        total_steps=_steps_of(recipe),
        checkpoint=saved[-1][1] if saved else None,
        saved=saved[-1][1] if saved else None,
        report=outcome.read(run.outcome),
    )  # fmt: skip


def _of_finetuning(run: FinetuneFolder) -> RunFacts:
    jobs = JobFolder.of_finetuning(run.output)
    is_running = run.root.is_dir()
    own = _settings(FinetuneSettings, run.recipe if is_running else run.output / run.recipe.name, jobs)
    checkpoint = run.checkpoint()
    total = own.max_steps if own is not None and own.max_steps > 0 else None
    if total is None and checkpoint is not None:
        total = _read_json(checkpoint / "trainer_state.json").get("max_steps")
    is_done = _is_finetuned(run.output) and not is_running
    return _facts(
        run.output.name, "finetuning", jobs, run.root / "lock",
        is_done=is_done,
        metrics=run.metrics if is_running else run.output / run.metrics.name,
        total_steps=_read_json(run.output / manifest.FILE_NAME)["results"].get("steps") if is_done else total,
        checkpoint=checkpoint,
        saved=checkpoint_mark(checkpoint) if checkpoint else None,
        report=outcome.read(run.outcome),
    )  # fmt: skip


def _facts(
    name: str,
    kind: str,
    jobs: JobFolder,
    lock: Path,
    *,
    is_done: bool,
    metrics: Path,
    total_steps: int | None,
    checkpoint: Path | None,
    saved: Path | None,
    report: outcome.Outcome | None,
) -> RunFacts:
    records = list(progress.records(metrics))
    trained = [record for record in records if "loss" in record]
    last: dict[str, Any] = trained[-1] if trained else {}
    step = records[-1]["step"] if records else None
    speed = last.get("tokens_per_second") or None
    tokens_per_step = last["tokens"] / last["step"] if last.get("step") and last.get("tokens") else None
    seconds_per_step = tokens_per_step / speed if tokens_per_step and speed else None
    apart = last["step"] - trained[-2]["step"] if len(trained) > 1 else last.get("step", 0)
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    return RunFacts(
        name=name,
        kind=kind,
        job_folder=jobs,
        lock=lock,
        is_done=is_done,
        step=step,
        total_steps=total_steps,
        loss=last.get("loss"),
        eval_loss=evaluations[-1] if evaluations else None,
        tokens_per_second=speed,
        seconds_left=(total_steps - (step or 0)) * seconds_per_step if total_steps and seconds_per_step else None,
        checkpoint=checkpoint,
        checkpoint_age_s=None if saved is None else _age_s(saved),
        silent_s=_age_s(metrics) if records else None,
        usual_interval_s=apart * seconds_per_step if seconds_per_step and apart > 0 else None,
        exit_code=None if report is None else report.exit_code,
        problems=() if report is None else report.problems,
    )


def _pretraining_names(root: Path) -> Iterator[str]:
    """Names that any file of a run gives away: a run may be submitted and not have begun."""
    found = {path.stem for path in (*root.glob("recipe/*.yaml"), *root.glob("metrics/*.jsonl"))}
    found |= {path.stem for path in root.glob("manifest/*.json")}
    found |= {path.stem for path in root.glob("job/*.json")}
    found |= {path.name for path in root.glob("checkpoint/*") if path.is_dir()}
    yield from (name for name in found if not name.startswith("."))


def _settings(cls: type[Any], file: Path, jobs: JobFolder) -> Any:
    """The run's settings, from its own folder or from its submission; None when neither can be read."""
    record = jobs.read()
    for candidate in (file, record.settings if record is not None else None):
        if candidate is not None and candidate.is_file():
            try:
                return settings.build(cls, settings.read_yaml(candidate))
            except UserError:  # of another version
                continue
    return None


def _steps_of(recipe: PretrainRecipe | None) -> int | None:
    return None if recipe is None or recipe.training.global_batch_size is None else recipe.train_steps


def _is_finetuned(folder: Path) -> bool:
    return _read_json(folder / manifest.FILE_NAME).get("step") == "finetune_model"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
