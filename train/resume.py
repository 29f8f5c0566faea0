"""From which checkpoint a run goes on, and what becomes of those that are damaged.

    view = look(run_folder.checkpoint_dir, node="host1")       # one per node, where disks are not shared
    decision = decide([view])                                  # pure
    carry_out(decision, run_folder.checkpoint_dir)

The newest step that is whole on every node wins. What is newer is set aside by name and never removed, `latest` and
`latest_checkpointed_iteration.txt` are put right, and everything that was not as it should be is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train import checkpoint_files, outputs
from train.checkpoint_folders import MEGATRON_POINTER, POINTER, set_aside, whole_checkpoints
from train.errors import UserError

# Up to this size every byte is read before a run goes on: some seconds. Of larger checkpoints the sizes are compared;
# check_checkpoint.sh reads them whole.
READ_UP_TO_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class NodeView:
    """What one node sees in a job's checkpoint folder.

    Attributes:
        node: its name.
        steps: per step, what is wrong with its checkpoint; nothing when it is whole.
        pointers: file name -> content, of the pointers that are there.
    """

    node: str
    steps: Mapping[int, tuple[str, ...]]
    pointers: Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """Where to go on.

    Attributes:
        step: the step to go on from; None when there is no checkpoint at all.
        aside: newer steps, of which not every node has a whole checkpoint.
        report: one sentence for everything that was not as it should be.
    """

    step: int | None
    aside: tuple[int, ...] = ()
    report: tuple[str, ...] = ()


def look(checkpoint_dir: Path, *, node: str, read_up_to_bytes: int = READ_UP_TO_BYTES) -> NodeView:
    """What this node has: sizes of all checkpoints, and the contents of the newest whole one when it is small."""
    steps: dict[int, tuple[str, ...]] = {}
    read = False
    for step, folder in reversed(list(whole_checkpoints(checkpoint_dir))):
        contents = not read and is_read_whole(folder, read_up_to_bytes)
        steps[step] = tuple(_problems(folder, contents=contents))
        read = read or not steps[step]
    found = ((name, checkpoint_dir / name) for name in (POINTER, MEGATRON_POINTER))
    pointers = {name: file.read_text("utf-8", "replace").strip() for name, file in found if file.is_file()}
    return NodeView(node, steps, pointers)


def decide(views: Sequence[NodeView]) -> Decision:
    """The step to go on from.

    Args:
        views: what each node sees; one is enough where all share a disk.

    Raises:
        UserError: there are checkpoints, and no step is whole on every node.
    """
    steps = sorted({step for view in views for step in view.steps}, reverse=True)
    broken = {step: list(_troubles(step, views)) for step in steps}
    chosen = next((step for step in steps if not broken[step]), None)
    if steps and chosen is None:
        raise UserError(
            [
                *(trouble for step in steps for trouble in broken[step]),
                "no checkpoint is whole; nothing was changed. Copy one back, or --overwrite to start from step 0.",
            ]
        )
    aside = tuple(step for step in steps if chosen is not None and step > chosen)
    report = [f"{trouble}: set aside" for step in aside for trouble in broken[step]]
    report += [line for view in views for line in _strays(view, chosen, several=len(views) > 1)]
    if report and chosen is not None:
        report.append(f"going on from global_step{chosen}, the newest checkpoint that is whole")
    return Decision(chosen, aside, tuple(report))


def carry_out(decision: Decision, checkpoint_dir: Path) -> list[Path]:
    """Sets the newer checkpoints aside on this node and puts its pointers right; returns the new names."""
    folders = [folder for step, folder in whole_checkpoints(checkpoint_dir) if step in decision.aside]
    moved = [set_aside(folder) for folder in folders]
    if decision.step is not None:
        for name, content in ((POINTER, f"global_step{decision.step}"), (MEGATRON_POINTER, str(decision.step))):
            file = checkpoint_dir / name
            found = file.read_text("utf-8", "replace").strip() if file.is_file() else None
            # without `latest` a version that has no --load-tag would begin anew and say nothing
            if found != content and (found is not None or name == POINTER):
                outputs.write_text(file, content)
    return moved


def _troubles(step: int, views: Sequence[NodeView]) -> list[str]:
    """Why a step is not whole everywhere."""
    found = []
    for view in views:
        on = f" on {view.node}" if len(views) > 1 else ""
        if step not in view.steps:
            found.append(f"global_step{step} is missing{on}")
        elif view.steps[step]:
            problems = view.steps[step]
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            found.append(f"global_step{step} is damaged{on} ({problems[0]}{more})")
    return found


def _strays(view: NodeView, chosen: int | None, *, several: bool) -> list[str]:
    """Pointers that name another step than the one that is taken."""
    if chosen is None:
        return []
    expected = {POINTER: f"global_step{chosen}", MEGATRON_POINTER: str(chosen)}
    on = f" on {view.node}" if several else ""
    return [
        f"{name}{on} names {content!r}" for name, content in sorted(view.pointers.items()) if content != expected[name]
    ]


def _problems(folder: Path, *, contents: bool) -> list[str]:
    if (folder / checkpoint_files.FILES).is_file() or not (folder / "mp_rank_00_model_states.pt").is_file():
        return list(checkpoint_files.damage(folder, contents=contents))
    from train.checkpoint.megatron import fsck  # written by upstream alone: no list of files, but a layout

    return list(fsck.glance(folder))


def is_read_whole(folder: Path, read_up_to_bytes: int = READ_UP_TO_BYTES) -> bool:
    """Whether a checkpoint is small enough for its bytes to be compared before a run loads it, and not only sizes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= read_up_to_bytes
