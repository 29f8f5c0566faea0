"""What every Python launcher does: read the settings, call one library function, tell the truth in the exit code.

return cli.run(UploadSettings, upload, argv, description=__doc__, example="...")
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train import settings as settings_module
from train.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, UserError

_USER_ERRNOS = {
    errno.ENOSPC: "no space left: free some, or choose an output on another disk.",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose an output on another disk.",
    errno.EACCES: "permission denied: choose another path or change its permissions.",
    errno.EPERM: "not permitted: choose another path or change its permissions.",
    errno.EROFS: "the file system is read-only: choose another output.",
    errno.ENOENT: "there is no such file: check the path.",
    errno.EISDIR: "this is a folder, a file is expected here.",
    errno.ENOTDIR: "a part of this path is a file, a folder is expected there.",
}


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
    except OSError as error:
        message = user_message(error)
        if message is None:
            raise
        print_problems((message,))
        return EXIT_USER


def user_message(error: BaseException) -> str | None:
    """What to tell of an error that the user can mend (no space, no permission, a wrong path); None of any other.

    A full disk is also found behind an error of a library's own: torch raises a RuntimeError after the OSError,
    safetensors one that only quotes it.
    """
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{_USER_ERRNOS[error.errno]}"
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno in (errno.ENOSPC, errno.EDQUOT):
            return user_message(behind)
        if os.strerror(errno.ENOSPC) in str(behind):
            return _USER_ERRNOS[errno.ENOSPC]
        behind = behind.__cause__ or behind.__context__
    return None


def print_problems(problems: Sequence[str]) -> None:
    """One line for one problem, a list for several, on stderr."""
    if len(problems) == 1:
        print(f"error: {problems[0]}", file=sys.stderr)
        return
    print(f"error: {len(problems)} problems:", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
