"""Compiles apex or FlashAttention from source for the running torch, and installs it. install.py calls it.

    install_extension(APEX, APEX.source, timeout_s=600)

It becomes a wheel first, which is kept in the project's cache, and pip installs the wheel, which takes seconds. A build
that is killed leaves no wheel; an installation that is killed is found unfinished and done again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from train import outputs, process
from train.engine.megatron_deepspeed import checkout, cuda_toolchain
from train.engine.megatron_deepspeed.clone import clone, clone_commands, without_credentials
from train.engine.megatron_deepspeed.extensions import Extension, state
from train.errors import UserError
from train.free_memory import free_bytes

_FLASH_ARCHITECTURES = ("80", "90", "100", "120")
_IMPORT_TIMEOUT_S = 300.0
_TAIL_LINES = 25


def wheel_folder(extension: Extension) -> Path:
    """Where its wheel is kept: one per version, torch, Python and kind of GPU, as it runs with no other."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    gpus = "".join(f"-sm{capability.replace('.', '')}" for capability in cuda_toolchain.compute_capabilities())
    name = f"{extension.name}-{extension.version[:12]}-torch{torch}-{sys.implementation.cache_tag}{gpus}"
    return checkout.extensions_dir() / name


def wheel_command(extension: Extension, source: str, folder: Path) -> process.Command:
    """Builds the wheel of `source` into `folder` with the running torch; temporary files lie below `folder` too.

    Args:
        source: what pip takes: a requirement, an archive or a folder.
    """
    jobs = cuda_toolchain.parallel_jobs(
        cores=cuda_toolchain.usable_cores(),
        free_gib=free_bytes() / 2**30,
        gib_per_job=extension.gib_per_job,
    )
    environment = {**dict(extension.environment), "TMPDIR": str(folder)}
    environment |= _jobs(extension, os.environ.get("MAX_JOBS", str(jobs)))
    architectures = _architectures(extension)
    if architectures:
        environment[extension.architectures_variable] = architectures
    headers = cuda_toolchain.package_headers()
    if headers:
        environment["CPATH"] = os.pathsep.join(filter(None, (os.environ.get("CPATH"), *headers)))
    pip = (sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-input")
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", extension.name)
    return process.Command((*pip, *options, "--wheel-dir", str(folder), source), environment)


def install_command(wheel: Path, *, over: str = "") -> process.Command:
    """Installs a built wheel. `over` says what stands there already (`extensions.state`), which it replaces."""
    # pip cannot uninstall what has no list of files
    uninstall = "--ignore-installed" if over.endswith("half-installed") else "--force-reinstall"
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input")
    return process.Command((*pip, "--no-deps", "--no-index", uninstall, str(wheel)))


def import_command(extension: Extension) -> process.Command:
    """Imports its kernels in a process of its own; torch first, whose libraries they need."""
    return process.Command((sys.executable, "-c", f"import torch, {', '.join(extension.kernels)}"))


def commands(extension: Extension, source: str) -> list[process.Command]:
    """All that `install_extension` runs where nothing is there yet, for --dry_run."""
    folder = wheel_folder(extension)
    built, steps = without_credentials(source), []
    if extension.is_git:
        built = str(folder / "source")
        steps = clone_commands(without_credentials(source), extension.version, Path(built))
    wheel = folder / f"{extension.name}-*.whl"
    return [*steps, wheel_command(extension, built, folder), install_command(wheel), import_command(extension)]


def install_extension(extension: Extension, source: str, *, timeout_s: float) -> str:
    """Builds and installs what is missing of it, and says in one line what was done.

    Raises:
        UserError: the source cannot be had, the build fails, or the kernels do not import; with the last lines of the
            log, which is kept.
    """
    version, lacks = state(extension)
    if version is not None:
        return f"{extension.name} {version} is already installed: left as it is (pinned here: {extension.version})"
    folder = wheel_folder(extension)
    log = folder.with_name(f"{folder.name}.log")
    if not folder.is_dir():
        _build(extension, source, folder, log, timeout_s=timeout_s)
    wheel = next(folder.glob("*.whl"))
    _run(install_command(wheel, over=lacks), log, f"pip could not install {wheel}")
    code, text = process.capture(import_command(extension), timeout_s=_IMPORT_TIMEOUT_S)
    if code != 0:
        last_line = (text.strip().splitlines() or [f"exit code {code}"])[-1]
        raise UserError(
            f"{extension.name} was built and installed but does not import: {last_line}. Take it out with"
            f" `{shlex.quote(sys.executable)} -m pip uninstall {extension.name}`, remove {folder}, and look at {log}."
        )
    return f"{extension.name} {extension.version[:12]} built and installed; wheel and log are in {folder.parent}"


def _build(extension: Extension, source: str, folder: Path, log: Path, *, timeout_s: float) -> None:
    with outputs.scratch_folder(folder) as scratch:
        built = source
        if extension.is_git:
            built = str(scratch / "source")
            clone(source, extension.version, Path(built), timeout_s=timeout_s, option=f"--{extension.name}_source")
        elif Path(source).expanduser().exists():
            built = str(Path(source).expanduser().absolute())
        command = wheel_command(extension, built, scratch)
        jobs = command.environment["MAX_JOBS"]
        print(f"compiling {extension.name}, MAX_JOBS={jobs}, which takes long; its log is {log}", flush=True)
        log.unlink(missing_ok=True)
        _run(command, log, f"{extension.name} did not build from {without_credentials(source)}")
        with outputs.new_folder(folder) as unfinished:
            for wheel in scratch.glob("*.whl"):
                shutil.move(wheel, unfinished / wheel.name)


def _run(command: process.Command, log: Path, failed: str) -> None:
    code = process.run(command, log=log)
    if code == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = "\n".join(lines[-_TAIL_LINES:])
    hint = ""
    if code == 137 or re.search(r"Killed|signal 9", text):
        hint = " A compiler was killed, as when memory is full: set MAX_JOBS lower than it was."
    elif re.search(r"No matching distribution|connection|Connection", text):
        hint = (
            " Without a network, name a downloaded source archive (NAME.tar.gz) with --flash_attn_source, or a clone"
            " with --apex_source."
        )
    first = first_error(lines)
    raise UserError(
        f"{failed}: exit code {code}.{hint}{f' First error: {first}.' if first else ''} The whole log is {log}; it"
        f" ends:\n{text}"
    )


def first_error(lines: Sequence[str]) -> str:
    """The first line in which a compiler or linker says what is wrong, which pip follows with many more; else ""."""
    says_why = re.compile(r"\berror: (?!subprocess-exited|command )|cannot find -l")
    return next((line.strip() for line in lines if says_why.search(line)), "")


def _jobs(extension: Extension, jobs: str) -> dict[str, str]:
    """How many compilers run at once, `jobs` in all: half for the largest module, two for each of the others' files."""
    others = int(jobs) // 4 if extension.parallel_variable and jobs.isdigit() else 0
    if others == 0:
        return {"MAX_JOBS": jobs}
    return {"MAX_JOBS": str(int(jobs) - 2 * others), str(extension.parallel_variable): str(1 + others)}


def _architectures(extension: Extension) -> str:
    """Of this machine's GPUs, as torch or FlashAttention names them; "" leaves the choice to the build."""
    variable, here = extension.architectures_variable, cuda_toolchain.compute_capabilities()
    if variable in os.environ:
        return os.environ[variable]
    if variable == "TORCH_CUDA_ARCH_LIST":
        return ";".join(here)
    names = (f"{one.partition('.')[0]}0" for one in here)  # 8.0 runs on all 8.x
    return ";".join(dict.fromkeys(name for name in names if name in _FLASH_ARCHITECTURES))
