"""Builds upstream's dataset helpers (`megatron.data.helpers`, C++) for the running interpreter. install.py calls it.

build_helpers(folder)      # of the checkout
check_helpers(folder)      # that they work
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train import outputs, process
from train.engine.megatron_deepspeed import checkout, helpers_check
from train.errors import UserError

_COMPILE_TIMEOUT_S = 300.0
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)  # others come from outside
_CHECK_TIMEOUT_S = 300.0  # torch's first import from a shared disk


def compile_command(folder: Path) -> process.Command:
    """Compiles the dataset helpers for the running interpreter.

    Upstream's Makefile asks `python3-config`, which may belong to another Python.
    """
    source = folder / "megatron" / "data" / "helpers.cpp"
    target = checkout.helpers_file(folder)
    includes = [f"-I{path}" for path in dict.fromkeys((_pybind11_include(), sysconfig.get_path("include")))]
    flags = ["-O3", "-Wall", "-shared", "-std=c++17", "-fPIC"]
    if sys.platform == "darwin":  # Python's own symbols are found when the module is loaded
        flags += ["-undefined", "dynamic_lookup"]
    else:
        # A compiler that brings its C++ library as an archive alone, as some modules and images do, would mix that with
        # the library that torch has loaded: the first number that the helpers print ends the process.
        flags += ["-Wl,--exclude-libs,ALL"]
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


def check_helpers(folder: Path) -> str:
    """Lets the helpers index three samples in a process that has torch loaded, as training does.

    Returns:
        A line that says whether they work, or why they could not be tried: another version's may be called otherwise.

    Raises:
        UserError: they crash or return something else, and are deleted, so that the next installation compiles anew.
    """
    built = checkout.helpers_file(folder)
    command = process.Command((sys.executable, "-m", "train.engine.megatron_deepspeed.helpers_check", str(built)))
    code, text = process.capture(command, timeout_s=_CHECK_TIMEOUT_S)
    if code == 0:
        return "dataset helpers work beside torch"
    last_lines = text.strip().splitlines()[-15:]
    if code not in (helpers_check.WRONG, *(-number for number in _CRASHES)):
        why = (last_lines or [f"status {code}"])[-1]
        return f"note: dataset helpers could not be tried: {why} ({command.text()})"
    built.unlink(missing_ok=True)
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else "a wrong index"
    said = "\n".join((f" {built.name} said:", *last_lines)) if last_lines else ""
    raise UserError(
        f"the compiled dataset helpers do not work beside torch ({ended}) and are deleted. Name another compiler in "
        f"CXX, such as CXX=/usr/bin/g++, and run this again.{said}"
    )


def missing() -> Iterator[str]:
    """What the machine lacks to compile them, each with what mends it."""
    if shutil.which(_compiler()[0]) is None:
        yield f"no C++ compiler {_compiler()[0]!r} on the PATH: install g++, or name one in CXX."
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        yield f"{header} is missing: install this Python's development headers (python3-dev)."


def _compiler() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("CXX", ""))) or ("g++",)


def _pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:  # --dry_run shows the command before anything is installed
        return "<pybind11 include folder>"
    return str(pybind11.get_include())
