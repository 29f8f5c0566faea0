"""apex and FlashAttention: the pinned versions, whether this machine can build them, and whether they are there.

refuse(problems((APEX,), read_toolchain()))        # then extension_build.py builds them
version, lacks = state(APEX)
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from train.engine.megatron_deepspeed import cuda_toolchain
from train.engine.megatron_deepspeed.cuda_toolchain import Toolchain

# Without build isolation pip takes these from the running environment: what the two setup.py import.
_BUILD_TOOLS = ("pip", "setuptools", "wheel", "packaging", "psutil", "ninja")


@dataclass(frozen=True)
class Extension:
    """A package of CUDA kernels.

    Attributes:
        name: what pip calls it.
        option: the flag that asks for it.
        version: what is pinned: a commit, or a released version.
        source: where it comes from unless the user names another place: a git repository, or a pip requirement.
        is_git: whether the source is a git repository at that commit, or something that pip fetches by itself.
        kernels: its compiled modules that the engine uses.
        environment: what its setup.py is told.
        gib_per_job: memory that one of its compilers takes.
        same_cuda_minor: whether its setup.py insists on nvcc and torch of the very same CUDA version.
        below_torch: the first torch (major, minor) that the pinned version does not compile with; None: none known.
        architectures_variable: the variable that limits it to some GPUs.
        parallel_variable: the variable by which its setup.py compiles several of its modules at once; None: it has one.
    """

    name: str
    option: str
    version: str
    source: str
    is_git: bool
    kernels: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    gib_per_job: float
    same_cuda_minor: bool
    architectures_variable: str
    below_torch: tuple[int, int] | None = None
    parallel_variable: str | None = None


# The newest commit that was read (2026-07-08): the last tag, 25.09, calls tensor methods that torch has dropped since.
APEX = Extension(
    name="apex",
    option="--with_apex",
    version="6424da3b4faa6c8f062da4a48c424fff3f02d42d",
    source="https://github.com/NVIDIA/apex",
    is_git=True,
    kernels=("fused_layer_norm_cuda", "amp_C"),
    environment=(("APEX_CPP_EXT", "1"), ("APEX_CUDA_EXT", "1")),
    gib_per_job=4.0,
    same_cuda_minor=True,  # setup.py: check_cuda_torch_binary_vs_bare_metal
    architectures_variable="TORCH_CUDA_ARCH_LIST",  # without it, and without a GPU that torch sees, it takes seven
    parallel_variable="APEX_PARALLEL_BUILD",
)
# Of its GPUs' kernels each machine needs one kind; all four take four times as long. 9 GiB per job is setup.py's own
# figure, with four threads in each nvcc. Compiled as C++17, which torch 2.14's headers refuse.
FLASH_ATTN = Extension(
    name="flash_attn",
    option="--with_flash_attn",
    version="2.8.3.post1",
    source="flash-attn==2.8.3.post1",
    is_git=False,
    kernels=("flash_attn_2_cuda",),
    environment=(("FLASH_ATTENTION_FORCE_BUILD", "TRUE"), ("NVCC_THREADS", "4")),
    gib_per_job=9.0,
    same_cuda_minor=False,
    below_torch=(2, 14),
    architectures_variable="FLASH_ATTN_CUDA_ARCHS",
)


def problems(extensions: Sequence[Extension], toolchain: Toolchain) -> list[str]:
    """Why these cannot be built here, each with what to do; empty when they can."""
    found: list[str] = []
    for extension in extensions:
        found += cuda_toolchain.misfits(toolchain, extension.option, same_minor=extension.same_cuda_minor)
        found += _torch_problems(extension, toolchain)
    missing = [name for name in _BUILD_TOOLS if importlib.util.find_spec(name) is None]
    if extensions and missing:
        python = shlex.quote(sys.executable)
        pip_first = f"{python} -m ensurepip && " if "pip" in missing else ""
        others = " ".join(name for name in missing if name != "pip") or "pip"
        found.append(
            f"{' and '.join(extension.option for extension in extensions)}: building needs {', '.join(missing)} in this"
            f" environment: run {pip_first}{python} -m pip install {others}"
        )
    return found


def state(extension: Extension) -> tuple[str | None, str]:
    """(its version, or None when it is not there whole; what is missing of it, or "" when nothing is).

    A PyPI package of another kind is called apex too: it lacks the kernels.
    """
    try:
        distribution = metadata.distribution(extension.name)
    except metadata.PackageNotFoundError:
        return None, "not installed"
    files = distribution.files
    if files is None:  # pip writes the list last
        return None, f"{extension.name} {distribution.version}: half-installed"
    gone = next((str(file) for file in files if file.suffix != ".pyc" and not Path(str(file.locate())).exists()), None)
    if gone is not None:
        return None, f"{extension.name} {distribution.version}: {gone} is missing"
    lacking = [module for module in extension.kernels if importlib.util.find_spec(module) is None]
    if lacking:
        return None, f"{extension.name} {distribution.version}: without its CUDA kernels ({', '.join(lacking)})"
    return str(distribution.version), ""


def _torch_problems(extension: Extension, toolchain: Toolchain) -> Iterator[str]:
    if extension.below_torch is None:
        return
    major, minor = (int(part) for part in toolchain.torch.split(".")[:2])
    if (major, minor) >= extension.below_torch:
        first = ".".join(str(part) for part in extension.below_torch)
        yield (
            f"{extension.option}: {extension.name} {extension.version} does not compile with torch {toolchain.torch}"
            f" ({first} and later want C++20): install an older torch, or leave {extension.option} out: torch's own"
            " kernels stand in."
        )
