"""Step 2's launch: check everything, start the engine, tell the truth about how it ended.

    pretrain(settings.parse(PretrainRecipe, argv, ...))

Called again, it goes on from the newest whole checkpoint, with Megatron-DeepSpeed in another layout too; when nothing
is left to do it says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import manifest, micro_batch, outcome, outputs, resume, run_identity, same_run, sequence_parallel, settings
from train import pretrain_checks as checks
from train.checkpoint_folders import remove_leftovers, remove_universal
from train.checkpoint_size import disk_need
from train.cluster import allocation as allocations
from train.cluster import launch
from train.cluster.allocation import Allocation
from train.cluster.settings import ClusterSettings, SubmitSettings
from train.deepspeed_ops import remove_stale_locks
from train.engine import choose
from train.errors import EXIT_INTERRUPTED, UserError
from train.monitor import progress, wandb_run
from train.process import Command
from train.recipe import PretrainRecipe
from train.run_folder import Load, RunFolder

if TYPE_CHECKING:
    from train.data.blend import BlendPart

STEP = "pretrain_model"
_LAUNCHER = Path(__file__).resolve().parents[1] / "scripts" / "step2_pretrain_model" / "pretrain.sh"


def pretrain(recipe: PretrainRecipe) -> int:
    """Trains `recipe`, or with --dry_run prints what would run, or with --rehearse tries its layout out."""
    started = time.time()  # the time budget counts from here
    recipe = _with_wandb_group(recipe.resolved())
    if recipe.rehearse:
        from train.rehearse import rehearse

        return rehearse(recipe)
    run_folder = RunFolder.of(recipe)
    if recipe.job.submit is not None:
        return _submit(recipe, run_folder)
    if recipe.job.job_nodes > 1:
        print(f"note: --job_nodes {recipe.job.job_nodes} is for --submit; this run takes the nodes that are here")
    allocation = allocations.find(
        recipe.cluster, num_processes=recipe.parallel.num_processes, device=recipe.parallel.device
    )
    if not recipe.dry_run:
        parts = checks.check_data(recipe)
    recipe = sequence_parallel.settle(recipe, device=allocation.device)
    asked = recipe
    recipe, note = _with_micro_batch(recipe, allocation, run_folder)
    if note:
        print(note, flush=True)
    if recipe.dry_run:
        return _dry_run(recipe, allocation, run_folder)
    if not recipe.overwrite and _is_done(asked, run_folder, parts):
        print(f"{run_folder.manifest} is there for the same recipe and data: nothing to do (--overwrite starts again).")
        return 0
    with same_run.claimed(run_folder.lock, str(run_folder.checkpoint_dir)):
        engine, reason = _engine(recipe, allocation, run_folder)
        identity = run_identity.build(recipe, engine, allocation, _inputs(recipe, parts))
        former = None if recipe.overwrite or run_folder.latest_step() is None else run_identity.read(run_folder)
        if not recipe.overwrite:
            run_identity.check(run_folder, identity)
            run_folder = _going_on(run_folder, recipe, engine, allocation)
        if recipe.overwrite or run_folder.latest_step() is None:
            run_folder = _beginning(run_folder, recipe, engine)
        start = 0 if recipe.overwrite else run_folder.latest_step() or 0
        stretches = run_identity.stretches(former, _layout(recipe, allocation), start)
        command = choose.engine(engine).prepare(_in_stages_of(run_folder.load, recipe), allocation, run_folder)
        _announce(recipe, engine, reason, allocation, run_folder)
        checks.describe_blend(parts, recipe.training.train_tokens)
        vocab_rows = checks.vocab_rows(recipe, engine, command.argv)
        checks.check_disk(disk_need(recipe, vocab_rows=vocab_rows, folder=run_folder.root, steps_done=start))
        remove_stale_locks(run_folder.extensions_dir)
        if recipe.overwrite:
            _remove(run_folder)
        record = run_identity.with_stretches(identity, stretches)
        outputs.write_text(run_folder.identity, json.dumps(record, indent=2) + "\n")
        _train(_plan(command, recipe, engine, allocation, run_folder, began=started), run_folder)
        remove_universal(run_folder.checkpoint_dir)
        reached = run_folder.latest_step() or 0
        if reached < recipe.train_steps:  # --exit-duration-in-mins and the like end the ranks without an error
            raise UserError(
                f"the engine ended after step {reached:,} of {recipe.train_steps:,}: the same command goes on from"
                " there.",
                exit_code=EXIT_INTERRUPTED,
            )
        results = _results(recipe, engine, allocation, run_folder, parts, command.argv, time.time() - started)
        results["stretches"] = stretches
        manifest.write(
            run_folder.manifest,
            step=STEP,
            settings=settings.to_plain(_comparable(recipe)),
            inputs=_inputs(recipe, parts),
            results=results,
            started=started,
        )
    print(f"done: {results['checkpoint']}, {_losses(results)}, {results['tokens']:,} tokens")
    return 0


def _submit(recipe: PretrainRecipe, run_folder: RunFolder) -> int:
    """Hands the run to a scheduler, once all that can be known here is known to fit."""
    from train.cluster import submit
    from train.cluster.job_folder import JobFolder

    parallel = recipe.parallel
    allocation = allocations.of_job(recipe.job, num_processes=parallel.num_processes, device=parallel.device)
    shown = micro_batch.open_to_one(recipe)
    engine, reason = _engine(shown, allocation, run_folder)
    _announce(shown, engine, reason, allocation, run_folder)
    if shown is not recipe:
        print("micro batch: chosen on the nodes, by their GPUs' memory; 1 stands for it in the lines above")
    if not recipe.dry_run:
        checks.check_data(recipe)
    return submit.submit(
        _LAUNCHER,
        settings.to_yaml(recipe),
        recipe.job,
        JobFolder.of_pretraining(run_folder.root, run_folder.job_name),
        cluster=recipe.cluster,
        first_arguments=["--overwrite"] if recipe.overwrite else [],
        dry_run=recipe.dry_run,
    )


def _plan(
    command: Command,
    recipe: PretrainRecipe,
    engine: str,
    allocation: Allocation,
    run_folder: RunFolder,
    *,
    began: float | None = None,
) -> launch.Plan:
    """The launch on all nodes, which must see the data, the tokenizer and the engine as this one does."""
    data = [Path(f"{word}.idx") for word in recipe.data.data_path if Path(f"{word}.idx").is_file()]
    return launch.plan(
        command,
        allocation,
        recipe.cluster,
        launch_dir=run_folder.launch_dir,
        job_name=run_folder.job_name,
        paths=[run_folder.root, recipe.data.input_tokenizer_file, *data],
        engine_dir=choose.checkout_dir(engine),
        began=began,
    )


def _train(plan: launch.Plan, run_folder: RunFolder) -> None:
    """Runs the ranks from the newest whole checkpoint on."""
    remove_leftovers(run_folder.checkpoint_dir)
    progress.cut_after(run_folder.metrics, run_folder.latest_step() or 0)
    run_folder.outcome.unlink(missing_ok=True)
    log = run_folder.log(socket.gethostname(), time.strftime("%Y.%m.%d_%H.%M.%S"))
    end = launch.run(plan, log=log)
    outcome.check(run_folder.outcome, end.exit_status, log=log, cause=end.text)


def _going_on(run_folder: RunFolder, recipe: PretrainRecipe, engine: str, allocation: Allocation) -> RunFolder:
    """Chooses the checkpoint to go on from, and makes it loadable in the layout that is asked for.

    Raises:
        UserError: no checkpoint is whole, or this one cannot be loaded in that layout.
    """
    decision = resume.decide([resume.look(run_folder.checkpoint_dir, node=socket.gethostname())])
    for line in (
        *decision.report,
        *(f"kept as {path}" for path in resume.carry_out(decision, run_folder.checkpoint_dir)),
    ):
        print(f"resume: {line}", flush=True)
    if decision.step is None or engine != choose.MEGATRON:
        return run_folder
    from train.checkpoint.megatron import reshape
    from train.engine.megatron_deepspeed.patches import balanced_stages

    parallel = recipe.parallel
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    layers_per_stage = parallel.layers_per_stage
    if balanced_stages.is_switched_off(os.environ):
        layers_per_stage = ((recipe.model.num_layers or 0) // pipeline,) * pipeline
    target = reshape.Target(tensor, pipeline, allocation.world_size // (tensor * pipeline), layers_per_stage)
    is_last = decision.step >= recipe.train_steps
    load = reshape.prepare_load(run_folder.step_dir(decision.step), target, is_last=is_last)
    return dataclasses.replace(run_folder, load=load)


def _in_stages_of(load: Load | None, recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe with the pipeline stages of the checkpoint that goes on as it is."""
    if load is None or not load.layers_per_stage:
        return recipe
    return dataclasses.replace(
        recipe, parallel=dataclasses.replace(recipe.parallel, layers_per_stage=load.layers_per_stage)
    )


