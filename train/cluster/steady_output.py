"""Output whose reader may stand still: Ctrl-S on a terminal, `| less`, a full log disk on the other end of an ssh.

A thread of its own writes. Who hands it text goes on at once, and asks `is_behind` before it hands over more.
"""

from __future__ import annotations

import os
import threading

_MOST_WAITING_BYTES = 1 << 20


class SteadyOutput:
    """Writes to a file descriptor without ever waiting for its reader."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._condition = threading.Condition()
        self._waiting = b""
        self._bytes_left = 0  # also of what is being written
        self._has_begun = False

    def write(self, data: bytes) -> None:
        """Hands over what is to be written next."""
        with self._condition:
            self._waiting += data
            self._bytes_left += len(data)
            self._condition.notify_all()
            if not self._has_begun:  # not before: a program that has threads should not fork
                self._has_begun = True
                threading.Thread(target=self._copy, daemon=True).start()

    def is_waiting(self) -> bool:
        """Whether something is not written yet."""
        with self._condition:
            return self._bytes_left > 0

    def is_behind(self) -> bool:
        """Whether so much waits that no more should come."""
        with self._condition:
            return self._bytes_left > _MOST_WAITING_BYTES

    def finish(self, timeout_s: float) -> bool:
        """Waits until all is written, at most `timeout_s`; whether it is."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._bytes_left, timeout_s)

    def _copy(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting)
                data, self._waiting = self._waiting, b""
                size = len(data)
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # whoever read it is gone; the launcher's silence will tell
                pass
            with self._condition:
                self._bytes_left -= size
                self._condition.notify_all()
