"""What compiles CUDA code on this machine, and whether it fits torch. extensions.py asks before it builds anything.

found = read_toolchain()
problems = list(misfits(found, "--with_apex", same_minor=True))
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train import process
from train.errors import UserError

_IMPORT_TIMEOUT_S = 300.0
_ASK_TORCH = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
print(json.dumps([torch.__version__, torch.version.cuda, CUDA_HOME]))
"""
_HEADER = "cuda_runtime.h"
# torch's headers include these of the CUDA libraries, which a toolkit may lack and torch's own packages bring
_LIBRARY_HEADERS = ("cusparse.h", "cublas_v2.h", "cusolverDn.h")
_WITHOUT = "or leave {option} out: torch's own kernels stand in."


@dataclass(frozen=True)
class Toolchain:
    """Torch and the CUDA toolkit that would compile for it.

    Attributes:
        torch: its version.
        torch_cuda: the CUDA version that torch was built for; None for a build without CUDA.
        cuda_home: the toolkit that torch's extension builder takes; None when it finds none.
        nvcc: the toolkit's version, such as 13.0; None when its nvcc is missing or does not say.
        has_headers: whether the toolkit's own headers lie in that folder.
    """

    torch: str
    torch_cuda: str | None
    cuda_home: str | None
    nvcc: str | None
    has_headers: bool = True


def read_toolchain() -> Toolchain:
    """Asks torch, in a process of its own (its extension builder changes the import path), and the nvcc it would call.

    Raises:
        UserError: torch does not import.
    """
    code, text = process.capture(process.Command((sys.executable, "-c", _ASK_TORCH)), timeout_s=_IMPORT_TIMEOUT_S)
    last_line = (text.strip().splitlines() or [""])[-1]
    if code != 0:
        raise UserError(f"torch does not import in {sys.executable}: {last_line}; install the requirements first.")
    torch, torch_cuda, cuda_home = json.loads(last_line)
    release, has_headers = None, True
    if cuda_home is not None:
        home = Path(cuda_home)
        has_headers = any((home / "include").glob(_HEADER)) or any(home.glob(f"targets/*/include/{_HEADER}"))
        code, text = process.capture(process.Command((str(Path(cuda_home) / "bin" / "nvcc"), "--version")))
        release = parse_nvcc_release(text) if code == 0 else None
    return Toolchain(torch, torch_cuda, cuda_home, release, has_headers)


def parse_nvcc_release(text: str) -> str | None:
    """`13.0` from what `nvcc --version` prints."""
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else None


def misfits(toolchain: Toolchain, option: str, *, same_minor: bool) -> Iterator[str]:
    """Why this toolchain cannot compile kernels for this torch, with the way out; nothing when it can.

    Args:
        option: the flag that asked for it.
        same_minor: whether the minor versions must be equal too, as apex insists.
    """
    without = _WITHOUT.format(option=option)
    if toolchain.torch_cuda is None:
        yield (
            f"{option}: torch {toolchain.torch} is a build without CUDA, and what {option} compiles runs on CUDA only:"
            f" install a CUDA build of torch (https://pytorch.org/get-started/locally), {without}"
        )
        return
    wanted = toolchain.torch_cuda
    if toolchain.cuda_home is None:
        yield (
            f"{option}: no CUDA toolkit: nvcc is not on the PATH, CUDA_HOME is not set and there is no /usr/local/cuda;"
            f" install the toolkit of CUDA {wanted}, load its module, or set CUDA_HOME, {without}"
        )
        return
    if toolchain.nvcc is None:
        yield (
            f"{option}: {toolchain.cuda_home}/bin/nvcc does not run: point CUDA_HOME at a whole toolkit of CUDA"
            f" {wanted} (a runtime-only one has no nvcc), {without}"
        )
        return
    if not toolchain.has_headers:
        yield (
            f"{option}: {toolchain.cuda_home} has an nvcc but no include/{_HEADER}, as where its nvcc only calls"
            f" another one: set CUDA_HOME to the toolkit of CUDA {wanted} itself, such as /usr/local/cuda, {without}"
        )
        return
    parts = 2 if same_minor else 1
    if toolchain.nvcc.split(".")[:parts] != wanted.split(".")[:parts]:
        yield (
            f"{option}: nvcc in {toolchain.cuda_home} is of CUDA {toolchain.nvcc}, torch {toolchain.torch} of CUDA"
            f" {wanted}, and {'the build wants equal ones' if same_minor else 'the major versions must be equal'}: set"
            f" CUDA_HOME to a toolkit of CUDA {wanted}, install a torch for CUDA {toolchain.nvcc}, {without}"
        )


def package_headers() -> tuple[str, ...]:
    """Folders with the CUDA libraries' headers that came with a torch from PyPI; compilers look there last."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    folders = {file.parent for root in roots for name in _LIBRARY_HEADERS for file in root.glob(f"*/include/{name}")}
    return tuple(str(folder) for folder in sorted(folders))


def parallel_jobs(*, cores: int, free_gib: float, gib_per_job: float) -> int:
    """How many compilers may run at once without filling the memory: at least one."""
    return max(1, min(cores, int(free_gib / gib_per_job)))


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_capabilities() -> tuple[str, ...]:
    """Of the GPUs here, such as ("9.0",); empty without GPUs or without a driver."""
    query = process.Command(("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"))
    code, text = process.capture(query)
    return tuple(sorted(set(re.findall(r"^\d+\.\d+$", text, re.MULTILINE)))) if code == 0 else ()