def _beginning(run_folder: RunFolder, recipe: PretrainRecipe, engine: str) -> RunFolder:
    """Takes the weights that the run is to begin with, where some are named.

    Raises:
        UserError: they are of another model or layout, or for another engine.
    """
    if recipe.checkpoint.initial_checkpoint_dir is None:
        return run_folder
    if engine != choose.MEGATRON:
        raise UserError(
            f"--initial_checkpoint_dir {recipe.checkpoint.initial_checkpoint_dir}: only --engine megatron-deepspeed"
            " begins with a checkpoint's weights."
        )
    from train.checkpoint.megatron.initial import prepare_initial

    outputs.refuse_inputs(run_folder.checkpoint_dir, [recipe.checkpoint.initial_checkpoint_dir])
    return dataclasses.replace(run_folder, load=prepare_initial(recipe, choose.commit(engine)))


def _engine(recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder) -> tuple[str, str]:
    """The engine; checkpoints that are there decide before `auto` does."""
    resumes = recipe.parallel.engine == "auto" and not recipe.overwrite and run_folder.latest_step() is not None
    former = run_identity.read(run_folder) if resumes else None
    if former is not None:
        recipe = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, engine=former["engine"]))
        return choose.choose(recipe, allocation)[0], "the checkpoints are of this engine"
    return choose.choose(recipe, allocation)


