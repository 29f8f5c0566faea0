"""How the process of a rank ends: by its own status, whatever the threads of libraries are doing.

    if __name__ == "__main__":
        rank_end.run(main)

At its end Python (up to 3.13) takes a thread that C++ has started, and that asks for the interpreter just then, out of
C++ by force, which aborts the process: gloo's threads, giving back the tensors of the last barrier, ended 3 of 90 good
runs on a busy machine by SIGABRT. So the interpreter is not taken down at all, as multiprocessing does with its
children: what was registered for the end is called, and the process is over.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from train.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK


def run(main: Callable[[], int]) -> NoReturn:
    """Calls `main` and ends this process by the status that it returns, or as Python does when it raises."""
    try:
        status = main()
    except SystemExit as end:
        status = _status_of(end.code)
    except BaseException as error:
        _attempt(lambda: sys.excepthook(*sys.exc_info()))  # torch's, which names the rank
        status = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE
    _attempt(threading._shutdown)  # type: ignore[attr-defined]  # waits for threads that are no daemons, as Python does
    _attempt(atexit._run_exitfuncs)
    _attempt(lambda: ctypes.CDLL(None).fflush(None))  # what C libraries, NCCL among them, have written and not sent
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            _attempt(stream.flush)
    os._exit(status)


def _attempt(step: Callable[[], object]) -> None:
    """Does one step of the end. An interrupt or an error ends that step, and neither the others nor the status."""
    try:
        step()
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()


def _status_of(code: object) -> int:
    """What Python makes of sys.exit's argument."""
    if code is None:
        return EXIT_OK
    if isinstance(code, int):
        return code
    _attempt(lambda: print(code, file=sys.stderr))
    return EXIT_FAILURE
