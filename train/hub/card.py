"""The model card, README.md on the Hub: what the manifests say of data, training and verification, and nothing else.

    text = model_card(folder, repository="USER/NAME", license="apache-2.0")

No file paths are shown, only file names: a card is public, a cluster's folders are not. The text depends on the
folder alone, so that the same folder gives the same card wherever it is called from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from train import manifest
from train.checkpoint import lineage, verification
from train.errors import UserError
from train.evaluate import record as evaluation

# Chapters in the order of the steps; a step's name begins with the key.
_CHAPTERS = {
    "train_tokenizer": "Tokenizer",
    "preprocess": "Training data",
    "pretrain": "Pretraining",
    "finetune": "Finetuning",
}
_SIZES = {
    "model_type": "architecture",
    "hidden_size": "hidden size",
    "intermediate_size": "feed-forward size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "max_position_embeddings": "longest sequence (tokens)",
    "vocab_size": "vocabulary",
    "r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
}
# GPT-2's config.json has names of its own for the same sizes.
_GPT2_NAMES = {"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers"}
_GPT2_NAMES |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
# The settings that shape a training; the names of both pretraining and finetuning.
_TRAINING_SETTINGS = (
    *("sequence_length", "max_seq_length", "global_batch_size", "num_train_epochs", "lr", "min_lr", "learning_rate"),
    *("lr_decay_style", "lr_scheduler_type", "weight_decay", "precision", "seed"),
)
_CURVE_ROWS = 12


def model_card(folder: Path, *, repository: str, license: str = "", base_model: str = "") -> str:
    """The card's Markdown with its YAML header.

    Args:
        folder: a verified model folder; its manifest.json, and the manifests that one leads to, are the source.
        repository: the name the model is loaded by.
        license: the Hub's licence identifier; no licence field when empty.
        base_model: the base model's name on the Hub; when empty, what the finetuning's manifest names, if that
            says that it came from the Hub.

    Raises:
        UserError: config.json, of an adapter adapter_config.json, or the verification's record is missing or damaged.
    """
    records = _records(folder)
    config = _config(folder)
    record = verification.read(folder) or {}
    base_model = base_model or _base_model(records)
    parts = [
        _header(license, base_model, library="transformers" if "peft_type" not in config else "peft"),
        f"# {repository.rpartition('/')[2]}",
        _opening(config, record, base_model),
        _section("Model", _table(("", ""), _size_rows(config, record))),
    ]
    for prefix, title in _CHAPTERS.items():
        parts += [_chapter(title, item) for item in records if str(item["step"]).startswith(prefix)]
    parts.append(_section("Evaluation", _evaluation(folder)))
    parts.append(_section("Verification", _table(("check", "result"), _verification_rows(record))))
    parts.append(_section("Software", _table(("package", "version"), _software_rows(records))))
    parts.append(_section("Use", _usage(repository)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _records(folder: Path) -> list[dict[str, Any]]:
    """The folder's own manifest and all behind it, each once; a converted folder carries those behind it along."""
    if not (folder / manifest.FILE_NAME).is_file():
        return []
    own = manifest.read(folder)
    found: dict[str, dict[str, Any]] = {}
    for item in (own, *lineage.trace(lineage.input_files(own))):
        carried = item["results"].get("lineage") if isinstance(item["results"], Mapping) else None
        for one in (item, *(carried or ())):
            found.setdefault(f"{one['step']} {one.get('finished_at')} {one.get('seconds')}", one)
    return list(found.values())


def _config(folder: Path) -> dict[str, Any]:
    """The model's configuration; of an adapter its own, as the base's is with the base."""
    adapter, file = folder / "adapter_config.json", folder / "config.json"
    file = adapter if adapter.is_file() and not file.is_file() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): make the folder again.") from None
    return config if isinstance(config, dict) else {}


def _base_model(records: Iterable[Mapping[str, Any]]) -> str:
    for item in records:
        if str(item["step"]).startswith("finetune"):  # the nearest: what that one started from is another matter
            results = item["results"] if isinstance(item["results"], Mapping) else {}
            return str(results["base_model"]) if results.get("base_model_on_hub") is True else ""
    return ""


def _header(license: str, base_model: str, *, library: str) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        license=license or None,
        base_model=base_model or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _opening(config: Mapping[str, Any], record: Mapping[str, Any], base_model: str) -> str:
    parameters = (record.get("weights") or {}).get("parameters")
    size = f" of {parameters:,} parameters" if isinstance(parameters, int) else ""
    origin = f", finetuned from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    if "peft_type" in config:
        return f"A LoRA adapter{size}{origin}. It is loaded onto its base model, and wants the package peft."
    return f"A {config.get('model_type', 'language')} model{size}{origin}."


