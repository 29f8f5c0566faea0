"""What makes a pretraining run this run and no other, and in which layouts it has been trained.

    identity = run_identity.build(recipe, engine, allocation, inputs)
    run_identity.check(run_folder, identity)          # refuses to go on with the checkpoints of another run

A layout (ranks, tensor, pipeline and data parallel, micro batch) is how a run is trained, not what it is: with
Megatron-DeepSpeed the same run may go on in another one, and the record keeps each stretch.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train import manifest, micro_batch, same_run, settings
from train.cluster.allocation import Allocation
from train.engine import choose
from train.errors import UserError
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

_LAYOUT: set[tuple[str, ...]] = {
    ("parallel", "tensor_parallel_size"),
    ("parallel", "pipeline_parallel_size"),
    ("parallel", "layers_per_stage"),
    ("parallel", "sequence_parallel"),
    ("training", "micro_batch_size"),
}
_COMPUTED: set[tuple[str, ...]] = {  # the same sums, with another memory or in another order
    ("parallel", "activation_checkpoint"),
    ("parallel", "torch_compile"),
}
# How a run is started, watched and kept; a name alone stands for all that is under it.
_AROUND: set[tuple[str, ...]] = {
    ("logging",),
    ("cluster",),
    ("job",),
    *(("checkpoint", name) for name in ("save_interval", "keep_last", "async_save", "eval_interval", "eval_iters")),
    ("data", "num_workers"),
    *(("parallel", name) for name in ("num_processes", "data_parallel_size", "device")),
}
_ENGINE = ("parallel", "engine")  # as it was asked for; which one trained stands in the record
_STRETCHES = "stretches"


def build(recipe: PretrainRecipe, engine: str, allocation: Allocation, inputs: Iterable[Path]) -> dict[str, Any]:
    """The run's identity as plain data."""
    plain = settings.to_plain(recipe)
    for *groups, name in (*_AROUND, _ENGINE, ("checkpoint", "output_model_dir")):
        del functools.reduce(operator.getitem, groups, plain)[name]
    record = {
        "settings": plain,
        "inputs": {str(file): manifest.identity(file) for file in inputs},
        "engine": engine,
        # another version may read the same weights in another order (query, key and value since 676a482c)
        "engine_commit": choose.commit(engine),
        # optimizer state that DeepSpeed has spread belongs to this number of ranks
        "processes": allocation.world_size if choose.uses_deepspeed(engine, recipe) else None,
        "device": allocation.device,
    }
    return dict(json.loads(json.dumps(record)))


def read(run_folder: RunFolder) -> dict[str, Any] | None:
    """The recorded identity; None when there is none.

    Raises:
        UserError: the file is damaged.
    """
    try:
        record: Any = json.loads(run_folder.identity.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("engine"), str):
        raise UserError(
            f"{run_folder.identity} is damaged, so nothing tells which run {run_folder.checkpoint_dir} holds: put it"
            " back, choose another --job_name, or --overwrite to start again."
        )
    return record


def may_differ(engine: str) -> set[tuple[str, ...]]:
    """The settings that tell how a run of this engine is trained, and not what it is."""
    return _COMPUTED | _LAYOUT if engine == choose.MEGATRON else _COMPUTED


def may_differ_when_done(recipe: PretrainRecipe, engine: str) -> set[tuple[str, ...]]:
    """The settings in which a recipe, as it was asked for, may differ from a run that `engine` has finished."""
    found = _AROUND | may_differ(engine)
    if recipe.parallel.engine in ("auto", engine):
        found = found | {_ENGINE}
    if recipe.training.micro_batch_size == micro_batch.AUTOMATIC:  # each machine settles it in its own way
        found = found | {("training", "micro_batch_size")}
    return found


def check(run_folder: RunFolder, identity: dict[str, Any]) -> None:
    """Refuses to go on from the checkpoints of another run: its manifest would tell of a training that never was.

    What may change: intervals, logging, how many checkpoints are kept; recomputation and compilation; with
    Megatron-DeepSpeed the layout; and, with the transformers engine, a larger --train_tokens with the same
    --lr_decay_tokens.

    Raises:
        UserError: there are checkpoints, and they are of another run or of none that began here.
    """
    if run_folder.latest_step() is None:
        return
    again = "use what it used, choose another --job_name, or --overwrite to start again"
    former = read(run_folder)
    if former is None:
        raise UserError(f"{run_folder.checkpoint_dir} holds checkpoints that no run here has begun: {again}.")
    is_megatron = identity["engine"] == former["engine"] == choose.MEGATRON
    changeable = may_differ(identity["engine"]) & may_differ(former["engine"])
    found = []
    known = {key: value for key, value in former.items() if key != _STRETCHES}
    for path, before, now in same_run.differences(known, identity):
        if path[0] == "settings" and path[1:] in changeable:
            continue
        if path == ("processes",) and is_megatron:
            continue
        if path == ("engine_commit",) and "engine_commit" not in former:  # begun before it was recorded
            continue
        if path[0] == "settings" and before is None and not now:  # begun before there was such a setting
            continue
        if path[-1] == "train_tokens" and identity["engine"] == choose.TRANSFORMERS and before < now:
            print(f"--train_tokens grows from {before:,} to {now:,}: the order of the data is drawn anew from here on")
        else:
            found.append(f"{' '.join(path[1:]) or path[0]}: {before!r} there, {now!r} now")
    if found:
        raise UserError(f"{run_folder.checkpoint_dir} holds another run ({'; '.join(found)}): {again}.")


def stretches(former: dict[str, Any] | None, layout: dict[str, Any], start: int) -> list[dict[str, Any]]:
    """The layouts of a run so far, each with the step after which it began.

    Args:
        former: the recorded identity, None when the run begins.
        layout: the layout from now on.
        start: the step that the run goes on from; what was trained beyond it is trained again.
    """
    recorded = (former or {}).get(_STRETCHES) or []
    kept = [stretch for stretch in recorded if stretch["after_step"] < start]
    if kept and {key: value for key, value in kept[-1].items() if key != "after_step"} == layout:
        return kept
    return [*kept, {"after_step": start, **layout}]


def with_stretches(identity: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The identity as it is recorded."""
    return {**identity, _STRETCHES: found}
