"""Checkpoints that are written while the training goes on, from copies in the machine's memory.

The copies are taken between two steps, and what is written from them is what would have been written then.

    saving = Saving(is_async=True, ranks_on_node=8)
    saving.begin()                        # waits for the checkpoint before
    files.append(saving.writer(save, state, path))
    saving.end(publish)                   # publish() writes the files: here, or in a thread
    saving.check()                        # once a step: raises what went wrong in the thread
    saving.wait()                         # before a run that is done, or has been asked to end, is over
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from train.engine.megatron_deepspeed.memory_copies import MemoryCopies


class Saving:
    """How one rank saves: at once, or beside the training.

    Args:
        is_async: take copies and write in a thread, where memory suffices.
        ranks_on_node: how many ranks do so on this node.
    """

    def __init__(self, *, is_async: bool = False, ranks_on_node: int = 1) -> None:
        self._copies = MemoryCopies(ranks_on_node) if is_async else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_async(self) -> bool:
        return self._copies is not None

    def begin(self) -> None:
        """A checkpoint begins; the one before is written first."""
        self.wait()
        if self._copies is not None:
            self._copies.begin()

    def writer(self, save: Callable[[Any, Any], object], state: Any, path: Any) -> Callable[[], object] | None:
        """What writes the state into a file later on; None when it had to be written at once."""
        frozen = None if self._copies is None else self._copies.take(state)
        if frozen is None:
            save(state, path)
            return None
        return functools.partial(save, frozen, path)

    def end(self, publish: Callable[[], None]) -> None:
        """Everything that belongs to the checkpoint is here: `publish` writes it and makes it known."""
        if self._copies is None:
            publish()
            return
        # a run that fails is not held up by it: what is not published yet is no checkpoint
        self._thread = threading.Thread(target=self._run, args=(publish,), name="train-saving", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong since the checkpoint's `end`."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the checkpoint is written; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, publish: Callable[[], None]) -> None:
        try:
            publish()
        except BaseException as error:  # told by the training, which this thread is not
            self._error = error