def _size_rows(config: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    named = {_GPT2_NAMES.get(key, key): value for key, value in config.items()}
    for key, label in _SIZES.items():
        if named.get(key) is not None:
            yield label, _shown(named[key])
    for key in ("parameters", "dtype"):
        if key in (record.get("weights") or {}):
            yield key, _shown(record["weights"][key])


def _chapter(title: str, record: Mapping[str, Any]) -> str:
    """A step's results as a table, and its loss curve as another."""
    results = record["results"] if isinstance(record["results"], Mapping) else {}
    rows = [*_result_rows(results), *_setting_rows(record.get("settings") or {})]
    names = [path.name for path in lineage.input_files(record) if not verification.is_model_file(path.name)]
    names = [name for name in names if name != manifest.FILE_NAME]
    if names and title in ("Training data", "Finetuning"):
        rows.append(("inputs", _names(names)))
    parts = [_table(("", ""), rows)]
    for key, value in results.items():
        if key.endswith("curve") and _is_curve(value):
            label = "loss" if key == "loss_curve" else key.replace("_", " ").removesuffix(" curve")
            parts.append(_table(("step", label), [(f"{step:,}", f"{loss:.4f}") for step, loss in _thinned(value)]))
    body = "\n\n".join(part for part in parts if part)
    return _section(title, body)


def _result_rows(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Numbers and names; lists are no table rows, and paths are nobody's business."""
    for key, value in results.items():
        label = f"{prefix}{_shown(key).replace('_', ' ')}"
        if key.endswith("sha256") or key == "base_model_on_hub":
            continue  # of a file that is not in the repository; and what the header says
        if key == "base_model" and results.get("base_model_on_hub") is True:
            yield label, str(value)
            continue
        if isinstance(value, Mapping):
            if not prefix:
                yield from _result_rows(value, f"{label}: ")
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and value):
            yield label, _shown(value)


def _setting_rows(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sections = [section for section in settings.values() if isinstance(section, Mapping)]
    steps_rule = (settings.get("max_steps") or 0) > 0  # then the number of epochs that was asked for is not what ran
    for name in _TRAINING_SETTINGS:
        if steps_rule and name == "num_train_epochs":
            continue
        for section in (settings, *sections):
            if section.get(name) is not None:
                yield name.replace("_", " "), _shown(section[name])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _without_folders(str(value)).replace("|", r"\|")


def _without_folders(text: str) -> str:
    """The last name of what may be a path: absolute or relative, with blanks in it or without."""
    text = " ".join(text.split())
    return PurePath(text).name or text


def _names(names: Sequence[str]) -> str:
    few = ", ".join(sorted(set(names))[:_CURVE_ROWS])
    return few if len(set(names)) <= _CURVE_ROWS else f"{few} and {len(set(names)) - _CURVE_ROWS} more"


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_point(point) for point in value)


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(isinstance(number, int | float) for number in point)


def _thinned(curve: Sequence[Any]) -> list[Any]:
    """At most `_CURVE_ROWS` points, evenly, first and last among them."""
    if len(curve) <= _CURVE_ROWS:
        return list(curve)
    places = {round(place * (len(curve) - 1) / (_CURVE_ROWS - 1)) for place in range(_CURVE_ROWS)}
    return [curve[place] for place in sorted(places)]


def _verification_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was compared with what, and by how much they differ; what was not compared is no row."""
    weights, logits, tokenizer = (record.get(key) or {} for key in ("weights", "logits", "tokenizer"))
    if "max_abs_difference" in weights:
        yield _against("weights", weights), f"largest difference {weights['max_abs_difference']:.3g}"
    if "relative_difference" in logits:
        measure = str(logits["measure"]).replace("|", r"\|")
        figures = f"{logits['relative_difference']:.3g}, allowed {logits['tolerance']:.3g}"
        yield _against("logits", logits), f"{figures} ({measure})"
    if "mismatches" in tokenizer:
        figures = f"{tokenizer['mismatches']} mismatches in {tokenizer['texts']:,} texts"
        yield _against("tokenizer", tokenizer), figures


def _evaluation(folder: Path) -> str:
    """What the model was measured at, and the one it was made from."""
    rows = list(evaluation.rows(evaluation.of_model(folder)))
    if not any(base for _, _, base, _ in rows):
        return _table(("", ""), ((_shown(f"{title}, {name}"), value) for title, name, _, value in rows))
    lines = [f"| {_shown(f'{title}, {name}')} | {base} | {value} |" for title, name, base, value in rows]
    return "\n".join(["| | base model | this model |", "|---|---|---|", *lines])


def _against(what: str, check: Mapping[str, Any]) -> str:
    return f"{what} against {_shown(check['compared_with'])}"


def _software_rows(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    versions: dict[str, list[str]] = {}
    for item in records:
        for package, version in (item.get("software") or {}).items():
            if str(version) not in versions.setdefault(str(package), []):
                versions[str(package)].append(str(version))
    return [(package, ", ".join(found)) for package, found in sorted(versions.items())]


def _usage(repository: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = AutoModelForCausalLM.from_pretrained("{repository}")
```"""


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines]) if lines else ""
