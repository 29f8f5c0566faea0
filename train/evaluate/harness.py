"""lm-evaluation-harness, where it is installed: its tasks, on the model that is loaded.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.errors import UserError, first_line


def problems(tasks: Sequence[str]) -> Iterator[str]:
    """Why tasks cannot be run here."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        yield (
            "--lm_eval_tasks: lm-evaluation-harness is not installed: pip install lm-eval into this environment, or "
            "leave the flag out."
        )


def run(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, num_fewshot: int | None, limit: int, batch_size: int
) -> dict[str, dict[str, float]]:
    """The numbers of each task.

    Args:
        model, tokenizer: as loaded.
        tasks: names of the harness's tasks, or files that describe one.
        num_fewshot: examples before each question; None as the task has it.
        limit: at most so many questions of a task; 0 takes all.
        batch_size: sequences computed at once.

    Raises:
        UserError: the harness does not know a task, or cannot have its data.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit or None, log_samples=False,
            bootstrap_iters=0,
        )  # fmt: skip
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise UserError(f"--lm_eval_tasks {' '.join(tasks)}: {first_line(error)}") from None
    return parse_results((found or {}).get("results", {}))


def parse_results(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The harness's results as plain numbers: `acc,none` is called `acc`; standard errors are left out."""
    tasks: dict[str, dict[str, float]] = {}
    for task, values in results.items():
        numbers = tasks.setdefault(task, {})
        for name, value in values.items():
            metric, _, rule = name.partition(",")
            if "stderr" in metric or isinstance(value, bool) or not isinstance(value, int | float) or not rule:
                continue
            numbers[metric if rule == "none" else f"{metric} ({rule})"] = float(value)
    return tasks
