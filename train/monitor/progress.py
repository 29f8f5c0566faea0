"""Progress for people and for programs: one line on the screen, one JSON object in the run's metrics file.

Both engines write the same keys: `step`, `tokens`, `loss`, `lr`, `grad_norm`, `tokens_per_second` while training, and
`step`, `tokens`, `eval_loss`, `eval_perplexity` after an evaluation.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train import outputs

_CURVE_POINTS = 100  # what a card's reader takes in


class Progress:
    """Shows and keeps the progress of one run; only the first rank has one.

    Args:
        metrics: the file that receives a JSON object per line.
        total_steps: optimizer steps of the whole run.
        tokens_per_step: tokens of one step over all ranks.
        first_step: the step a resumed run goes on from; 0 for a new one.
    """

    def __init__(self, metrics: Path, *, total_steps: int, tokens_per_step: int, first_step: int = 0) -> None:
        self._metrics = metrics
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._last_step, self._last_time = first_step, time.monotonic()
        metrics.parent.mkdir(parents=True, exist_ok=True)

    def train(self, step: int, *, loss: float, lr: float, grad_norm: float | None) -> None:
        """Reports training up to `step`; `loss` is the mean since the last report."""
        now = time.monotonic()
        steps, seconds = step - self._last_step, max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        rate = steps * self._tokens_per_step / seconds
        left_s = (self._total_steps - step) * seconds / max(steps, 1)
        tokens = step * self._tokens_per_step
        norm = "" if grad_norm is None else f" | grad norm {grad_norm:.2f}"
        memory = peak_gpu_memory_gib()
        peak = "" if memory is None else f" | {memory:.1f} GiB"
        print(
            f"step {step:,}/{self._total_steps:,} ({step / self._total_steps:.0%}) | {tokens:,} tokens | loss"
            f" {loss:.4f} | lr {lr:.2e}{norm} | {rate:,.0f} tokens/s{peak} | {duration(left_s)} left",
            flush=True,
        )
        record = {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "tokens_per_second": round(rate, 1)}
        more = {"grad_norm": grad_norm, "gpu_memory_gib": memory}
        append(self._metrics, record | {name: value for name, value in more.items() if value is not None})

    def evaluation(self, step: int, *, loss: float) -> None:
        """Reports the loss on held-out documents, and its exponential: the perplexity per token."""
        tokens = step * self._tokens_per_step
        append(self._metrics, {"step": step, "tokens": tokens, **show_evaluation(step, loss)})
        self.pause(step)

    def pause(self, step: int) -> None:
        """Tells that something else than training, such as saving, took time after `step`: speed counts from here."""
        self._last_step, self._last_time = step, time.monotonic()


def peak_gpu_memory_gib() -> float | None:
    """The most memory that torch has taken of this process's GPU so far, in GiB; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_reserved() / 2**30, 2)


def show_evaluation(step: int, loss: float) -> dict[str, Any]:
    """Prints the loss on held-out text and its exponential; returns both as the metrics file has them."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    print(f"step {step:,}: held-out loss {loss:.4f}, perplexity {perplexity:,.2f}", flush=True)
    # JSON has no infinity
    return {"eval_loss": loss, "eval_perplexity": perplexity if math.isfinite(perplexity) else None}


def append(metrics: Path, record: dict[str, Any]) -> None:
    """Adds a line to a metrics file."""
    with metrics.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run in numbers for its manifest: first and last losses (None where there is none) and a thinned curve."""
    curve = [[record["step"], record["loss"]] for record in found if "loss" in record]
    evaluations = [record for record in found if "eval_loss" in record]
    every = max(1, -(-len(curve) // _CURVE_POINTS))
    return {
        "first_loss": curve[0][1] if curve else None,
        "last_loss": curve[-1][1] if curve else None,
        "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "eval_perplexity": evaluations[-1]["eval_perplexity"] if evaluations else None,
        "loss_curve": curve[::every] + ([curve[-1]] if curve and (len(curve) - 1) % every else []),
    }


def cut_after(metrics: Path, step: int) -> None:
    """Drops what an interrupted run reported beyond `step`, from which it now goes on."""
    if not metrics.is_file():
        return
    kept = [json.dumps(record) + "\n" for record in records(metrics) if record["step"] <= step]
    outputs.write_text(metrics, "".join(kept))


def records(metrics: Path) -> Iterator[dict[str, Any]]:
    """What was reported so far. A line that is still being written, or that a crash left in pieces, is left out."""
    if not metrics.is_file():
        return
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def duration(seconds: float) -> str:
    """`seconds` as H:MM:SS, with days in front when there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
