"""Where a file came from: the manifests of the steps that made it, and of what those steps read.

for record in lineage.trace([tokenizer_file, step_dir / "config.json"]):
    print(record["step"], record["results"])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train import manifest, run_folder
from train.errors import UserError

_DEEPEST = 8  # tokenizer -> data -> run -> folder is four; a loop of hand-edited manifests ends here


def trace(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The manifests behind `files`, nearest first, each once; what is unknown or gone is left out."""
    found: dict[Path, dict[str, Any]] = {}
    reading = list(files)
    for _ in range(_DEEPEST):
        makers = {maker for maker in map(manifest_of, reading) if maker is not None and maker not in found}
        reading = [source for file in reading for source in _sources_of_unfinished_run(file)]
        for maker in sorted(makers):
            try:
                record = manifest.read(maker)
            except UserError:
                continue
            found[maker] = record
            reading += input_files(record)
    return list(found.values())


def manifest_of(file: Path) -> Path | None:
    """The manifest of the step that wrote `file`, by the places where steps write them; None when there is none."""
    run = run_folder.of_checkpoint(file.parent)
    candidates = [run.manifest] if run is not None else []
    candidates += [file.with_suffix(".manifest.json"), file.parent / manifest.FILE_NAME]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _sources_of_unfinished_run(file: Path) -> list[Path]:
    """What a run reads that has checkpoints and no manifest yet, by its recipe; a manifest comes when it ends."""
    from train import settings
    from train.data.blend import read_blend
    from train.recipe import PretrainRecipe

    run = run_folder.of_checkpoint(file.parent)
    if run is None or run.manifest.is_file() or not run.recipe.is_file():
        return []
    try:
        data = settings.build(PretrainRecipe, settings.read_yaml(run.recipe)).data
        indexes = [Path(f"{part.prefix}.idx") for part in read_blend(data.data_path)]
    except UserError:  # the data has moved, or the recipe is of another version
        return []
    return [data.input_tokenizer_file, *indexes]


def input_files(record: Mapping[str, Any]) -> list[Path]:
    """The files that a manifest says its step read."""
    listed = record.get("inputs") or []
    return [Path(item["path"]) for item in listed if isinstance(item, Mapping) and isinstance(item.get("path"), str)]
