"""How a run goes on in the layout that it is asked for now: as it is, or through DeepSpeed's universal checkpoint.

load = prepare_load(step_dir, Target(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=4))
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from train import checkpoint_files
from train.checkpoint.megatron import qkv_layout, stages, universal, vocabulary
from train.checkpoint.megatron.merge import PER_HEAD
from train.checkpoint.megatron.saved_layout import SavedLayout, read_layout
from train.checkpoint_folders import universal_dir
from train.errors import UserError, refuse
from train.run_folder import Load


@dataclass(frozen=True)
class Target:
    """The layout that a run is asked to go on in."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    layers_per_stage: tuple[int, ...] = ()  # empty: those that are there, in another layout balanced ones

    def __str__(self) -> str:
        counts = " ".join(map(str, self.layers_per_stage))
        return (
            f"TP {self.tensor_parallel_size} x PP {self.pipeline_parallel_size} x DP {self.data_parallel_size}"
            f"{' with --layers_per_stage ' + counts if counts else ''}"
        )


def prepare_load(step_dir: Path, target: Target, *, is_last: bool = False) -> Load:
    """What the engine is to load; the universal checkpoint is made first, where one is needed and not there.

    Args:
        step_dir: the checkpoint.
        target: the layout that is asked for.
        is_last: whether the run is over with this step.

    Raises:
        UserError: the checkpoint cannot be loaded in this layout; every reason is named.
    """
    layout = read_layout(step_dir)
    load = Load(step_dir.name, vocabulary_divisor=vocabulary_divisor(layout, target.tensor_parallel_size))
    if not needs_universal(layout, target):
        if not target.layers_per_stage and layout.has_pipeline_module:
            load = dataclasses.replace(load, layers_per_stage=stages.recorded(layout.arguments))
        if layout.data_parallel_size != target.data_parallel_size:
            print(f"{step_dir.name} was saved in {layout}, goes on in {target}: ZeRO 0 spreads nothing over data ranks")
        return load
    refuse(
        f"{step_dir} was saved in {layout} and cannot go on in {target}: {reason}. Go on in the layout it was saved in."
        for reason in (["the run is over, nothing is left to train"] if is_last else why_not(layout, target))
    )
    folder = universal_dir(step_dir)
    if _source(folder) == _list_checksum(step_dir):
        print(f"{step_dir.name} was saved in {layout}, goes on in {target}: by {folder.name}, which is there already")
    else:
        print(
            f"{step_dir.name} was saved in {layout}, goes on in {target}: making {folder.name}, DeepSpeed's universal"
            " form; the next checkpoint removes it",
            flush=True,
        )
        _refuse_full_disk(step_dir, layout)
        universal.convert(step_dir, folder, source=_list_checksum(step_dir))
    return Load(folder.name, is_universal=True, vocabulary_divisor=load.vocabulary_divisor)


def needs_universal(layout: SavedLayout, target: Target) -> bool:
    """Whether the files as they are cannot be loaded: weights lie per model rank, ZeRO's state per data rank too."""
    same_model_ranks = (layout.tensor_parallel_size, layout.pipeline_parallel_size) == (
        target.tensor_parallel_size,
        target.pipeline_parallel_size,
    ) and (not layout.has_pipeline_module or _has_stages(layout, target))
    same_data_ranks = layout.data_parallel_size == target.data_parallel_size or layout.zero_stage == 0
    return not (same_model_ranks and same_data_ranks)


def _has_stages(layout: SavedLayout, target: Target) -> bool:
    """Whether the stages are those that are asked for; where none are, whether it can be told which they are."""
    found = stages.recorded(layout.arguments)
    return found == target.layers_per_stage if target.layers_per_stage else bool(found)


def why_not(layout: SavedLayout, target: Target | None = None) -> list[str]:
    """What keeps a checkpoint from going on in another layout; empty when nothing does.

    Args:
        layout: the checkpoint's own.
        target: the other layout; None asks for any.
    """
    found = []
    if layout.zero_stage == 0:
        found.append(
            "without ZeRO the optimizer state has no universal form (another number of data parallel ranks alone needs"
            " none): begin runs whose layout may change with --zero_stage 1"
        )
    elif layout.zero_stage > 2:
        found.append(f"ZeRO {layout.zero_stage} is not reshaped")
    if getattr(layout.arguments, "num_experts", None) not in (None, [1], 1):
        found.append("it has experts, which are not reshaped")
    if target is None or target.tensor_parallel_size == layout.tensor_parallel_size:
        return found
    commit = qkv_layout.recorded_commit(layout.folder)
    if qkv_layout.order_of(commit) != PER_HEAD:
        found.append(
            f"its engine commit {commit or '(not recorded)'} is not known to keep query, key and value head by head, as"
            " a cut over other tensor ranks needs it"
        )
    rows = layout.padded_vocab_size
    if rows is None or rows % target.tensor_parallel_size:
        found.append(f"its {rows} vocabulary rows do not divide by {target.tensor_parallel_size} tensor ranks")
    return found


def vocabulary_divisor(layout: SavedLayout, tensor_parallel_size: int) -> int | None:
    """What --make-vocab-size-divisible-by has to be for the embedding to keep its rows; None where it does by itself.

    Upstream pads the vocabulary to a multiple of that number times the tensor ranks. Padding takes part in the softmax,
    so that with other padding the loss would jump.
    """
    rows, saved = layout.padded_vocab_size, layout.tensor_parallel_size
    divisor = int(getattr(layout.arguments, "make_vocab_size_divisible_by", vocabulary.DIVISOR))
    if rows is None or rows % tensor_parallel_size or (tensor_parallel_size == saved and divisor == vocabulary.DIVISOR):
        return None
    # one multiple of all rows: right for any vocabulary of no more than these
    return rows // tensor_parallel_size


def _refuse_full_disk(step_dir: Path, layout: SavedLayout) -> None:
    needed = sum((step_dir / name).stat().st_size for name in layout.expected_files() if "layer_" not in name)
    free = shutil.disk_usage(step_dir).free
    if free < needed:
        raise UserError(
            f"{step_dir.parent} has {free / 1e9:.1f} GB free, the universal form of {step_dir.name} needs"
            f" {needed / 1e9:.1f} GB: free some, or go on in {layout}."
        )


def _list_checksum(step_dir: Path) -> str:
    file = step_dir / checkpoint_files.FILES
    return checkpoint_files.checksum(file) if file.is_file() else "no list"


def _source(folder: Path) -> str | None:
    file = folder / universal.SOURCE
    return file.read_text(encoding="utf-8") if file.is_file() else None
