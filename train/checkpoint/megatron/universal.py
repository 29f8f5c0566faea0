"""A checkpoint in DeepSpeed's universal form, from which a run goes on in another layout.

    convert(step_dir, universal_dir, source="...")      # whole or not at all; reshape.py says when

A universal checkpoint holds every parameter whole, with its two Adam moments; each rank of the new layout cuts its own
share from it. The form is DeepSpeed's (`deepspeed/checkpoint/universal_checkpoint.py` reads it), the writer is ours:

- DeepSpeed's converter runs what a file carries; here files are read as all checkpoints are (reader.py).
- Upstream describes row-parallel weights only when it saved with two tensor ranks or more, so that its TP1 checkpoints
  would be cut along the wrong dimension; here the description comes from the parameters' names.
- DeepSpeed drops the rows that pad the vocabulary and fills new ones with zeros. They take part in the softmax, so the
  loss would jump: here they are kept, and the resumed run pads to the same number of rows.
- It fails on `--no-pipeline-parallel` (DeepSpeed 0.19.8); here both forms are written.

One parameter is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import outputs
from train.checkpoint.megatron import parameters, reader
from train.checkpoint.megatron.saved_layout import SavedLayout, read_layout
from train.checkpoint.megatron.zero_state import RankState, read_rank_states
from train.errors import UserError, VerificationError

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "source.txt"  # what it was made from, as the caller tells it
_STATES = ("fp32", "exp_avg", "exp_avg_sq")
# What DeepSpeed's own converter leaves out of the state that all ranks share, as it is cut per rank.
_PER_RANK = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups", "loss_scaler")


def convert(step_dir: Path, universal_dir: Path, *, source: str) -> None:
    """Writes `step_dir` in universal form. What is there under that name is replaced.

    Args:
        step_dir: a checkpoint with ZeRO 1 or 2.
        universal_dir: the folder to write.
        source: noted in it, by which it is known later what it was made from.

    Raises:
        UserError: a file is missing or damaged, or the optimizer state cannot be put together.
        VerificationError: ranks that keep the same parameter disagree.
    """
    import torch

    layout = read_layout(step_dir)
    states = read_rank_states(step_dir, layout)
    if universal_dir.exists():
        shutil.rmtree(universal_dir)
    with outputs.new_folder(universal_dir) as folder:
        for name, holders in _holders(states, layout).items():
            target = folder / "zero" / name
            target.mkdir(parents=True)
            for key in _STATES:
                torch.save(_whole(name, key, holders, layout), target / f"{key}.pt")
            step = _step(name, holders)
            if step is not None:
                torch.save(step, target / "step.pt")
        torch.save(_shared(states[0]), folder / "zero" / "optimizer_state.pt")
        for rank in range(layout.model_ranks):
            file = layout.model_file(rank)
            shutil.copyfile(step_dir / file, folder / file)
        (folder / SOURCE).write_text(source, encoding="utf-8")


def _holders(
    states: Sequence[RankState], layout: SavedLayout
) -> Mapping[str, Sequence[Sequence[tuple[RankState, int]]]]:
    """Per parameter and tensor rank, in order of the data ranks: the states that hold a part of it, with its group.

    Tied parameters are held by the first and the last pipeline stage; the first one's are taken.
    """
    found: dict[str, list[list[tuple[RankState, int]]]] = {}
    first_stage: dict[str, int] = {}
    for state in sorted(states, key=lambda state: (state.pipeline_rank, state.tensor_rank, state.data_rank)):
        for group, fragments in enumerate(state.fragments):
            for name in fragments:
                if first_stage.setdefault(name, state.pipeline_rank) != state.pipeline_rank:
                    continue
                per_rank = found.setdefault(name, [[] for _ in range(layout.tensor_parallel_size)])
                per_rank[state.tensor_rank].append((state, group))
    return found


def _whole(
    name: str, key: str, holders: Sequence[Sequence[tuple[RankState, int]]], layout: SavedLayout
) -> dict[str, Any]:
    """One parameter's weights or moments, whole, in the record that DeepSpeed reads."""
    import torch

    slices = []
    for tensor_rank, parts in enumerate(holders):
        flat = torch.cat([state.part(name, group, key) for state, group in parts]).detach()
        shape = parts[0][0].shapes[name] if parts else ()
        try:
            slices.append(flat.reshape(shape))
        except RuntimeError:
            raise UserError(
                f"{layout.folder}: tensor rank {tensor_rank} has {flat.numel()} numbers of {name}, its shape is"
                f" {tuple(shape)}: optimizer files are missing or of another layout. Check it with check_checkpoint.sh."
            ) from None
    cut = parameters.cut_of(name, gated=layout.gated)
    if cut is parameters.Cut.NONE:
        return {"param": _replicated(name, slices, layout)}
    if cut is parameters.Cut.GATED_ROWS:  # each tensor rank: its share of the gate, then its share of the other half
        halves = zip(*(piece.chunk(2) for piece in slices), strict=True)
        return {"param": torch.cat([torch.cat(half) for half in halves]), "cat_dim": 0, "param_n_sub_params": 2}
    dimension = 1 if cut is parameters.Cut.COLUMNS else 0
    return {"param": torch.cat(slices, dim=dimension), "cat_dim": dimension}


def _replicated(name: str, slices: Sequence[Tensor], layout: SavedLayout) -> Tensor:
    for rank, difference in parameters.drifts(slices):
        raise VerificationError(
            f"{layout.folder}: {name} differs between tensor ranks 0 and {rank} by {difference:.3g}, though every rank"
            " keeps the same: no other layout can be true to both. Go on in the layout that it was saved in."
        )
    return slices[0].clone()


def _step(name: str, holders: Sequence[Sequence[tuple[RankState, int]]]) -> Any:
    steps = [state.step(group) for parts in holders for state, group in parts]
    if any(step != steps[0] for step in steps[1:]):
        raise VerificationError(f"{name}: the optimizer states of its ranks are of different steps.")
    return steps[0]


def _shared(state: RankState) -> dict[str, Any]:
    """The optimizer's state that belongs to no parameter: learning rates and betas, gradient clipping, loss scale."""
    shared = {key: value for key, value in state.optimizer.items() if key not in (*_PER_RANK, "zero_stage")}
    scaler = state.optimizer.get("loss_scaler")
    if isinstance(scaler, reader.Inert) and type(scaler).__name__ == "DynamicLossScaler":  # fp16
        shared["loss_scaler"] = _loss_scaler(scaler)
    return shared | {"param_groups": state.optimizer["base_optimizer_state"]["param_groups"]}


def _loss_scaler(stored: reader.Inert) -> Any:
    """DeepSpeed's own object again, with the stored numbers: its reader takes nothing else."""
    from deepspeed.runtime.fp16 import loss_scaler

    scaler: Any = object.__new__(getattr(loss_scaler, type(stored).__name__))
    scaler.__dict__.update(stored.state)
    return scaler
