"""Progress lines as all engines here write them, and the end of a run whose loss is no number."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run
from train.engine.megatron_deepspeed.saving import Saving
from train.engine.non_finite import non_finite
from train.monitor.progress import Progress


def loss_of(losses: Mapping[str, Any]) -> float:
    """The training loss among what upstream hands to its log."""
    value = losses["lm loss"] if "lm loss" in losses else losses["loss"]
    return float(value.mean()) if hasattr(value, "mean") else float(value)


def refuse_non_finite(loss: float, step: int, checkpoint_dir: Path, saving: Saving, *, what: str = "the loss") -> None:
    """Raises `NonFiniteLossError` when the loss is NaN or infinite; the last good checkpoint is written by then."""
    if not math.isfinite(loss):
        saving.wait()
        raise non_finite(checkpoint_dir, step, what)


def _apply(run: Run) -> str:
    import torch
    from megatron import get_args, training

    train, training_log = training.train, training.training_log
    evaluate_and_print = training.evaluate_and_print_results
    since_last_line: list[float] = []
    lines: list[Progress] = []  # one on the first rank, from the moment training starts

    @functools.wraps(train)
    def start(*others: Any, **options: Any) -> Any:
        if run.metrics is not None and torch.distributed.get_rank() == 0:
            lines.append(
                Progress(
                    run.metrics,
                    total_steps=run.train_steps,
                    tokens_per_step=run.tokens_per_step,
                    first_step=get_args().iteration,
                )
            )
        if run.profile is not None:
            run.profile.expect(first=get_args().iteration, last=run.train_steps)
            run.profile.after(get_args().iteration)
        return train(*others, **options)

    @functools.wraps(training_log)
    def log(losses: Any, total: Any, lr: Any, step: int, *others: Any, **options: Any) -> Any:
        args = get_args()
        skipped, grad_norm = others[2], others[3]
        loss = loss_of(losses)
        if not skipped:  # fp16 lowers its scale and goes on
            refuse_non_finite(loss, step, Path(args.save), run.saving)
            since_last_line.append(loss)
        result = training_log(losses, total, lr, step, *others, **options)
        is_due = step % args.log_interval == 0 or step in (1, args.train_iters)
        if is_due and since_last_line:
            mean = sum(since_last_line) / len(since_last_line)
            norm = None if grad_norm is None else float(grad_norm)
            rate = float(lr or 0.0)
            for line in lines:
                line.train(step, loss=mean, lr=rate, grad_norm=norm)
            if run.watch is not None:
                numbers = {"loss": mean, "lr": rate, "tokens": float(step * run.tokens_per_step)}
                run.watch(step, numbers if norm is None else numbers | {"grad_norm": norm})
            since_last_line.clear()
        if run.profile is not None and run.profile.after(step):
            for line in lines:
                line.pause(step)  # nor is that of a recording
        return result

    @functools.wraps(evaluate_and_print)
    def evaluate(prefix: str, forward_step: Any, data: Any, model: Any, step: int, *others: Any, **options: Any) -> Any:
        measured: list[Any] = []
        original = training.evaluate

        def listen(*inner: Any, **inner_options: Any) -> Any:
            result = original(*inner, **inner_options)
            measured.append(result[0])
            return result

        training.evaluate = listen
        try:
            result = evaluate_and_print(prefix, forward_step, data, model, step, *others, **options)
        finally:
            training.evaluate = original
        if measured and not options.get("test"):
            loss = _from_last_rank(loss_of(measured[0]) if measured[0] else math.nan)
            for line in lines:
                line.evaluation(step, loss=loss)
            if run.watch is not None:
                run.watch(step, {"eval_loss": loss})
            refuse_non_finite(loss, step, Path(get_args().save), run.saving, what="the evaluation loss")
        return result

    save = training.save_checkpoint_and_time

    @functools.wraps(save)
    def save_and_pause(step: int, *others: Any, **options: Any) -> Any:
        result = save(step, *others, **options)
        for line in lines:
            line.pause(step)  # the time of a save is not training's
        return result

    training.save_checkpoint_and_time = save_and_pause
    training.train = start
    training.training_log = log
    training.evaluate_and_print_results = evaluate
    return "megatron.training.training_log and evaluate_and_print_results: progress lines, stop at a non-finite loss"


def _from_last_rank(value: float) -> float:
    """Only the last pipeline stage knows the evaluation loss, and the last rank is always in it."""
    import torch
    from deepspeed.accelerator import get_accelerator

    box = get_accelerator().FloatTensor([value])
    torch.distributed.broadcast(box, src=torch.distributed.get_world_size() - 1)
    return float(box.item())


PATCH = Patch(
    name="progress-lines",
    reason="upstream prints its progress for people only, and trains on after the loss has become NaN",
    affected="all upstream versions",
    apply=_apply,
)