def _with_micro_batch(
    recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder
) -> tuple[PretrainRecipe, str]:
    """The recipe with its micro batch, and what is to be said of it."""
    is_open = recipe.training.micro_batch_size == micro_batch.AUTOMATIC
    if not is_open and allocation.device == "cpu":
        return recipe, ""
    if recipe.dry_run and not recipe.data.input_tokenizer_file.is_file():
        note = "micro batch: 1 for now, as the tokenizer is not there yet" if is_open else ""
        return micro_batch.open_to_one(recipe), note
    engine, _ = _engine(micro_batch.open_to_one(recipe), allocation, run_folder)
    former = None if recipe.overwrite or run_folder.latest_step() is None else run_identity.read(run_folder)
    recorded = former["settings"]["training"]["micro_batch_size"] if former is not None else None
    gpu = micro_batch.this_gpu() if allocation.device == "cuda" else None
    return micro_batch.settle(recipe, engine, allocation, gpu=gpu, recorded=recorded)


def _dry_run(recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder) -> int:
    engine, reason = choose.choose(recipe, allocation)
    command = choose.engine(engine).prepare(recipe, allocation, run_folder)
    _announce(recipe, engine, reason, allocation, run_folder)
    for file, text in command.files.items():
        print(f"\n# {file}\n{text.rstrip()}")
    print(f"\n{_plan(command, recipe, engine, allocation, run_folder).text()}")
    return 0


def _announce(recipe: PretrainRecipe, engine: str, reason: str, allocation: Allocation, run_folder: RunFolder) -> None:
    print(f"engine: {engine} ({reason})")
    print(f"where: {allocation.reason}")
    print(f"layout: {choose.engine(engine).layout(recipe, allocation)}")
    start = None if recipe.overwrite else run_folder.latest_step()
    initial = recipe.checkpoint.initial_checkpoint_dir
    begin = "from scratch" if initial is None else f"begins with the weights in {initial}"
    begin = begin if start is None else f"goes on from step {start:,}"
    print(f"job: {run_folder.job_name}, {recipe.train_steps:,} steps of {recipe.tokens_per_step:,} tokens, {begin}")


