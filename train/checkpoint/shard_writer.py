"""Writes a model's tensors as safetensors, three tensors in memory at a time, in shards of a bounded size.

    write_shards(folder, specs, read)           # model.safetensors, or numbered shards and their index

What safetensors' own `save_file` needs is the whole shard in memory. The format (https://github.com/huggingface/
safetensors#format) is eight bytes of header length, a header in JSON that names each tensor's type, shape and place,
and the bytes of the tensors. Names, shapes and types are known before any tensor is read: the header comes first, and
each tensor goes to the file as it is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8
_WRITERS = 2


class Spec(NamedTuple):
    """What a tensor will be.

    Attributes:
        name: in the file.
        shape: its sizes.
        dtype: such as `bfloat16`.
        item_bytes: bytes of one number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    item_bytes: int

    @property
    def numbers(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.numbers * self.item_bytes


def spec_of(name: str, shape: Sequence[int], dtype: Any) -> Spec:
    """The description of a tensor of a torch type."""
    return Spec(name, tuple(shape), str(dtype).removeprefix("torch."), dtype.itemsize)


def write_shards(
    folder: Path, specs: Sequence[Spec], read: Callable[[str], Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes all tensors, in the order of `specs` as far as shards go.

    Args:
        folder: an existing folder.
        specs: what will be written.
        read: gives a tensor by its name.
        shard_bytes: the largest shard; a single tensor may be larger.
    """
    import torch

    shards = _shards(specs, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in _from_1(shards)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # copying waits for memory: more threads only take turns with those that write
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, read)
    finally:
        torch.set_num_threads(threads)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": sum(spec.bytes for spec in specs)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _from_1(items: Sequence[Any]) -> range:
    return range(1, len(items) + 1)


def _shards(specs: Sequence[Spec], shard_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    # wider types first, so that every tensor starts at a multiple of its type's size
    return [sorted(shard, key=lambda spec: -spec.item_bytes) for shard in shards]


def _write_shard(file: Path, shard: Sequence[Spec], read: Callable[[str], Tensor]) -> None:
    """Writes tensors while the next ones are made: the writing is the larger part of the work."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for spec in shard:
        header[spec.name] = {
            "dtype": _TYPES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [place, place + spec.bytes],
        }
        place += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    text = len(text).to_bytes(8, "little") + text
    place = len(text)
    with file.open("wb", buffering=0) as stream, ThreadPoolExecutor(_WRITERS) as pool:
        _write_at(stream.fileno(), text, 0)
        writing: set[Future[None]] = set()
        for spec in shard:
            tensor = read(spec.name)
            assert spec_of(spec.name, tensor.shape, tensor.dtype) == spec, f"{spec.name} is not what was announced"
            if len(writing) == _WRITERS:
                written, writing = wait(writing, return_when=FIRST_COMPLETED)
                _raise_failed(written)
            writing.add(pool.submit(_write_tensor, stream.fileno(), tensor, place))
            del tensor
            place += spec.bytes
        _raise_failed(wait(writing).done)


def _raise_failed(written: Iterable[Future[None]]) -> None:
    for future in written:
        future.result()


def _write_tensor(descriptor: int, tensor: Tensor, place: int) -> None:
    import torch

    _write_at(descriptor, tensor.contiguous().view(-1).view(torch.uint8).numpy().data, place)


def _write_at(descriptor: int, content: bytes | memoryview, place: int) -> None:
    view = memoryview(content)
    while len(view):  # the system writes at most 2 GB at once
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count
