"""What ranks leave for each other in the store by which torch has brought them together.

    leave("step8/3", "done")
    everyone = read(f"step8/{rank}" for rank in range(ranks))       # waits until all of them are there

Collectives belong to the training; a thread beside it may ask the store whenever it wants.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

_PREFIX = "train/notes/"
_PAUSE_S = 0.1  # a store that waits lets nobody else ask it meanwhile


def leave(name: str, text: str) -> None:
    """Leaves a text under a name that nobody else uses."""
    _store().set(_PREFIX + name, text)


def read(names: Iterable[str]) -> list[str]:
    """The texts under these names, in this order, once all of them are there."""
    store = _store()
    texts = []
    for name in names:
        while not store.check([_PREFIX + name]):
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
