"""Step 4's launch: check everything, prepare the examples, train, prove what came out, give it its name.

    finetune(settings.parse(FinetuneSettings, argv, ...))

Called again after an interruption, it goes on from the last whole checkpoint; when all is done it says so.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import manifest, outcome, outputs
from train import settings as settings_module
from train.checkpoint import verification
from train.cluster import allocation as allocations
from train.cluster import launch
from train.cluster.allocation import Allocation
from train.deepspeed_ops import remove_stale_locks
from train.errors import EXIT_USER, UserError
from train.finetune import batch, command, find_inputs, prepare, proof, results, unfinished
from train.finetune.folder import FinetuneFolder, Plan
from train.finetune.settings import FinetuneSettings

STEP = "finetune_model"
_LAUNCHER = Path(__file__).resolve().parents[2] / "scripts" / "step4_finetune_model" / "finetune.sh"


def finetune(settings: FinetuneSettings) -> int:
    """Finetunes `settings.model_name_or_path` into `settings.output_dir`, or with --dry_run prints what would run.

    Raises:
        UserError: an input, a setting or the machine does not allow it; nothing was started then.
        NonFiniteLossError: the loss became NaN or infinite.
        VerificationError: what was saved is not what was trained.
    """
    started = time.time()  # the time budget counts from here
    settings = settings.with_line_ends()
    folder = FinetuneFolder(settings.output_dir.absolute())
    if settings.job.submit is not None:
        return _submit(settings, folder)
    where = allocations.find(settings.cluster, num_processes=command.processes(settings), device=settings.device)
    if settings.dry_run:
        return command.show(settings, where, folder)
    found = find_inputs.find(settings, folder)
    plain = _plain(settings)
    if folder.output.is_file():
        raise UserError(f"--output_dir {folder.output} is a file, a folder name was expected: choose another output.")
    if not settings.overwrite and manifest.is_done(folder.output, step=STEP, settings=plain, inputs=found.files()):
        verification.require(folder.output, hash_files=False)
        print(f"{folder.output} is there for the same settings and inputs: nothing to do (--overwrite trains again).")
        shutil.rmtree(folder.root, ignore_errors=True)
        return 0
    if folder.output.is_dir() and any(folder.output.iterdir()) and not settings.overwrite:
        raise UserError(
            f"--output_dir {folder.output} exists already: pass --overwrite to replace it, or choose another."
        )
    folder.refuse_foreign_output()
    find_inputs.check_machine(settings, where)
    with unfinished.claimed(folder), folder.named_in_errors():
        identity = unfinished.identity(plain, found, where)
        resume_from = unfinished.begin(settings, folder, identity)
        prepared = prepare.prepare(settings, found, where, folder, resume_from)
        outputs.write_text(folder.identity, json.dumps(identity, indent=2) + "\n")  # from here on one can go on with it
        _train(prepared.plan, where, folder, began=started)
        checks = proof.prove(prepared.plan, folder)
        folder.add_records()
        run = results.of(settings, found, where, prepared, checks, folder)
        for model_dir, proven in ((folder.model_dir, checks), *_merged(prepared.plan, folder)):
            verification.write(model_dir, proven)
            manifest.write(
                model_dir / manifest.FILE_NAME,
                step=STEP,
                settings=plain,
                inputs=found.files(),
                results=run | {"parameters": proven["weights"]["parameters"]},
                started=started,
            )
        folder.publish()
    print(results.summary(run))
    print(f"wrote {folder.output}")
    for offline in sorted(folder.output.glob("wandb/offline-run-*")):
        print(f"W&B offline run: wandb sync {offline}")
    return 0


def _submit(settings: FinetuneSettings, folder: FinetuneFolder) -> int:
    """Hands the run to a scheduler, once all that can be known here is known to fit."""
    from train.cluster import submit
    from train.cluster.job_folder import JobFolder

    where = allocations.of_job(settings.job, num_processes=command.processes(settings), device=settings.device)
    print(f"where: {where.reason}")
    print(f"batch: {batch.layout(settings, where.world_size)}")
    if not settings.dry_run:
        find_inputs.find(settings, folder)
    first = [
        *(["--overwrite"] if settings.overwrite else []),
        *(["--resume", "never"] if settings.resume == "never" else []),
    ]
    return submit.submit(
        _LAUNCHER,
        settings_module.to_yaml(settings),
        settings.job,
        JobFolder.of_finetuning(folder.output),
        cluster=settings.cluster,
        first_arguments=first,
        dry_run=settings.dry_run,
    )


def _train(plan: Plan, where: Allocation, folder: FinetuneFolder, *, began: float) -> None:
    print(f"where: {where.reason}")
    print(f"batch: {batch.layout(plan.finetune, where.world_size)}", flush=True)
    remove_stale_locks(folder.extensions_dir)
    log = folder.log(socket.gethostname(), time.strftime("%Y.%m.%d_%H.%M.%S"))
    end = launch.run(command.launch_plan(plan.finetune, where, folder, plan.model_dir, began=began), log=log)
    told = outcome.read(folder.outcome)
    try:
        outcome.check(folder.outcome, end.exit_status, log=log, cause=end.text)
    except UserError:
        if told is not None and told.exit_code == EXIT_USER and folder.checkpoint() is None:
            folder.identity.unlink(missing_ok=True)  # what the user mends is another run, and of this one nothing stays
        raise


def _merged(plan: Plan, folder: FinetuneFolder) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The merged model's folder and its checks, if it was asked for."""
    if plan.finetune.merge:
        from train.finetune.merge import merge

        yield folder.merged_dir, merge(plan.model_dir, folder.model_dir, folder.merged_dir)


def _plain(settings: FinetuneSettings) -> dict[str, Any]:
    """What is trained, without what may change between two calls that mean the same run.

    That is how its nodes are reached, and which step is recorded.
    """
    plain = settings_module.to_plain(settings)
    return {name: value for name, value in plain.items() if name not in ("cluster", "job", "profile_step")}
