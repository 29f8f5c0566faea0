"""Interrupts that end a rank also while it waits, deep in a library, for another rank that will never come.

Python hands a signal to its handler between two of its own instructions. A rank that waits in C++ for the others to
meet executes none: it would live on until the launcher kills it, long after its siblings have ended.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_DELIVERY_S = 5.0


def raise_keyboard_interrupt(on_failure: Callable[[], int]) -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt; a process that does not get there within 5 s ends.

    Of SIGINT it may have been told at birth not to listen, as a shell tells its background jobs; SIGTERM is a
    scheduler's way to interrupt. Whoever puts another handler in place later has that signal to himself.

    Args:
        on_failure: is called in another thread when the process is to be ended by force; returns its exit status.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    is_delivered = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        is_delivered.set()
        raise KeyboardInterrupt

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to at once, whatever the main thread does
    os.register_at_fork(after_in_child=_listen_no_more)  # a signal to a child is none to this process
    threading.Thread(target=_watch, args=(reading, handle, is_delivered, on_failure), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _watch(
    reading: int, handler: Callable[..., None], is_delivered: threading.Event, on_failure: Callable[[], int]
) -> None:
    while numbers := os.read(reading, 64):
        if any(signal.getsignal(number) is handler for number in numbers) and not is_delivered.wait(_DELIVERY_S):
            os._exit(on_failure())


def _listen_no_more() -> None:
    signal.set_wakeup_fd(-1)
