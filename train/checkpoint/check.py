"""Checks checkpoints of either engine: whole or not, and what each is good for. Started by scripts/common.

findings = check_folder(step_dir)
settings = CheckSettings(input_model_dir=job_dir); check(settings)      # prints; raises when something is damaged
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train import checkpoint_files, outputs
from train.checkpoint import kind
from train.checkpoint.findings import Ability, Findings
from train.checkpoint.megatron.saved_layout import WEIGHT_FILES
from train.checkpoint_folders import is_checkpoint, whole_checkpoints
from train.errors import UserError, VerificationError
from train.settings import setting

_OPTIMIZER_FILE = re.compile(r".*optim_states\.pt|optimizer\.pt|scheduler\.pt|rng_state.*\.pth|trainer_state\.json")
_ASIDE = re.compile(r"global_step\d+\.damaged(-\d+)?")


@dataclass(frozen=True)
class CheckSettings:
    """What is checked."""

    input_model_dir: Path = setting(help="a checkpoint (.../global_stepN), or a job's folder: all in it")
    json: bool = setting(False, help="print JSON instead of a table", flag_only=True)


def check(settings: CheckSettings) -> None:
    """Checks one checkpoint or all of a job, and prints what was found.

    Raises:
        UserError: there is no checkpoint.
        VerificationError: at least one is damaged.
    """
    folders = _folders(settings.input_model_dir)
    found = {folder: check_folder(folder) for folder in folders}
    to_begin_with = all(folder.name == "global_step0" for folder in folders)  # an import, which no run goes on from
    job = _job(settings.input_model_dir) if not to_begin_with and folders != [settings.input_model_dir] else []
    if settings.json:
        print(json.dumps({"checkpoints": [_plain(*item) for item in found.items()], "job": job}, indent=2))
    else:
        for folder, findings in found.items():
            print(_text(folder, findings), end="\n\n")
        print("\n".join(job), end="\n" if job else "")
    damaged = [folder.name for folder, findings in found.items() if findings.problems]
    if damaged:
        raise VerificationError(
            f"{len(damaged)} of {len(found)} checkpoints damaged: {', '.join(damaged)}. Copy the files named above from"
            " where they are whole, or go on from another step."
        )


def check_folder(folder: Path) -> Findings:
    """Reads every byte of a checkpoint and says what is wrong with it, and what it is good for.

    Raises:
        UserError: it is no checkpoint.
    """
    try:
        names = [file.name for file in folder.iterdir()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): change its permissions.") from None
    if any(form.fullmatch(name) for form in WEIGHT_FILES for name in names):
        from train.checkpoint.megatron import fsck

        findings = fsck.inspect(folder)
        upstream_only = checkpoint_files.FILES not in names
    else:
        if checkpoint_files.FILES not in names:
            kind.detect(folder)  # says what is missing
            _refuse_model_only(folder, names)
        from train.checkpoint.transformers import fsck as transformers_fsck

        findings = transformers_fsck.inspect(folder)
        upstream_only = False
    recorded = checkpoint_files.recorded(folder) or {}
    damage = [] if upstream_only else list(checkpoint_files.damage(folder, contents=True))
    notes = list(findings.notes)
    if recorded:
        there = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        notes += [f"{name}: was not there when it was saved" for name in there if name not in {*recorded, "files.json"}]
    problems = (*damage, *(problem for problem in findings.problems if not _told(problem, damage)))
    abilities = tuple(_if_whole(ability, problems) for ability in findings.abilities)
    return replace(findings, problems=problems, notes=tuple(notes), abilities=abilities)


def _refuse_model_only(folder: Path, names: list[str]) -> None:
    """A folder to be published holds nothing of a training: not a damaged checkpoint, but none."""
    if not any(_OPTIMIZER_FILE.fullmatch(name) or name.startswith("global_step") for name in names):
        raise UserError(
            f"{folder} is a Hugging Face model and no checkpoint: it holds no state of a training. What step 3 or 4"
            " made is checked by scripts/step3_upload_pretrained_model/verify_model.py."
        )


def _told(problem: str, damage: list[str]) -> bool:
    """Whether a file that is missing by its layout was named already, as missing from the list."""
    name = problem.partition(":")[0]
    return ": missing" in problem and f"{name}: missing" in damage


def _if_whole(ability: Ability, problems: tuple[str, ...]) -> Ability:
    """What a damaged checkpoint is still good for: an export reads the weights alone."""
    in_weights = [problem for problem in problems if not _OPTIMIZER_FILE.fullmatch(problem.partition(":")[0])]
    if not problems or not ability.possible:
        return ability
    if ability.name == "export" and not in_weights:
        return replace(ability, reason=f"{ability.reason}; the damage is not in its weights")
    return replace(ability, possible=False, reason="it is damaged")


def _folders(given: Path) -> list[Path]:
    if not given.is_dir():
        wrong = "is a file" if given.exists() else "does not exist"
        raise UserError(f"--input_model_dir {given} {wrong}: name a checkpoint (.../global_stepN) or its job's folder.")
    if outputs.is_unfinished(given):
        raise UserError(f"{given} is half-written: choose a whole checkpoint, or let the run save again.")
    steps = [folder for _, folder in whole_checkpoints(given)]
    return [given] if not steps or is_checkpoint(given) else steps


def _job(job_dir: Path) -> list[str]:
    """What is to be said of a job's folder as a whole: where a run would go on, what lies beside."""
    from train import resume

    lines = []
    try:
        view = resume.look(job_dir, node="here")
        decision = resume.decide([view])
        lines.append(f"the same command goes on from global_step{decision.step}")
        lines += [f"before it does: {line}" for line in decision.report]
    except UserError as error:
        lines += error.problems
    for folder in sorted(job_dir.iterdir()):
        if outputs.is_unfinished(folder):
            lines.append(f"{folder.name}: half-written, removed by the next run")
        elif _ASIDE.fullmatch(folder.name):
            lines.append(f"{folder.name}: damaged and set aside by a run that went on; yours to remove")
    return lines


def _text(folder: Path, findings: Findings) -> str:
    state = "damaged" if findings.problems else "whole"
    lines = [f"{folder}: {state}", f"  {findings.description}"]
    lines += [f"  damage   {problem}" for problem in findings.problems]
    lines += [f"  note     {note}" for note in findings.notes]
    lines += [
        f"  {ability.name:<8} {'yes' if ability.possible else 'no'}: {ability.reason}" for ability in findings.abilities
    ]
    return "\n".join(lines)


def _plain(folder: Path, findings: Findings) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "whole": not findings.problems,
        "description": findings.description,
        "problems": list(findings.problems),
        "notes": list(findings.notes),
        **{ability.name: {"possible": ability.possible, "reason": ability.reason} for ability in findings.abilities},
    }