def _with_wandb_group(recipe: PretrainRecipe) -> PretrainRecipe:
    """Names the W&B group here, once, so that all nodes land in the same one."""
    if not recipe.logging.wandb or recipe.logging.wandb_group:
        return recipe
    group = wandb_run.group_name("pretrain", recipe.model_name, socket.gethostname())
    return dataclasses.replace(recipe, logging=dataclasses.replace(recipe.logging, wandb_group=group))


def _comparable(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe without what may change between two calls that mean the same run."""
    logging = dataclasses.replace(recipe.logging, wandb_group=None)
    return dataclasses.replace(recipe, logging=logging, cluster=ClusterSettings(), job=SubmitSettings())


def _is_done(recipe: PretrainRecipe, run_folder: RunFolder, parts: Sequence[BlendPart]) -> bool:
    """Whether this very run is over. Another layout, other intervals, or a machine that settles open settings in
    another way, are not another run: beginning it would train nothing, and tell of a training that never was."""
    if not run_folder.manifest.is_file():
        return False
    engine = manifest.read(run_folder.manifest)["results"].get("engine", "")
    same = manifest.is_done(
        run_folder.manifest,
        step=STEP,
        settings=settings.to_plain(_comparable(recipe)),
        inputs=_inputs(recipe, parts),
        regardless_of=run_identity.may_differ_when_done(recipe, engine),
    )
    return same and (run_folder.latest_step() or 0) >= recipe.train_steps  # a batch that ramps up takes more steps


def _inputs(recipe: PretrainRecipe, parts: Sequence[BlendPart]) -> list[Path]:
    indexes = [Path(f"{part.prefix}.idx") for part in parts]
    return [recipe.data.input_tokenizer_file, *indexes]


def _remove(run_folder: RunFolder) -> None:
    shutil.rmtree(run_folder.checkpoint_dir, ignore_errors=True)
    shutil.rmtree(run_folder.tensorboard_dir, ignore_errors=True)
    shutil.rmtree(run_folder.profile_dir, ignore_errors=True)
    for file in (run_folder.manifest, run_folder.metrics, run_folder.recipe, run_folder.identity):
        file.unlink(missing_ok=True)


def _results(
    recipe: PretrainRecipe,
    engine: str,
    allocation: Allocation,
    run_folder: RunFolder,
    parts: Sequence[BlendPart],
    argv: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """The run in numbers, read from its own metrics."""
    last_step = run_folder.latest_step() or 0
    return {
        "engine": engine,
        "engine_commit": choose.commit(engine),
        "model_name": recipe.model_name,
        "argv": list(argv),
        "layout": _layout(recipe, allocation),
        "steps": last_step,
        "tokens": recipe.train_steps * recipe.tokens_per_step,
        **progress.summary(run_folder.read_metrics()),
        "launch_seconds": round(seconds, 1),
        "checkpoint": str(run_folder.step_dir(last_step)),
        "data": [
            {"prefix": str(part.prefix), "weight": part.weight, "tokens": part.tokens, "documents": part.documents}
            for part in parts
        ],
    }


def _layout(recipe: PretrainRecipe, allocation: Allocation) -> dict[str, Any]:
    """How the run is spread over ranks, for its manifest."""
    return {
        "world_size": allocation.world_size,
        "hosts": len(allocation.hosts),
        "tensor_parallel_size": recipe.parallel.tensor_parallel_size,
        "pipeline_parallel_size": recipe.parallel.pipeline_parallel_size,
        "zero_stage": recipe.parallel.zero_stage,
        "micro_batch_size": recipe.training.micro_batch_size,
        "device": allocation.device,
    }


def _losses(results: dict[str, Any]) -> str:
    if results["first_loss"] is None:
        return "no step was left to train"
    return f"loss {results['first_loss']:.4f} -> {results['last_loss']:.4f}"
