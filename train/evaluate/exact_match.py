"""Exact match: how many answers are, normalised, one of the right ones.

| normalisation | before two texts are compared |
|---|---|
| `none` | nothing is done |
| `blanks` | white space at both ends goes, and any in between becomes one blank |
| `nfkc` | Unicode NFKC (full and half width are one), lower case, then as `blanks` |

SQuAD's own normalisation, which drops articles and punctuation, is `train.evaluate.squad`'s.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

NORMALISATIONS = ("none", "blanks", "nfkc")


def normalise(text: str, how: str) -> str:
    """`text` as it is compared under one of `NORMALISATIONS`."""
    if how == "none":
        return text
    if how == "nfkc":
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def is_match(answer: str, right: Sequence[str], how: str) -> bool:
    """Whether `answer` is one of the right ones."""
    return normalise(answer, how) in {normalise(one, how) for one in right}
