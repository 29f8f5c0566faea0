"""Secrets that ranks need: from the environment, or from a file that only its owner can read.

They travel to the nodes in memory, through the launcher's own connection; never in argv, a script or a log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from train.errors import UserError, refuse

_NEEDED = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/\s@]+@")


def holds_password(value: str) -> bool:
    """Whether a variable holds an address with a login in it, as in http_proxy=http://me:password@proxy."""
    return _PASSWORD_IN_ADDRESS.search(value) is not None


def collect(environment: Mapping[str, str], secrets_file: Path | None) -> dict[str, str]:
    """The secrets of a run: what the libraries read from the environment, and what the file holds; the file wins.

    Raises:
        UserError: the file is missing, readable by others, or not NAME=VALUE lines.
    """
    found = {name: environment[name] for name in _NEEDED if environment.get(name)}
    found |= {name: value for name, value in environment.items() if name in PROXIES and holds_password(value)}
    return found | (read(secrets_file) if secrets_file is not None else {})


def read(file: Path) -> dict[str, str]:
    """The NAME=VALUE lines of a file that its owner alone can read.

    Raises:
        UserError: as for `collect`. No message repeats a line.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            status = os.fstat(stream.fileno())
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--secrets_file {file} cannot be read ({type(error).__name__}): name a text file.") from None
    if status.st_mode & 0o077:
        raise UserError(f"--secrets_file {file} can be read by others: chmod 600 it.")
    found, problems = {}, []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            problems.append(f"--secrets_file {file}, line {number}: NAME=VALUE was expected.")
        else:
            found[match[1]] = match[2][1:-1] if _QUOTED.fullmatch(match[2]) else match[2]
    refuse(problems)
    return found
