"""Brings one commit of a git repository into a folder: from a URL, a clone, a bare repository or a bundle.

Called by install.py, for Megatron-DeepSpeed and for apex.

    clone("/shared/Megatron-DeepSpeed", checkout.PINNED_COMMIT, folder, timeout_s=600)
"""

from __future__ import annotations

import re
from pathlib import Path

from train import outputs, process
from train.engine.megatron_deepspeed.checkout import INSTALL_COMMAND
from train.errors import UserError


def clone_commands(repository: str, ref: str, folder: Path) -> list[process.Command]:
    """The git commands that bring one ref into the empty `folder`: only that commit, which takes seconds.

    A repository that is a folder or a file is named by its absolute path, so that it means the same from anywhere.
    """
    local = Path(repository).expanduser()
    source = str(local.absolute()) if local.exists() else repository
    fetch = ["fetch", "--quiet"]
    if not local.is_file():  # a bundle comes whole
        fetch += ["--depth", "1"]
    if local.is_dir():
        # a shared clone may belong to another user: git refuses to serve it unless told that this is meant
        fetch += ["--upload-pack", "git -c safe.directory=* upload-pack"]
    # never wait for a password that nobody will type
    environment = {"GIT_TERMINAL_PROMPT": "0"}
    git = ("git", "-c", "safe.directory=*", "-c", "advice.detachedHead=false", "-C", str(folder))
    steps = (
        ("init", "--quiet"),
        (*fetch, source, ref),
        ("checkout", "--quiet", "--detach", "FETCH_HEAD"),
    )
    return [process.Command((*git, *step), environment) for step in steps]


def clone(repository: str, ref: str, folder: Path, *, timeout_s: float, option: str = "--repository") -> None:
    """Clones into an unfinished folder that becomes `folder` once it is whole.

    Args:
        option: the installer's flag that names another repository, for the message.

    Raises:
        UserError: git failed or took longer than `timeout_s`; with git's own words and what to do.
    """
    with outputs.new_folder(folder, overwrite=True) as unfinished:
        for command in clone_commands(repository, ref, unfinished):
            code, text = process.capture(command, timeout_s=timeout_s)
            if code != 0:
                said = without_credentials(" ".join(text.split())) or f"git exited with {code}"
                short = re.fullmatch(r"[0-9a-f]{4,39}", ref)
                whole_hash = " A commit is named by all 40 characters of its hash." if short else ""
                raise UserError(
                    f"{ref} could not be cloned from {without_credentials(repository)}: {said}. Check the ref and the"
                    f" network.{whole_hash} Without a network, name a clone, a bare repository or a bundle (`git bundle"
                    " create FILE.bundle --all` in a clone makes one):"
                    f" {INSTALL_COMMAND} {option} /path/to/{_name(repository)}"
                )


def without_credentials(text: str) -> str:
    """`text` with `***` for what stands before the `@` in each of its URLs: users, passwords, tokens.

    Not by urllib.parse, which takes a password with an unquoted `/`, `?` or `#` in it for a path, and would show it.
    """
    return re.sub(r"://\S*@", "://***@", text)


def _name(repository: str) -> str:
    return Path(without_credentials(repository).rstrip("/")).name.removesuffix(".git") or "repository"
