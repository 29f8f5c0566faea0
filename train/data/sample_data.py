"""Writes the sample data of the demo and the docs: documents and conversations made from docstrings.

scripts/common/make_sample_data.py calls `make_sample_data`. The folder appears whole:

    documents.jsonl                 {"text", "module"} a line, for steps 1 and 2
    conversations.jsonl             {"messages", "name"} a line, for step 4
    held_out_conversations.jsonl    the same, never trained on
    manifest.json
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train.data.docstrings import docstring_documents
from train.data.sample_conversations import docstring_conversations, split_held_out
from train.errors import refuse
from train.settings import setting, to_plain

STEP = "make_sample_data"


@dataclass(frozen=True)
class SampleDataSettings:
    """What to write, and where."""

    output_dir: Path = setting(help="folder to write documents.jsonl and the conversations to")
    packages: tuple[str, ...] = setting(
        (),
        help="installed packages whose docstrings are added to the standard library's, comma-separated",
        separator=",",
    )
    overwrite: bool = setting(False, help="replace an existing output folder", flag_only=True)
    dry_run: bool = setting(False, help="print what would be written and stop", flag_only=True)

    def problems(self) -> list[str]:
        """Package names that are none."""
        return [
            f"--packages {name!r} is not a top-level package name: give names such as numpy,torch."
            for name in self.packages
            if not name.isidentifier()
        ]


def make_sample_data(settings: SampleDataSettings) -> int:
    """Writes the folder and prints what is in it; does nothing when it is there for the same settings and Python.

    Raises:
        UserError: a package is not installed, or the folder exists and holds something else.
    """
    recorded = {**to_plain(settings), "python": platform.python_version()}
    if settings.dry_run:
        print(
            f"would write documents.jsonl, conversations.jsonl, held_out_conversations.jsonl to {settings.output_dir}"
        )
        return 0
    if not settings.overwrite and manifest.is_done(settings.output_dir, step=STEP, settings=recorded, inputs=()):
        print(f"{settings.output_dir} is there already, from the same Python and packages: nothing to do.")
        return 0
    refuse(settings.problems())
    started = time.time()
    with outputs.new_folder(settings.output_dir, overwrite=settings.overwrite) as folder:
        documents = list(docstring_documents(settings.packages))
        trained, held_out = split_held_out(docstring_conversations(settings.packages))
        _write_lines(folder / "documents.jsonl", documents)
        _write_lines(folder / "conversations.jsonl", trained)
        _write_lines(folder / "held_out_conversations.jsonl", held_out)
        results = {
            "documents": len(documents),
            "characters": sum(len(document["text"]) for document in documents),
            "conversations": len(trained),
            "held_out_conversations": len(held_out),
        }
        manifest.write(
            folder / manifest.FILE_NAME, step=STEP, settings=recorded, inputs=(), results=results, started=started
        )
    print(
        ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in results.items()), "->", settings.output_dir
    )
    return 0


def _write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
