"""The tensors of a Hugging Face folder, by name, one at a time.

    tensors = SafetensorsFolder(folder)
    tensors.read("lm_head.weight")

Each reading opens its file anew: what was read no longer counts as memory in use once the tensor is gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.shard_writer import INDEX, SINGLE
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsFolder:
    """See the module.

    Raises:
        UserError: a file is missing or damaged, or the index does not fit the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, lying in the file."""
        with _opened(self.files[name]) as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        with _opened(self.files[name]) as stored:
            return tuple(stored.get_slice(name).get_shape())


def _files(folder: Path) -> Mapping[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / INDEX
    if not index.is_file():
        with _opened(folder / SINGLE) as stored:
            return dict.fromkeys(stored.keys(), folder / SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = {name: folder / Path(file_name).name for name, file_name in weight_map.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors: it is damaged; get the folder again.") from None
    for file in sorted(set(placed.values())):
        with _opened(file) as stored:
            held = set(stored.keys())
        lost = sorted(name for name, where in placed.items() if where == file and name not in held)
        if lost:
            raise UserError(f"{file} lacks {lost[0]}, which {index.name} places there: get the folder again.")
    return placed


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file} is missing: a model's weights in safetensors were expected.")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged ({error}): get it again.") from None
