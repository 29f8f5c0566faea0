"""What a model says while it is trained: a JSON object a line beside the metrics, for people who read the report.

    samples.append(file, step=100, prompt="What does zip do?", answer="It joins ...")

The keys are `step`, `prompt` and `answer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.monitor import progress

FILE_NAME = "samples.jsonl"


def append(file: Path, *, step: int, prompt: str, answer: str) -> None:
    """Adds an answer."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The answers so far; what is still being written is left out."""
    for record in progress.records(file):
        if isinstance(record.get("prompt"), str) and isinstance(record.get("answer"), str):
            yield record
