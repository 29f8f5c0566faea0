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
import ctypes
import os
import sys
import threading
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
        sys.excepthook(*sys.exc_info())  # torch's, which names the rank
        status = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, as Python does
        atexit._run_exitfuncs()
        ctypes.CDLL(None).fflush(None)  # what C libraries, NCCL among them, have written and not sent
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(code: object) -> int:
    """What Python makes of sys.exit's argument."""
    if code is None:
        return EXIT_OK
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return EXIT_FAILURE
