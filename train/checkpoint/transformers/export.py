"""Exports a checkpoint of the transformers engine: the same tensors, the vocabulary cut to the tokenizer's own size.

Called through `train.checkpoint.export`. Reads and writes one shard at a time; tensors keep their type and, the cut
rows apart, their bytes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.export import ExportResult
from train.errors import UserError, refuse

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class _Layout:
    """What a configuration says the weights must be.

    Attributes:
        shapes: tensor name -> shape, as the configuration's own model has them.
        tied: names that may be absent because another tensor stands for them.
        vocabulary: names whose rows are the vocabulary.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    vocabulary: frozenset[str]


def export(checkpoint_dir: Path, output_dir: Path, *, vocab_size: int, model_max_length: int) -> ExportResult:
    """See `train.checkpoint.export.export`."""
    from safetensors.torch import save_file

    config = read_config(checkpoint_dir)
    refuse([*_vocabulary_problems(config, vocab_size), *_length_problems(config, model_max_length)])
    layout = _layout(config)
    shards = _shards(checkpoint_dir)
    refuse(_name_problems(shards, layout, checkpoint_dir))

    parameters, types, weight_map, total_bytes = 0, Counter[str](), {}, 0
    for shard, names in shards.items():
        tensors = dict(_read(shard, names, layout, vocab_size))
        save_file(tensors, output_dir / shard.name, metadata={"format": "pt"})
        for name, tensor in tensors.items():
            parameters += tensor.numel()
            types[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
            total_bytes += tensor.numel() * tensor.element_size()
            weight_map[name] = shard.name
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (output_dir / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    dtype = types.most_common(1)[0][0]
    config.vocab_size = vocab_size
    config.dtype = dtype
    if _is_rotary(config):
        config.max_position_embeddings = model_max_length
    config.save_pretrained(output_dir)
    source = f"{checkpoint_dir.name} of the transformers engine ({config.model_type}, {len(weight_map)} tensors)"
    return ExportResult(parameters, len(weight_map), dtype, source)


def weights(checkpoint_dir: Path, *, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the checkpoint after the cut, one at a time."""
    layout = _layout(read_config(checkpoint_dir))
    for shard, names in _shards(checkpoint_dir).items():
        yield from _read(shard, names, layout, vocab_size)


def read_config(checkpoint_dir: Path) -> Any:
    """The checkpoint's transformers configuration.

    Raises:
        UserError: config.json is missing, is not JSON, or names a model that transformers does not know.
    """
    from transformers import AutoConfig

    file = checkpoint_dir / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: this is not a whole checkpoint; choose another global_stepN.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}): the checkpoint is damaged; choose another.") from None
    if not isinstance(given, dict) or "model_type" not in given or not isinstance(given.get("vocab_size"), int):
        raise UserError(f"{file} lacks model_type or vocab_size: this is not a language model's config.json.")
    try:
        return AutoConfig.from_pretrained(checkpoint_dir)
    except (ValueError, KeyError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"transformers cannot read {file}: {first_line}") from None


def _layout(config: Any) -> _Layout:
    """Builds the configured model without memory for its weights, and looks at its names and shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    of_vocabulary = {id(parameter) for module in embeddings for parameter in module.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    canonical = {name for name, _ in model.named_parameters()}
    return _Layout(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=frozenset(parameters) - canonical,
        vocabulary=frozenset(name for name, parameter in parameters.items() if id(parameter) in of_vocabulary),
    )


def _shards(checkpoint_dir: Path) -> dict[Path, tuple[str, ...]]:
    """Each safetensors file and the tensors to read from it."""
    index = checkpoint_dir / _INDEX
    if not index.is_file():
        file = checkpoint_dir / _SINGLE
        with _opened(file) as stored:
            return {file: tuple(stored.keys())}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file_name in sorted(weight_map.items()):
            files.setdefault(checkpoint_dir / Path(file_name).name, []).append(name)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors: the checkpoint is damaged; choose another.") from None
    for file, names in files.items():
        with _opened(file) as stored:
            lost = sorted(set(names) - set(stored.keys()))
        if lost:
            raise UserError(f"{file} lacks {lost[0]}, which {index.name} places there: the checkpoint is damaged.")
    return {file: tuple(names) for file, names in sorted(files.items())}


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file} is missing: this is not a whole checkpoint; choose another global_stepN.")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged ({error}): choose another global_stepN.") from None


def _read(shard: Path, names: tuple[str, ...], layout: _Layout, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    with _opened(shard) as stored:
        for name in names:
            if name in layout.vocabulary:
                yield name, stored.get_slice(name)[:vocab_size].clone()  # a view would keep, and save, the whole
            else:
                yield name, stored.get_tensor(name)


def _name_problems(shards: Mapping[Path, tuple[str, ...]], layout: _Layout, checkpoint_dir: Path) -> Iterator[str]:
    found: dict[str, tuple[int, ...]] = {}
    for shard, names in shards.items():
        with _opened(shard) as stored:
            found |= {name: tuple(stored.get_slice(name).get_shape()) for name in names}
    missing = sorted(set(layout.shapes) - set(found) - layout.tied)
    unknown = sorted(set(found) - set(layout.shapes))
    if missing:
        yield f"{checkpoint_dir} lacks {len(missing)} tensors of its config.json, first {missing[0]}: it is not whole."
    if unknown:
        yield f"{checkpoint_dir} holds {len(unknown)} tensors its config.json does not have, first {unknown[0]}."
    for name in sorted(set(found) & set(layout.shapes)):
        if found[name] != layout.shapes[name]:
            yield f"{name} is {list(found[name])}, config.json makes it {list(layout.shapes[name])}: they do not fit."
            return


def _vocabulary_problems(config: Any, vocab_size: int) -> Iterator[str]:
    if config.vocab_size < vocab_size:
        yield (
            f"the tokenizer has {vocab_size} pieces, the model {config.vocab_size} embedding rows: this is not the "
            "tokenizer that the model was trained with; pass that one to --input_tokenizer_file."
        )


def _length_problems(config: Any, model_max_length: int) -> Iterator[str]:
    positions = getattr(config, "max_position_embeddings", math.inf)
    if model_max_length > positions and not _is_rotary(config):
        yield (
            f"--input_model_max_length {model_max_length} is more than the {positions} positions the model has: "
            f"pass {positions} or less."
        )


def _is_rotary(config: Any) -> bool:
    """Whether positions are plain rotary ones, which have no table that ends; scaled kinds depend on their length."""
    rope = getattr(config, "rope_parameters", None)
    return isinstance(rope, Mapping) and rope.get("rope_type", "default") == "default"
