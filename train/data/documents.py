"""Text files as documents: the one reader of every step that takes raw text.

The tokenizer trainer, preprocessing and the finetuning data all read through this:

    files = expand_inputs(["corpus/*.jsonl.gz", "notes.txt"])
    skipped = Skipped()
    for text in read_documents(files, json_key="text", on_error="skip", skipped=skipped):
        ...
    print(skipped.summary())

| extension | a document is |
|---|---|
| `.jsonl`, `.json`, each also `.gz` or `.zst` | a line: a JSON object whose `json_key` holds the text |
| `.txt`, also `.gz` or `.zst` | a line. Not the whole file: SentencePiece and the seeds' scripts read plain text so,
|   | a file of any size streams in bounded memory, and it can be shared out to workers by byte ranges |
| `.parquet` | a row: the column `json_key` holds the text |

Blank lines are no documents. A document without text (`""`) is legal, counted, and left out by `read_documents`.
Everything streams: memory is bounded by the longest line or the parquet pages of one row group.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from train.data import document_formats
from train.errors import UserError, refuse

ON_ERROR = ("stop", "skip")
_LINE_EXTENSIONS = (".jsonl", ".json", ".txt")
_EXTENSIONS = (*_LINE_EXTENSIONS, *(a + b for a in _LINE_EXTENSIONS for b in document_formats.COMPRESSIONS), ".parquet")
_SHOWN_EXAMPLES = 3


@dataclass
class Skipped:
    """What was left out, for the step to print and to put in its manifest.

    Attributes:
        count: broken lines or rows (and broken tails of files) under `on_error="skip"`.
        empty: documents without any text; these are legal under either `on_error`.
        examples: place and reason of the first few.
    """

    count: int = 0
    empty: int = 0
    examples: list[str] = field(default_factory=list)

    def take(self, problem: str, on_error: str) -> None:
        """Counts a broken document, or stops at it.

        Raises:
            UserError: `on_error` is `stop`.
        """
        if on_error == "stop":
            raise UserError(f"{problem}. Mend it, or pass --on_error skip to leave such documents out.")
        self.count += 1
        if len(self.examples) < _SHOWN_EXAMPLES:
            self.examples.append(problem)

    def merge(self, other: Skipped) -> None:
        """Adds what was left out elsewhere, later in the input."""
        self.count += other.count
        self.empty += other.empty
        self.examples = (self.examples + other.examples)[:_SHOWN_EXAMPLES]

    def summary(self) -> str:
        """One or more lines for the terminal; empty when nothing was left out."""
        lines = [f"skipped {self.count:,} broken documents, such as:"] if self.count else []
        lines += [f"  {example}" for example in self.examples]
        if self.empty:
            lines.append(f"{self.empty:,} documents hold no text")
        return "\n".join(lines)


def expand_inputs(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that `--input` means: file names and globs (`**` too), each file once, globs in sorted order.

    Raises:
        UserError: with every problem: no pattern, no match, a folder, an empty or unreadable file, an unknown
            extension.
    """
    problems: list[str] = []
    found: dict[Path, Path] = {}
    if not patterns:
        problems.append("no input: name at least one file or a pattern such as 'corpus/*.jsonl'.")
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        is_glob = names != [pattern]
        if not names:
            kind = "no file matches" if glob.has_magic(pattern) else "there is no file"
            problems.append(f"{kind} {pattern}: check the path (the working folder is {Path.cwd()}).")
        for file in map(Path, names):
            if is_glob and file.is_dir():
                continue  # `corpus/*` also matches folders; those were not asked for
            problem = _input_problem(file)
            if problem:
                problems.append(problem)
            else:
                found.setdefault(file.resolve(), file)
        if is_glob and names and all(Path(name).is_dir() for name in names):
            problems.append(f"{pattern} matches folders only: add a file pattern, such as {pattern}/*.jsonl.")
    refuse(problems)
    return tuple(found.values())


def read_documents(
    files: Sequence[Path], *, json_key: str = "text", on_error: str = "stop", skipped: Skipped | None = None
) -> Iterator[str]:
    """The texts of all documents, file by file, in order; those without text are left out and counted.

    Args:
        files: as `expand_inputs` gives them.
        json_key: the key (JSON) or column (parquet) that holds the text; `.txt` has none.
        on_error: `stop` raises at the first broken document, `skip` leaves it out and counts it.
        skipped: receives the counts.

    Raises:
        UserError: file and line (or row): broken JSON, a missing key, a value that is no string, invalid UTF-8, a
            truncated .gz or .zst, an unreadable parquet file. A parquet file without the column is refused even
            under `skip`: nothing of it could be used.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"on_error is {on_error!r}: choose one of {', '.join(ON_ERROR)}.")
    skipped = Skipped() if skipped is None else skipped
    for file in files:
        for place, text in document_formats.parse_file(file, json_key=json_key):
            if isinstance(text, str):
                if text:
                    yield text
                else:
                    skipped.empty += 1
                continue
            skipped.take(f"{file}, {place}: {text}", on_error)


def extension(file: Path) -> str:
    """The part of the name that tells the format, such as `.jsonl.gz`; empty when it is none we read."""
    return max((known for known in _EXTENSIONS if file.name.endswith(known)), key=len, default="")


def _input_problem(file: Path) -> str | None:
    if file.is_dir():
        return f"{file} is a folder, a file is expected: name its files, such as '{file}/*.jsonl'."
    if not extension(file):
        return f"{file} has an extension that is not known: expected one of {', '.join(_EXTENSIONS)}."
    if not os.access(file, os.R_OK):
        return f"{file} is not readable: change its permissions."
    if file.stat().st_size == 0:
        return f"{file} is empty: was it written to the end?"
    return None
