"""Reads Megatron-DeepSpeed's checkpoint files without running what they may carry.

    state = load(step_dir / "mp_rank_00_model_states.pt")      # plain data, tensors, an argparse.Namespace

A .pt file is a pickle and can name any function for Python to call. Here `torch.load(weights_only=True)` refuses all
but the names below; upstream's own classes become inert stand-ins, so that no engine needs to be installed to read.
Tensors stay on disk until they are looked at.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from train.errors import UserError


class Inert:
    """Stands for a class of upstream's in a checkpoint: keeps its values and does nothing with them."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state  # of a fragment_address: where a parameter lies in a rank's flat optimizer state


# What upstream puts into its states besides tensors and plain data.
_INERT_NAMES = (
    "megatron.core.enums.ModelType",
    "megatron.model.enums.LayerType",
    "megatron.model.enums.AttnType",
    "megatron.model.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnMaskType",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def load(file: Path) -> Any:
    """The content of one checkpoint file.

    Raises:
        UserError: the file is missing, truncated, damaged, or names something that is not on the list.
    """
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: this is not a whole checkpoint; choose another global_stepN.") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise UserError(
                f"{file} names {named[1]}, which no checkpoint of Megatron-DeepSpeed needs, and was not read: it may"
                " run code on loading. Ask whoever made it."
            ) from None
        raise UserError(f"{file} is damaged ({_first_line(error)}): choose another global_stepN.") from None
    except Exception as error:  # whatever a damaged pickle makes of its reader: KeyError, struct.error and more
        raise UserError(
            f"{file} is truncated or damaged ({_first_line(error)}): choose another global_stepN."
        ) from None


def _allowed() -> list[Any]:
    import numpy
    import torch
    from numpy._core import multiarray

    # the functions by which numpy arrays (the random number states) are rebuilt, under the names of numpy 1 and 2
    rebuild = [
        (getattr(multiarray, function), f"{module}.{function}")
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for function in ("_reconstruct", "scalar")
    ]
    number_types = [type(numpy.dtype(name)) for name in ("uint8", "uint32", "uint64", "int64", "float32", "float64")]
    inert = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in _INERT_NAMES]
    return [argparse.Namespace, numpy.ndarray, numpy.dtype, *number_types, *rebuild, *inert, torch.Size]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
