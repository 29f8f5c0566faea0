"""Modules that are imported although nothing in a run calls them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn


def is_importable(name: str) -> bool:
    """Whether a module is there; its parent packages are imported, it is not."""
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def put(module_name: str, names: Sequence[str], *, reason: str) -> None:
    """Registers a module whose functions refuse to be called."""
    module = types.ModuleType(module_name)
    module.__spec__ = importlib.machinery.ModuleSpec(module_name, loader=None)
    for name in names:
        setattr(module, name, _refusing(f"{module_name}.{name}", reason))
    sys.modules[module_name] = module


def _refusing(name: str, reason: str) -> Any:
    def refuse(*_args: Any, **_options: Any) -> NoReturn:
        raise RuntimeError(f"{name} is a stand-in: {reason}")

    return refuse
