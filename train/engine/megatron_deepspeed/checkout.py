"""Where Megatron-DeepSpeed is on this machine, and at which commit.

    checkout = find_checkout()
    if checkout is None:
        print(why_missing())

The environment variable MEGATRON_DEEPSPEED_DIR names a checkout anywhere and wins; without it the one that
`scripts/common/install_megatron_deepspeed.sh` put below this project's `.cache/` is used.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from train import process

DEFAULT_REPOSITORY = "https://github.com/deepspeedai/Megatron-DeepSpeed"
# The last upstream commit before "FPDT" (676a482c), which broke RoPE, grouped-query attention and the layout of the
# fused query-key-value projection.
PINNED_COMMIT = "6acc370a41440098031227e881bd9f1f23aa369e"
DIRECTORY_VARIABLE = "MEGATRON_DEEPSPEED_DIR"
PROJECT_ROOT = Path(__file__).resolve().parents[3]
INSTALL_COMMAND = "scripts/common/install_megatron_deepspeed.sh"

_ESSENTIAL_FILES = ("pretrain_gpt.py", "megatron/training.py", "megatron/data/helpers.cpp")


@dataclass(frozen=True)
class Checkout:
    """A usable Megatron-DeepSpeed tree.

    Attributes:
        path: the folder that holds `pretrain_gpt.py`.
        commit: the full commit hash, or `unknown` when git cannot tell.
        reason: why this one was taken.
    """

    path: Path
    commit: str
    reason: str


def cache_dir() -> Path:
    """The folder that holds one checkout per ref."""
    return PROJECT_ROOT / ".cache" / "megatron-deepspeed"


def extensions_dir() -> Path:
    """The folder that holds the wheels of apex and FlashAttention built here, and the logs of their builds."""
    return PROJECT_ROOT / ".cache" / "extensions"


def folder_for(ref: str, repository: str = DEFAULT_REPOSITORY) -> Path:
    """Where the checkout of a commit, tag or branch stands.

    A commit is the same wherever it comes from. A tag or branch is of one repository, which its folder's name tells
    apart by eight characters; user and password of a URL are no part of it.
    """
    if is_commit(ref):
        return cache_dir() / ref
    local = Path(repository).expanduser()
    source = str(local.resolve()) if local.exists() else re.sub(r"://\S*@", "://", repository)
    source = source.rstrip("/").removesuffix(".git")
    mark = hashlib.sha256(f"{source}\n{ref}".encode()).hexdigest()[:8]
    return cache_dir() / f"{re.sub(r'[^A-Za-z0-9._-]', '-', ref)}-{mark}"


def is_commit(ref: str) -> bool:
    """Whether `ref` is a whole commit hash."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", ref) is not None


def find_checkout() -> Checkout | None:
    """The checkout a run would use, or None; `why_missing` tells why there is none."""
    path, reason = _candidate()
    if _lacks(path):
        return None
    return Checkout(path=path, commit=commit_of(path), reason=reason)


def why_missing() -> str:
    """Why `find_checkout` found nothing, with what to do; empty when it did find one."""
    path, reason = _candidate()
    lacks = _lacks(path)
    if not lacks:
        return ""
    whole = [folder for folder in cache_dir().glob("[!.]*") if not _lacks(folder)]
    others = [shlex.quote(str(folder)) for folder in sorted(whole) if folder != folder_for(PINNED_COMMIT)]
    choose = f" Other versions are installed: {DIRECTORY_VARIABLE}={' or '.join(others)} takes one." if others else ""
    if DIRECTORY_VARIABLE not in os.environ:
        mend = f"run {INSTALL_COMMAND}."
    elif folder_for(PINNED_COMMIT) in whole:
        mend = f"unset {DIRECTORY_VARIABLE} to take the one that {INSTALL_COMMAND} installed."
    else:
        mend = f"run {INSTALL_COMMAND} and unset {DIRECTORY_VARIABLE}."
    return f"no Megatron-DeepSpeed in {path} ({reason}): {lacks}; {mend}{choose}"


def helpers_file(path: Path) -> Path:
    """The compiled dataset helpers of a checkout, for the running interpreter."""
    return path / "megatron" / "data" / f"helpers{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def python_path(path: Path) -> str:
    """PYTHONPATH with the checkout first, then what the user has there."""
    return os.pathsep.join(part for part in (str(path), os.environ.get("PYTHONPATH", "")) if part)


def commit_of(path: Path) -> str:
    """The commit a tree stands at, or `unknown`."""
    # the tree may belong to another user (a shared folder): git refuses to read it unless told that this is meant
    command = process.Command(("git", "-c", "safe.directory=*", "-C", str(path), "rev-parse", "HEAD"))
    code, text = process.capture(command)
    words = text.split()
    return words[0] if code == 0 and words and re.fullmatch(r"[0-9a-f]{40,64}", words[0]) else "unknown"


def _candidate() -> tuple[Path, str]:
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named).absolute(), f"{DIRECTORY_VARIABLE} names it"
    return folder_for(PINNED_COMMIT), "the pinned commit in this project's cache"


def _lacks(path: Path) -> str:
    if not path.is_dir():
        return "there is no such folder"
    missing = [name for name in _ESSENTIAL_FILES if not (path / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    if not helpers_file(path).is_file():
        return f"its dataset helpers are not built for this Python ({helpers_file(path).name} missing)"
    return ""
