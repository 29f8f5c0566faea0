"""What a finetuning tells while it runs: a line for people, a JSON object for programs, W&B for each node.

The keys in metrics.jsonl are those of pretraining: step, tokens, loss, lr, grad_norm, tokens_per_second,
gpu_memory_gib, eval_loss, eval_perplexity; `epoch`, `token_accuracy` and `gpu_memory_allocated_gib` are added.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback

from train.finetune.folder import checkpoint_mark
from train.monitor import progress


class Reporting(TrainerCallback):
    """Prints, keeps and forwards what the trainer logs. Every rank has one; most of them stay silent.

    Args:
        metrics: the file that receives a JSON object per line; written by the first rank.
        wandb_run: this node's W&B run, or None.
    """

    def __init__(self, metrics: Path, wandb_run: Any) -> None:
        self._metrics = metrics
        self._wandb_run = wandb_run
        self._last_step = self._last_tokens = self._tokens_before = 0
        self._counted_to: float | None = None  # the moment up to which time is in `_seconds`; None while pausing
        self._seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last_step = state.global_step
        self._tokens_before = _tokens(self._metrics)  # a resumed trainer counts from zero

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._counted_to is None:
            self._counted_to = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._count()
        _log_if_due(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _log_if_due(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pause(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        memory: dict[str, float] = {}
        if "loss" in logs:
            # A GPU may have been at work when the step ended; the trainer has waited for it, to read the loss.
            self._count()
            memory = _peak_memory(args.device)
        if not state.is_world_process_zero:
            return
        if self._wandb_run is not None:  # other nodes' runs show the machine only, as in the seeds
            self._wandb_run.log(logs | memory, step=state.global_step)
        if "loss" in logs:
            self._training(state, logs, memory)
        elif "eval_loss" in logs:
            self._evaluation(state, logs)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Marks a checkpoint once every rank's part of it is on disk."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            checkpoint_mark(checkpoint).touch()
            print(f"step {state.global_step:,}: checkpoint saved", flush=True)
        self.pause(state.global_step)

    def pause(self, _step: int) -> None:
        """Tells that something else than training, such as saving, takes time from here to the next step's begin."""
        self._counted_to = None

    def _count(self) -> None:
        """Counts the time since it was last counted: computing, waiting for data, and telling about it."""
        now = time.monotonic()
        if self._counted_to is not None:
            self._seconds += now - self._counted_to
            self._counted_to = now

    def _training(self, state: Any, logs: dict[str, float], memory: dict[str, float]) -> None:
        seconds = max(self._seconds, 1e-9)
        steps = state.global_step - self._last_step
        tokens = int(logs.get("num_tokens", 0))
        rate = (tokens - self._last_tokens) / seconds
        left_s = (state.max_steps - state.global_step) * seconds / max(steps, 1)
        self._last_step, self._last_tokens, self._seconds = state.global_step, tokens, 0.0
        norm = logs.get("grad_norm")
        print(
            f"step {state.global_step:,}/{state.max_steps:,} ({state.global_step / state.max_steps:.0%})"
            f" | epoch {logs.get('epoch', 0):.2f} | loss {logs['loss']:.4f} | lr {logs['learning_rate']:.2e}"
            + ("" if norm is None else f" | grad norm {norm:.2f}")
            + f" | {rate:,.0f} tokens/s"
            + (f" | {memory['gpu_memory_gib']:.1f} GiB" if memory else "")
            + f" | {progress.duration(left_s)} left",
            flush=True,
        )
        record = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "tokens": self._tokens_before + tokens,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "tokens_per_second": round(rate, 1),
            "token_accuracy": logs.get("mean_token_accuracy"),
            **memory,
        }
        progress.append(self._metrics, record if norm is None else record | {"grad_norm": norm})

    def _evaluation(self, state: Any, logs: dict[str, float]) -> None:
        evaluation = progress.show_evaluation(state.global_step, logs["eval_loss"])
        progress.append(self._metrics, {"step": state.global_step, **evaluation})


def _log_if_due(state: Any, control: Any) -> None:
    """Asks for a line at the last step, and wherever the run may end or go on: after an evaluation, from a checkpoint.

    What was trained since the last line is kept nowhere else: its loss and tokens would be lost.
    """
    if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
        control.should_log = True


def _peak_memory(device: Any) -> dict[str, float]:
    """The most GPU memory that any rank has taken so far, in GiB: from the GPU, and by tensors. Empty on a CPU.

    All ranks call it together.
    """
    if device.type != "cuda":
        return {}
    peaks = [torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()]
    if torch.distributed.is_initialized():
        of_all = torch.tensor(peaks, device=device)
        torch.distributed.all_reduce(of_all, op=torch.distributed.ReduceOp.MAX)
        peaks = of_all.tolist()
    reserved, allocated = (round(value / 2**30, 2) for value in peaks)
    return {"gpu_memory_gib": reserved, "gpu_memory_allocated_gib": allocated}


def _tokens(metrics: Path) -> int:
    """The tokens that a run has trained on so far."""
    return max((record.get("tokens", 0) for record in progress.records(metrics)), default=0)
