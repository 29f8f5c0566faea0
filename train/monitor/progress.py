"""Progress for people and for programs: one line on the screen, one JSON object in the run's metrics file.

Both engines write the same keys: `step`, `tokens`, `loss`, `lr`, `grad_norm`, `tokens_per_second` while training, and
`step`, `tokens`, `eval_loss`, `eval_perplexity` after an evaluation.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import outputs


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
        print(
            f"step {step:,}/{self._total_steps:,} ({step / self._total_steps:.0%}) | {tokens:,} tokens | loss"
            f" {loss:.4f} | lr {lr:.2e}{norm} | {rate:,.0f} tokens/s | {duration(left_s)} left",
            flush=True,
        )
        record = {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "tokens_per_second": round(rate, 1)}
        self._write(record if grad_norm is None else record | {"grad_norm": grad_norm})

    def evaluation(self, step: int, *, loss: float) -> None:
        """Reports the loss on held-out documents, and its exponential: the perplexity per token."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        print(f"step {step:,}: held-out loss {loss:.4f}, perplexity {perplexity:,.2f}", flush=True)
        tokens = step * self._tokens_per_step
        finite = perplexity if math.isfinite(perplexity) else None  # JSON has no infinity
        self._write({"step": step, "tokens": tokens, "eval_loss": loss, "eval_perplexity": finite})
        self._last_time = time.monotonic()  # an evaluation's time is not training's

    def pause(self) -> None:
        """Tells that time was spent on something else than training, such as saving."""
        self._last_time = time.monotonic()

    def _write(self, record: dict[str, Any]) -> None:
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def cut_after(metrics: Path, step: int) -> None:
    """Drops what an interrupted run reported beyond `step`, from which it now goes on."""
    if not metrics.is_file():
        return
    kept = [json.dumps(record) + "\n" for record in records(metrics) if record["step"] <= step]
    outputs.write_text(metrics, "".join(kept))


def records(metrics: Path) -> Iterator[dict[str, Any]]:
    """What was reported so far. A line that is still being written, or that a crash left in pieces, is left out."""
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
