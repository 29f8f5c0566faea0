"""Brings Megatron-DeepSpeed to this machine: clone, dataset helpers, requirements, apex, FlashAttention, report.

Called by `scripts/common/install_megatron_deepspeed.sh`; run again it only does what is missing, and two at the same
time take turns.

    install(InstallSettings(repository="/shared/Megatron-DeepSpeed"))
"""

from __future__ import annotations

import fcntl
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from train import process
from train.engine.megatron_deepspeed import checkout, cuda_toolchain, extension_build, extensions, helpers_build
from train.engine.megatron_deepspeed.checkout import Checkout, find_checkout
from train.engine.megatron_deepspeed.clone import clone, clone_commands, without_credentials
from train.engine.megatron_deepspeed.extensions import APEX, FLASH_ATTN, Extension
from train.errors import UserError, refuse
from train.settings import setting

__all__ = ["Checkout", "InstallSettings", "find_checkout", "install"]

# Imported by upstream's code and declared nowhere.
REQUIRED_PACKAGES = ("six", "nltk", "pybind11", "einops", "regex", "ninja")
_SMOKE_IMPORT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class InstallSettings:
    """What to install."""

    repository: str = setting(checkout.DEFAULT_REPOSITORY, help="URL, clone, bare repository or git bundle")
    ref: str = setting(checkout.PINNED_COMMIT, help="commit (all 40 characters), tag or branch")
    with_apex: bool = setting(False, help="compile NVIDIA's apex too (CUDA toolkit needed)")
    with_flash_attn: bool = setting(False, help="compile FlashAttention 2 too (CUDA toolkit needed)")
    apex_source: str = setting(APEX.source, help="URL, clone, bare repository or git bundle of apex")
    flash_attn_source: str = setting(FLASH_ATTN.source, help="what pip builds: a requirement or a source archive")
    timeout_s: float = setting(600.0, help="give a clone up after this many seconds")
    dry_run: bool = setting(False, help="print what would be done", flag_only=True)


def install(settings: InstallSettings) -> int:
    """Installs the checkout and prints what is native and what is replaced.

    Raises:
        UserError: packages or a compiler are missing, the clone fails or takes too long, something does not compile
            or, compiled, does not work, or the smoke import fails.
    """
    folder = checkout.folder_for(settings.ref, settings.repository)
    wanted = _extensions(settings)
    if settings.dry_run:
        steps = clone_commands(without_credentials(settings.repository), settings.ref, folder)
        steps.append(helpers_build.compile_command(folder))
        for extension, source in wanted:
            steps += extension_build.commands(extension, source)
        for command in (*steps, smoke_command(folder)):
            print(command.text())
        return 0
    refuse([*missing_requirements(), *_extension_problems([extension for extension, _ in wanted])])
    with _one_at_a_time():
        if _is_whole(folder, settings.ref):
            print(f"Megatron-DeepSpeed {settings.ref} is already in {folder}")
        else:
            clone(settings.repository, settings.ref, folder, timeout_s=settings.timeout_s)
            print(f"Megatron-DeepSpeed {settings.ref} cloned into {folder}")
        _bring_helpers(folder)
        for extension, source in wanted:
            print(extension_build.install_extension(extension, source, timeout_s=settings.timeout_s))
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
    return [*problems, *helpers_build.missing()]


def smoke_command(folder: Path) -> process.Command:
    """Imports upstream's training code under the patches, in a process of its own, and prints the report."""
    environment = {"PYTHONPATH": checkout.python_path(folder)}
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


def _extensions(settings: InstallSettings) -> list[tuple[Extension, str]]:
    """What is asked for, with where it comes from."""
    asked = ((settings.with_apex, APEX, settings.apex_source),
             (settings.with_flash_attn, FLASH_ATTN, settings.flash_attn_source))  # fmt: skip
    return [(extension, source) for wanted, extension, source in asked if wanted]


def _extension_problems(wanted: list[Extension]) -> list[str]:
    """Nothing is asked of the machine for what is installed already."""
    missing = [extension for extension in wanted if extensions.state(extension)[0] is None]
    return extensions.problems(missing, cuda_toolchain.read_toolchain()) if missing else []


def _bring_helpers(folder: Path) -> None:
    """Compiles the dataset helpers where they are missing, or were compiled in a way that does not work here."""
    file = checkout.helpers_file(folder)
    if file.is_file():
        print(f"dataset helpers are already built: {file.name}")
        try:
            print(helpers_build.check_helpers(folder))
            return
        except UserError as error:
            print(f"{error.problems[0].partition(' and are deleted')[0]}: they are compiled anew")
    helpers_build.build_helpers(folder)
    print(f"dataset helpers built: {file.name}")
    print(helpers_build.check_helpers(folder))


def _is_whole(folder: Path, ref: str) -> bool:
    """Whether the folder holds a finished clone (the rename made it whole) of that very commit, when ref is one."""
    if not (folder / "pretrain_gpt.py").is_file():
        return False
    return not checkout.is_commit(ref) or checkout.commit_of(folder) == ref


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Waits until no other installation writes to this project's cache. The kernel frees it when its owner dies."""
    guard = checkout.PROJECT_ROOT / ".cache" / ".installing"
    guard.parent.mkdir(parents=True, exist_ok=True)
    with guard.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another installation is under way: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
