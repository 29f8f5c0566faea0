"""Brings Megatron-DeepSpeed to this machine: clone, dataset helpers, requirements, smoke import, report.

Called by `scripts/common/install_megatron_deepspeed.sh`; run again it only does what is missing.

    install(InstallSettings(repository="/shared/Megatron-DeepSpeed"))
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from train import outputs, process
from train.engine.megatron_deepspeed import checkout
from train.engine.megatron_deepspeed.checkout import Checkout, find_checkout
from train.errors import UserError, refuse
from train.settings import setting

__all__ = ["Checkout", "InstallSettings", "find_checkout", "install"]

# Imported by upstream's code and declared nowhere.
REQUIRED_PACKAGES = ("six", "nltk", "pybind11", "einops", "regex", "ninja")
_SMOKE_IMPORT_TIMEOUT_S = 300.0
_COMPILE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class InstallSettings:
    """What to install."""

    repository: str = setting(checkout.DEFAULT_REPOSITORY, help="URL or local folder to clone from")
    ref: str = setting(checkout.PINNED_COMMIT, help="commit, tag or branch")
    timeout_s: float = setting(600.0, help="give the clone up after this many seconds")
    dry_run: bool = setting(False, help="print what would be done", flag_only=True)


def install(settings: InstallSettings) -> int:
    """Installs the checkout and prints what is native and what is replaced.

    Raises:
        UserError: packages or a compiler are missing, the clone fails or takes too long, the helpers do not compile,
            or the smoke import fails.
    """
    folder = checkout.folder_for(settings.ref)
    if settings.dry_run:
        for command in clone_commands(without_credentials(settings.repository), settings.ref, folder):
            print(command.text())
        print(compile_command(folder).text())
        print(smoke_command(folder).text())
        return 0
    refuse(missing_requirements())
    if _is_whole(folder, settings.ref):
        print(f"Megatron-DeepSpeed {settings.ref} is already in {folder}")
    else:
        clone(settings.repository, settings.ref, folder, timeout_s=settings.timeout_s)
        print(f"Megatron-DeepSpeed {settings.ref} cloned into {folder}")
    if checkout.helpers_file(folder).is_file():
        print(f"dataset helpers are already built: {checkout.helpers_file(folder).name}")
    else:
        build_helpers(folder)
        print(f"dataset helpers built: {checkout.helpers_file(folder).name}")
    print(smoke_import(folder))
    if settings.ref != checkout.PINNED_COMMIT:
        print(f"To use this one: export {checkout.DIRECTORY_VARIABLE}={shlex.quote(str(folder))}")
    return 0


def missing_requirements() -> list[str]:
    """What this interpreter or machine lacks, each with the command that mends it."""
    problems = []
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        problems.append(
            f"Megatron-DeepSpeed needs {', '.join(missing)}: run {shlex.quote(sys.executable)} -m pip install "
            f"{' '.join(missing)}"
        )
    if shutil.which("git") is None:
        problems.append("git is not on the PATH: install it.")
    if shutil.which(_compiler()[0]) is None:
        problems.append(f"no C++ compiler {_compiler()[0]!r} on the PATH: install g++, or name one in CXX.")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        problems.append(f"{header} is missing: install this Python's development headers (python3-dev).")
    return problems


def clone_commands(repository: str, ref: str, folder: Path) -> list[process.Command]:
    """The git commands that bring one ref into the empty `folder`: only that commit, which takes seconds.

    A repository that is a folder is named by its absolute path, so that it means the same from anywhere.
    """
    local = Path(repository).expanduser()
    source = str(local.absolute()) if local.exists() else repository
    # never wait for a password that nobody will type
    environment = {"GIT_TERMINAL_PROMPT": "0"}
    git = ("git", "-c", "safe.directory=*", "-c", "advice.detachedHead=false", "-C", str(folder))
    steps = (
        ("init", "--quiet"),
        ("fetch", "--quiet", "--depth", "1", source, ref),
        ("checkout", "--quiet", "--detach", "FETCH_HEAD"),
    )
    return [process.Command((*git, *step), environment) for step in steps]


def clone(repository: str, ref: str, folder: Path, *, timeout_s: float) -> None:
    """Clones into an unfinished folder that becomes `folder` once it is whole.

    Raises:
        UserError: git failed or took longer than `timeout_s`; with git's own words and what to do.
    """
    with outputs.new_folder(folder, overwrite=True) as unfinished:
        for command in clone_commands(repository, ref, unfinished):
            code, text = process.capture(command, timeout_s=timeout_s)
            if code != 0:
                said = without_credentials(" ".join(text.split())) or f"git exited with {code}"
                raise UserError(
                    f"{ref} could not be cloned from {without_credentials(repository)}: {said}. Check the ref and the"
                    " network; without a network, name a local clone: "
                    f"{checkout.INSTALL_COMMAND} --repository /path/to/Megatron-DeepSpeed"
                )


def without_credentials(text: str) -> str:
    """`text` with `***` for what stands before the `@` in each of its URLs: users, passwords, tokens.

    Not by urllib.parse, which takes a password with an unquoted `/`, `?` or `#` in it for a path, and would show it.
    """
    return re.sub(r"://\S*@", "://***@", text)


def compile_command(folder: Path) -> process.Command:
    """Compiles the dataset helpers for the running interpreter.

    Upstream's Makefile asks `python3-config`, which may belong to another Python.
    """
    source = folder / "megatron" / "data" / "helpers.cpp"
    target = checkout.helpers_file(folder)
    includes = [f"-I{path}" for path in dict.fromkeys((_pybind11_include(), sysconfig.get_path("include")))]
    flags = ("-O3", "-Wall", "-shared", "-std=c++17", "-fPIC")
    if sys.platform == "darwin":  # Python's own symbols are found when the module is loaded
        flags += ("-undefined", "dynamic_lookup")
    return process.Command((*_compiler(), *flags, *includes, str(source), "-o", str(target)))


def build_helpers(folder: Path) -> None:
    """Builds `megatron.data.helpers` whole or not at all.

    Raises:
        UserError: the compiler failed; with its last lines.
    """
    command = compile_command(folder)
    with outputs.new_file(checkout.helpers_file(folder), overwrite=True) as unfinished:
        code, text = process.capture(
            process.Command((*command.argv[:-1], str(unfinished))), timeout_s=_COMPILE_TIMEOUT_S
        )
        if code != 0:
            last_lines = "\n".join(text.strip().splitlines()[-15:])
            raise UserError(f"the dataset helpers did not compile ({command.text()}):\n{last_lines}")


def smoke_command(folder: Path) -> process.Command:
    """Imports upstream's training code under the patches, in a process of its own, and prints the report."""
    environment = {"PYTHONPATH": checkout.python_path(folder), "DS_ACCELERATOR": "cpu"}
    return process.Command((sys.executable, "-m", "train.engine.megatron_deepspeed.report"), environment)


def smoke_import(folder: Path) -> str:
    """The report of what is native and what is replaced.

    Raises:
        UserError: the import failed; with its last lines.
    """
    code, text = process.capture(smoke_command(folder), timeout_s=_SMOKE_IMPORT_TIMEOUT_S)
    if code != 0:
        last_lines = "\n".join(text.strip().splitlines()[-15:])
        raise UserError(f"Megatron-DeepSpeed in {folder} does not import:\n{last_lines}")
    return text[max(text.find("Megatron-DeepSpeed"), 0) :].rstrip()


def _is_whole(folder: Path, ref: str) -> bool:
    """Whether the folder holds a finished clone (the rename made it whole) of that very commit, when ref is one."""
    if not (folder / "pretrain_gpt.py").is_file():
        return False
    return not re.fullmatch(r"[0-9a-f]{40}", ref) or checkout.commit_of(folder) == ref


def _compiler() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("CXX", ""))) or ("g++",)


def _pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:  # --dry_run shows the command before anything is installed
        return "<pybind11 include folder>"
    return str(pybind11.get_include())
