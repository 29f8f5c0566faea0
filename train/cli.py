"""What every Python launcher does: read the settings, call one library function, tell the truth in the exit code.

return cli.run(UploadSettings, upload, argv, description=__doc__, example="...")
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train import settings as settings_module
from train.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, UserError, user_message


def run(
    settings_class: type[Any],
    function: Callable[[Any], int | None],
    argv: Sequence[str] | None,
    *,
    description: str | None,
    example: str,
    recipe_dir: Path | None = None,
) -> int:
    """Parses `argv` (or the command line) into `settings_class`, calls `function` with it, returns an exit code.

    What the user can mend becomes one message on stderr; anything else keeps its traceback and exits with 1.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written goes, as with Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends nothing
    try:
        settings = settings_module.parse(
            settings_class,
            sys.argv[1:] if argv is None else argv,
            program=Path(sys.argv[0]).name,
            description=(description or "").strip(),
            example=example,
            recipe_dir=recipe_dir,
        )
        return function(settings) or EXIT_OK
    except UserError as error:
        print_problems(error.problems)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough of it (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return EXIT_BROKEN_PIPE
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print_problems((message,))
        return EXIT_USER


def print_problems(problems: Sequence[str]) -> None:
    """One line for one problem, a list for several, on stderr."""
    if len(problems) == 1:
        print(f"error: {problems[0]}", file=sys.stderr)
        return
    print(f"error: {len(problems)} problems:", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
