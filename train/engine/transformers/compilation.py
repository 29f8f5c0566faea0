"""Whether the model is compiled where the recipe leaves that open: on GPUs for which torch.compile can make kernels.

is_on, note = settle(recipe)    # in a rank, which sees its GPU
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from sysconfig import get_paths

from train.recipe import PretrainRecipe

_OLDEST_CAPABILITY = (7, 0)  # Volta: triton makes kernels from there on


def settle(recipe: PretrainRecipe) -> tuple[bool, str]:
    """The answer, and a line for the log that says why; an empty one where nobody would ask."""
    given = recipe.parallel.torch_compile
    if given is not None:
        return given, ""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False, ""
    obstacle = _obstacle(recipe)
    if obstacle:
        return False, f"torch.compile: off, as {obstacle} (--torch_compile True takes it all the same)"
    return True, "torch.compile: on, the first steps take longer (--torch_compile False switches it off)"


def _obstacle(recipe: PretrainRecipe) -> str:
    import torch

    if recipe.parallel.zero_stage == 3:
        return "ZeRO-3 fetches weights in hooks, at which compiled graphs would end"
    if torch.cuda.get_device_capability(_own_gpu(torch.cuda.device_count())) < _OLDEST_CAPABILITY:
        return "this GPU is older than those that triton makes kernels for"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    named = os.environ.get("CC")  # triton takes it as one program, also when it holds flags
    compiler = which("gcc") or which("clang") if named is None else which(named)
    if compiler is None or not (Path(get_paths()["include"]) / "Python.h").is_file():
        return f"triton needs a C compiler{'' if named is None else f' (CC is {named!r})'} and Python's headers here"
    return ""


def _own_gpu(visible: int) -> int:
    """The number of this rank's GPU among those that it sees, as accelerate has it."""
    return int(os.environ.get("LOCAL_RANK", "0")) % max(visible, 1)
