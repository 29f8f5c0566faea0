"""`pretrain.sh --rehearse`: the recipe's own layout, with the real engine, on this machine's CPU, in a minute or two.

    shrunk = shrink(recipe, world_size=8)     the same layout around a tiny model, and what was made smaller
    rehearse(recipe)                          trains, saves, resumes, exports and verifies it

The ranks, their tensor x pipeline x data layout, the ZeRO stage, the data and the tokenizer are the recipe's. What
would fail on the cluster because of them fails here, before the queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import micro_batch, same_run, sequence_parallel
from train.cluster import allocation as allocations
from train.cluster.allocation import Allocation
from train.cluster.settings import ClusterSettings, SubmitSettings
from train.engine import choose
from train.engine.megatron_deepspeed import float8_checks, pass_through
from train.errors import EXIT_INTERRUPTED, EXIT_USER, UserError, VerificationError, refuse, user_message
from train.pretrain import pretrain
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

MAX_RANKS = 16
_STEPS, _SAVE_INTERVAL = 4, 2
_FIRST_LOG = "train.log"
_SEQUENCE_LENGTH = 64
_HEAD_DIM = 8
_INIT_STD = 0.2  # large, so that a wrong layout shows in the logits of a model this small
_BYTES_PER_RANK = 600 * 10**6  # what a rank's imports take, measured
_RAMP_UP = "--rampup-batch-size"
_RESUME_TOLERANCE = 1e-5  # relative; a run that goes on computes the same numbers again


@dataclass(frozen=True)
class Rehearsal:
    """What will be run in the recipe's place.

    Attributes:
        recipe: the shrunk recipe.
        world_size: its ranks.
        changes: what was changed, for people to read.
    """

    recipe: PretrainRecipe
    world_size: int
    changes: tuple[str, ...]


def target_world_size(recipe: PretrainRecipe, *, gpus: int) -> tuple[int, str]:
    """The ranks that the recipe is for, and why: stated in it, or one per GPU here, or the fewest the layout allows."""
    parallel = recipe.parallel
    per_copy = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if parallel.data_parallel_size:
        return per_copy * parallel.data_parallel_size, "tensor x pipeline x --data_parallel_size"
    if parallel.num_processes:
        return parallel.num_processes, "--num_processes"
    if gpus and gpus % per_copy == 0:
        return gpus, "one per GPU of this machine"
    divides = (recipe.training.global_batch_size or 0) % (2 * (recipe.training.micro_batch_size or 1)) == 0
    data = 2 if parallel.zero_stage and divides and per_copy * 2 <= MAX_RANKS else 1
    return per_copy * data, "tensor x pipeline" + (" x 2, so that ZeRO has something to spread" if data == 2 else "")


def shrink(recipe: PretrainRecipe, *, world_size: int, output_dir: Path) -> Rehearsal:
    """The recipe around the smallest model that its layout allows.

    Args:
        recipe: a resolved recipe.
        world_size: the ranks it is for.
        output_dir: where the rehearsal writes.

    Raises:
        UserError: tensor x pipeline alone needs more than `MAX_RANKS` ranks.
    """
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if tensor * pipeline > MAX_RANKS:
        raise UserError(
            f"--rehearse: {tensor} tensor x {pipeline} pipeline = {tensor * pipeline} ranks, and a rehearsal runs up to"
            f" {MAX_RANKS} on one machine: rehearse a smaller pipeline of the same recipe."
        )
    assert model.num_attention_heads and model.num_key_value_heads and model.hidden_size and model.num_layers
    changes = []
    data = world_size // (tensor * pipeline)
    largest = MAX_RANKS // (tensor * pipeline)
    if data > largest:
        changes.append(f"data parallel {data} -> {largest} ({MAX_RANKS} ranks at most)")
        data = largest
    queries_per_group = min(model.num_attention_heads // model.num_key_value_heads, 2)
    heads = max(tensor, 2) * queries_per_group
    hidden = heads * _HEAD_DIM
    layers = max(pipeline, 2)
    shape: dict[str, Any] = {
        "model_size": None,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(tensor, 2),
        "ffn_hidden_size": 4 * hidden,
        "sequence_length": min(model.sequence_length, _SEQUENCE_LENGTH),
        "init_method_std": _INIT_STD,
    }
    changes.append(
        f"model {recipe.model_name} ({model.num_layers} layers x {model.hidden_size}) -> {layers} layers x {hidden},"
        f" {heads} heads, sequences of {shape['sequence_length']} tokens"
    )
    if model.dropout:
        shape["dropout"] = 0.0
        changes.append(f"dropout {model.dropout} -> 0 (a CPU's tensor ranks would drop different values)")
    precision = training.precision
    if precision == "fp16":
        precision = "bf16" if parallel.zero_stage else "fp32"
        changes.append(f"precision fp16 -> {precision} (no fp16 on a CPU)")
    if training.float8:
        changes.append("products of the layers in float8 -> bf16 (a CPU's layers are not compiled)")
    attention = "sdpa" if parallel.attention == "flash_attention_2" else parallel.attention
    if attention != parallel.attention:
        changes.append("attention flash_attention_2 -> sdpa (a CPU has no flash-attn)")
    if recipe.checkpoint.initial_checkpoint_dir is not None:
        changes.append("weights of --initial_checkpoint_dir -> random ones (they are of the full size)")
    further = pass_through.without(parallel.megatron_arguments, _RAMP_UP)
    if further != shlex.join(pass_through.words(parallel.megatron_arguments)):
        changes.append(f"{_RAMP_UP} of --megatron_arguments -> none (it begins with more than the small batch)")
    batch = data * 2  # two accumulation steps: sums over micro batches are rehearsed, too
    tokens_per_step = batch * shape["sequence_length"]
    changes.append(f"{_STEPS} steps of {tokens_per_step} tokens, saved every {_SAVE_INTERVAL}")
    shrunk = dataclasses.replace(
        recipe,
        model=dataclasses.replace(model, **shape),
        training=dataclasses.replace(
            training,
            train_tokens=_STEPS * tokens_per_step,
            global_batch_size=batch,
            micro_batch_size=1,
            lr_warmup_tokens=0,
            lr_decay_tokens=_STEPS * tokens_per_step,
            precision=precision,
            float8=False,
        ),
        parallel=dataclasses.replace(
            parallel,
            device="cpu",
            num_processes=data * tensor * pipeline,
            data_parallel_size=data,
            layers_per_stage=(),
            sequence_parallel=sequence_parallel.settle(recipe, device=_target(recipe)).parallel.sequence_parallel,
            attention=attention,
            torch_compile=False,
            megatron_arguments=further,
        ),
        checkpoint=dataclasses.replace(
            recipe.checkpoint,
            output_model_dir=output_dir,
            job_name="rehearsal",
            initial_checkpoint_dir=None,
            save_interval=_SAVE_INTERVAL,
            keep_last=0,
            eval_interval=_SAVE_INTERVAL,
            eval_iters=1,
        ),
        logging=dataclasses.replace(
            recipe.logging, log_interval=1, use_wandb=False, wandb_entity=None, wandb_project=None, wandb_group=None
        ),
        cluster=ClusterSettings(nodes_from="none", starter=recipe.cluster.starter),
        job=SubmitSettings(),
        rehearse=False,
        overwrite=False,
    )
    return Rehearsal(shrunk, data * tensor * pipeline, tuple(changes))


def rehearse(recipe: PretrainRecipe) -> int:
    """Rehearses a resolved recipe and prints what each stage gave. Its folder is removed when all went well.

    Raises:
        UserError: the recipe does not fit its own layout, data or tokenizer.
        VerificationError: the resumed losses or the exported logits differ.
    """
    assert recipe.checkpoint.job_name is not None
    gpus = 0 if recipe.parallel.device == "cpu" else allocations.count_gpus(os.environ)
    world_size, why = target_world_size(recipe, gpus=gpus)
    refuse([*full_size_problems(recipe, world_size), *memory_problems(min(world_size, MAX_RANKS))])
    folder = recipe.checkpoint.output_model_dir / "rehearsal" / recipe.checkpoint.job_name
    rehearsal = shrink(recipe, world_size=world_size, output_dir=folder)
    print(f"rehearsal of {recipe.checkpoint.job_name}: {world_size} ranks ({why})")
    for change in rehearsal.changes:
        print(f"  smaller: {change}")
    if recipe.dry_run:
        return pretrain(rehearsal.recipe)
    with _own_folder(folder):
        for name, stage in (("train", _train), ("resume", _resume), ("export", _export)):
            started = time.monotonic()
            with _quiet(folder / f"{name}.log"):
                result = stage(rehearsal.recipe)
            print(f"{name:<8}{time.monotonic() - started:>5.0f} s  {result}", flush=True)
    print("This recipe trains, saves, resumes, exports and verifies in its layout.")
    return 0


def full_size_problems(recipe: PretrainRecipe, world_size: int) -> list[str]:
    """What would keep the recipe itself, at its own size and on GPUs, from starting in this layout."""
    recipe = micro_batch.open_to_one(recipe)
    target = Allocation(("cluster",), world_size, _target(recipe), "rehearsed")
    if recipe.parallel.attention == "flash_attention_2":  # whether it is installed is that cluster's affair
        recipe = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, attention="sdpa"))
    names = (choose.MEGATRON, choose.TRANSFORMERS) if recipe.parallel.engine == "auto" else (recipe.parallel.engine,)
    elsewhere = float8_checks.NOT_INSTALLED  # so is torchao
    found = [[said for said in choose.engine(name).problems(recipe, target) if said != elsewhere] for name in names]
    return [] if [] in found else found[0]


def _target(recipe: PretrainRecipe) -> str:
    """Where the recipe itself is to be trained."""
    return "cpu" if recipe.parallel.device == "cpu" else "cuda"


def memory_problems(ranks: int) -> list[str]:
    """Whether so many ranks fit beside what runs here already; the kernel would kill one of them without a word."""
    needed, free = ranks * _BYTES_PER_RANK, _available_bytes()
    if needed <= free:
        return []
    return [
        f"--rehearse: {ranks} ranks need about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB is free: close"
        " other programs, use a larger machine, or a smaller --data_parallel_size."
    ]


def _available_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _train(recipe: PretrainRecipe) -> str:
    pretrain(recipe)
    losses = _losses(recipe)
    saved = RunFolder.of(recipe).step_dir(recipe.train_steps)
    size = sum(file.stat().st_size for file in saved.iterdir())
    return f"{recipe.train_steps} steps, loss {losses[1]:.4f} -> {losses[recipe.train_steps]:.4f}, saved {size:,} bytes"


def _resume(recipe: PretrainRecipe) -> str:
    """Takes the last checkpoint away, as if the run had been killed before it, and trains on to the same losses."""
    run_folder, before = RunFolder.of(recipe), _losses(recipe)
    shutil.rmtree(run_folder.step_dir(recipe.train_steps))
    run_folder.manifest.unlink()
    pretrain(recipe)
    after = _losses(recipe)
    steps = range(_SAVE_INTERVAL + 1, recipe.train_steps + 1)
    largest = max(abs(after[step] - before[step]) / abs(before[step]) for step in steps)
    if not largest <= _RESUME_TOLERANCE:
        raise VerificationError(
            f"after resuming from step {_SAVE_INTERVAL} the losses differ by {largest:.3g} of their value"
            f" ({[before[step] for step in steps]} before, {[after[step] for step in steps]} after)."
        )
    return f"from step {_SAVE_INTERVAL}: losses equal (largest relative difference {largest:.1g})"


def _export(recipe: PretrainRecipe) -> str:
    from train.checkpoint import verification
    from train.checkpoint.convert import ConvertSettings, convert

    output = recipe.checkpoint.output_model_dir / "huggingface"
    convert(
        ConvertSettings(
            input_tokenizer_file=recipe.data.input_tokenizer_file,
            input_model_max_length=recipe.model.sequence_length,
            input_model_dir=RunFolder.of(recipe).step_dir(recipe.train_steps),
            output_tokenizer_and_model_dir=output,
            parity_documents=100,
        )
    )
    logits = verification.require(output)["logits"]
    return (
        f"loads with transformers; logits differ by {logits['relative_difference']:.1g},"
        f" {logits['tolerance']:.1g} is allowed"
    )


def _losses(recipe: PretrainRecipe) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in RunFolder.of(recipe).read_metrics() if "loss" in record}


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """An empty folder for one rehearsal, which goes with it, but for one that found something: its logs stay.

    Raises:
        UserError: another rehearsal is in it, or something that is none.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder.parent}: a part of this path is a file; choose another --output_model_dir.") from None
    with same_run.claimed(lock, str(folder)):
        try:
            if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _FIRST_LOG).is_file()):
                raise UserError(f"{folder} is no rehearsal's folder: move it away, or choose another --job_name.")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield
            except BaseException as error:
                if _is_users(error):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder)
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a failed rehearsal is in it, or another one
                folder.parent.rmdir()


def _is_users(error: BaseException) -> bool:
    """Whether the message says all: a setting, an input or the machine is wrong, or there was a Ctrl-C."""
    if isinstance(error, UserError):
        return error.exit_code == EXIT_USER
    return isinstance(error, KeyboardInterrupt) or user_message(error) is not None


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Sends what is printed meanwhile to `log`; when that ends in an error, the end of it is shown after all."""
    with log.open("w", encoding="utf-8", buffering=1) as file:
        try:
            with contextlib.redirect_stdout(file):
                yield
        except Exception as error:
            if isinstance(error, UserError) and error.exit_code == EXIT_INTERRUPTED:
                raise KeyboardInterrupt from None  # the ranks' word is that the run goes on: a rehearsal begins anew
            file.flush()
            print("".join(f"| {line}\n" for line in log.read_text(errors="replace").splitlines()[-40:]), end="")
            if not _is_users(error):
                print(f"the rehearsal failed; all of its output: {log}", flush=True)
            raise
