"""What ranks leave for each other in the store by which torch has brought them together.

    leave("step8/3", "done")
    everyone = read([f"step8/{rank}" for rank in range(ranks)], unless="step8/failed")      # once all of them are there

Collectives belong to the training; a thread beside it may ask the store whenever it wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

_PREFIX = "train/notes/"
_PAUSE_S = 0.1  # a store that waits lets nobody else ask it meanwhile
_PATIENCE_S = 60


class NotComingError(RuntimeError):
    """What was waited for will not come; the text is that of the note which says so."""


def leave(name: str, text: str) -> None:
    """Leaves a text under a name that nobody else uses."""
    _store().set(_PREFIX + name, text)


def read(names: Iterable[str], *, unless: str, tell: Callable[[str, int], None] | None = None) -> list[str]:
    """The texts under these names, in this order, once all of them are there.

    Args:
        names: of the notes.
        unless: the name under which somebody says that they will not all come.
        tell: receives the name of a note that is not there, and the seconds waited, once a minute.

    Raises:
        NotComingError: there is a note `unless`.
    """
    store, began, told = _store(), time.monotonic(), 0
    texts = []
    for name in names:
        while not store.check([_PREFIX + name]):
            if store.check([_PREFIX + unless]):
                raise NotComingError(store.get(_PREFIX + unless).decode())
            waited = int(time.monotonic() - began)
            if tell is not None and waited >= told + _PATIENCE_S:
                told = waited
                tell(name, waited)
            time.sleep(_PAUSE_S)
        texts.append(store.get(_PREFIX + name).decode())
    return texts


def remove(names: Iterable[str]) -> None:
    """Takes notes away that everybody has read."""
    for name in names:
        _store().delete_key(_PREFIX + name)


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
