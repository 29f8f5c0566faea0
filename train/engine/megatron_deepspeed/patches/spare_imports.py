"""Upstream imports transformers for one of its tokenizers, and W&B to see whether it is there: seconds of each start.

Both are imported as soon as somebody asks for what they have; W&B is started by the worker, where it is wanted. On a
CPU, where no layer is compiled, DeepSpeed's optimizer Muon, which no run uses, pulls in torch's compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from train.engine.megatron_deepspeed.patches import Patch, Run, stand_in


class _LaterTokenizer:
    """Stands where upstream keeps transformers' AutoTokenizer, of which it calls one function."""

    @staticmethod
    def from_pretrained(*names: Any, **options: Any) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(*names, **options)


def _later(name: str) -> types.ModuleType:
    """A module that imports the real one when it is asked for something."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.util.find_spec(name)  # others ask whether it is there

    def of_the_real_one(attribute: str) -> Any:
        if sys.modules.get(name) is module:  # the importing itself asks
            raise AttributeError(f"module {name!r} has no attribute {attribute!r} yet")
        return getattr(importlib.import_module(name), attribute)

    setattr(module, "__getattr__", of_the_real_one)  # noqa: B010
    return module


@contextmanager
def _instead(name: str, module: types.ModuleType) -> Iterator[None]:
    """While inside, `import name` gives this module."""
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def _uncompiled(function: Any) -> Any:
    return function


def _apply(_run: Run) -> str:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import compiler

    spared = []
    muon = "deepspeed.runtime.zero.muon.original_muon"
    if get_accelerator().device_name() == "cpu" and muon not in sys.modules and stand_in.is_importable(muon):
        given, compiler.compile = compiler.compile, lambda: _uncompiled
        try:
            importlib.import_module(muon)
        finally:
            compiler.compile = given
        spared.append("torch's compiler")
    if "transformers" not in sys.modules and "megatron.tokenizer.tokenizer" not in sys.modules:
        module = _later("transformers")
        setattr(module, "AutoTokenizer", _LaterTokenizer)  # noqa: B010
        with _instead("transformers", module):
            importlib.import_module("megatron.tokenizer.tokenizer")
        spared.append("transformers")
    if stand_in.is_importable("wandb") and not {"wandb", "megatron.training"} & set(sys.modules):
        with _instead("wandb", _later("wandb")):
            importlib.import_module("megatron.training")
        spared.append("wandb")
    return f"imported only when needed: {', '.join(spared)}" if spared else ""


PATCH = Patch(
    name="spare-imports",
    reason="transformers and W&B are imported in every rank, two seconds and more of a start, and not called",
    affected="all upstream versions",
    apply=_apply,
)
