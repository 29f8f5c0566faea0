"""Data sets of the Hub by name: brought by the datasets library, read from the Arrow files that it keeps.

    hub_data.is_name("kunishou/databricks-dolly-15k-ja")
    hub_data.find("rajpurkar/squad:validation", flag="--eval_data_files")    # the files in its cache

`OWNER/NAME` is the split `train`; `OWNER/NAME:SPLIT` another; `OWNER/NAME:CONFIGURATION:SPLIT` one of several. Where
there is no network, what was brought before is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from train.errors import UserError, first_line
from train.finetune.record_files import EXTENSIONS

_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*?)(:(?P<first>[^:/*?]+))?(:(?P<second>[^:/*?]+))?")

NO_SLICES = (
    "a part of a split is not to be had: name all of it; --eval_size holds examples out, --max_steps trains fewer."
)


def is_slice(split: str) -> bool:
    """Whether a split's name asks for a part of it, in the datasets library's way: train[:100], train[10%:]."""
    return "[" in split or "]" in split


def is_name(word: str) -> bool:
    """Whether it can only be a data set of the Hub: no file, no folder, no pattern, no file's extension."""
    return _NAME.fullmatch(word) is not None and not word.endswith(EXTENSIONS) and not Path(word).exists()


def find(word: str, *, flag: str) -> tuple[Path, ...]:
    """The Arrow files of a data set, downloaded if need be.

    Raises:
        UserError: it cannot be had from the Hub nor from the cache, or has no such split.
    """
    import datasets

    if is_slice(word):
        raise UserError(f"{flag} {word}: {NO_SLICES}")
    match = _NAME.fullmatch(word)
    if match is None:
        raise UserError(f"{flag} {word}: a data set of the Hub is OWNER/NAME, OWNER/NAME:SPLIT or with :CONFIG:SPLIT.")
    first, second = match["first"], match["second"]
    configuration, split = (first, second) if second else (None, first or "train")
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(match["name"], configuration, split=split)
    except Exception as error:  # the libraries' many ways to say what is missing
        told = first_line(error)
        raise UserError(
            f"{flag} {word}: there is no such file, and no such data set could be had from the Hub ({told}): check the "
            "name, the split, HF_TOKEN and the network, or name a file."
        ) from None
    return tuple(Path(file["filename"]) for file in loaded.cache_files)
