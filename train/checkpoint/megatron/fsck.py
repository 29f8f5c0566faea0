"""Whether a checkpoint of Megatron-DeepSpeed is whole and true to itself.

    findings = fsck.inspect(step_dir)          # everything is read, one layer at a time
    problems = list(fsck.glance(step_dir))     # a moment: the files of the layout are there and end as they should

Called by train/checkpoint/check.py, and train/resume.py.

What is looked at: the files of the declared layout, no more and no less; that each can be read without running what it
may carry; what the ranks say of themselves; names, shapes, types and values of the weights (fsck_weights.py) and of the
optimizer's state (fsck_optimizer.py); the golden logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.checkpoint.findings import Ability, Findings, has_inner_checksums, inner_damage, is_finite
from train.checkpoint.megatron import fsck_optimizer, fsck_weights, reader, reshape
from train.checkpoint.megatron.saved_layout import FILE_PATTERNS, SavedLayout, read_layout
from train.checkpoint_files import FILES, recorded
from train.checkpoint_folders import GOLDEN_LOGITS
from train.errors import UserError

_SAME_EVERYWHERE = (
    *("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size", "params_dtype", "seed"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)


def glance(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a checkpoint whose sizes nobody recorded: `NAME: what is wrong`."""
    try:
        layout = read_layout(folder)
    except UserError as error:
        yield error.problems[0]
        return
    yield from _missing_or_foreign(layout)
    for name in layout.expected_files():
        if (folder / name).is_file():
            yield from inner_damage(folder, name, contents=False)


def inspect(folder: Path) -> Findings:
    """Looks at everything but the recorded checksums, which are the caller's."""
    try:
        layout = read_layout(folder)
    except UserError as error:
        return Findings("Megatron-DeepSpeed, layout unknown", error.problems)
    problems = list(_missing_or_foreign(layout))
    notes = []
    sums = recorded(folder)
    if sums is None or any(sum_ is None for _, sum_ in sums.values()):
        notes.append(
            "no checksums were recorded when it was saved (upstream records none): those inside the .pt files are"
            " compared where they have any, which cover tensors but not every byte; files that were swapped may pass"
        )
        files = [name for name in layout.expected_files() if (folder / name).is_file()]
        problems += [problem for name in files for problem in inner_damage(folder, name)]
        without = [name for name in files if not has_inner_checksums(folder, name)]
        if without:
            notes.append(
                f"{len(without)} of {len(files)} .pt files hold no checksums either, as runs of this project write them"
                f" beside {FILES}, which is lost: values that changed in them are not found; copy {FILES} back"
            )
    problems += _ranks(layout)
    problems += fsck_weights.problems(layout)
    if layout.zero_stage:
        problems += fsck_optimizer.zero_problems(layout)
    elif not layout.has_weights_only:
        problems += fsck_optimizer.plain_problems(layout)
    problems += _golden(layout, notes)
    return Findings(f"Megatron-DeepSpeed, {layout}", tuple(dict.fromkeys(problems)), tuple(notes), _abilities(layout))


def _abilities(layout: SavedLayout) -> tuple[Ability, ...]:
    """What the checkpoint is good for, as long as nothing is wrong with it."""
    if layout.has_weights_only:
        beginning = "it holds weights only: a run begins with it (--initial_checkpoint_dir)"
        again = "it holds weights only: import it again for other sizes"
        return (Ability("resume", False, beginning), Ability("reshape", False, again), _export(layout))
    refusals = reshape.why_not(layout)
    return (
        Ability("resume", True, f"weights, optimizer and random state of step {layout.step}, in {layout}"),
        Ability("reshape", not refusals, "; ".join(refusals) or "by DeepSpeed's universal form"),
        _export(layout),
    )


def _export(layout: SavedLayout) -> Ability:
    golden = (layout.folder / GOLDEN_LOGITS).is_file()
    proof = (
        "against the engine's own logits" if golden else "with the weaker check: no golden logits to hold it against"
    )
    return Ability("export", True, proof)


def _missing_or_foreign(layout: SavedLayout) -> Iterator[str]:
    expected = set(layout.expected_files())
    there = {file.name for file in layout.folder.iterdir() if any(form.fullmatch(file.name) for form in FILE_PATTERNS)}
    yield from (f"{name}: missing, {layout} has it" for name in sorted(expected - there))
    yield from (f"{name}: no file of {layout}; it is of another layout" for name in sorted(there - expected))


def _ranks(layout: SavedLayout) -> Iterator[str]:
    """Each model rank's file is that rank's, and all are of one run and step."""
    for rank in range(layout.model_ranks):
        name = layout.model_file(rank)
        state = _loaded(layout.folder / name)
        if isinstance(state, str):
            yield state
            continue
        arguments = state.get("args")
        for key in _SAME_EVERYWHERE:
            here, there = getattr(arguments, key, None), getattr(layout.arguments, key, None)
            if here != there:
                yield f"{name}: {key} is {here}, in {layout.model_file(0)} it is {there}"
        if state.get("global_steps", layout.step) != layout.step:
            yield f"{name}: of step {state['global_steps']}, {layout.model_file(0)} is of step {layout.step}"
        pipeline_rank, tensor_rank = divmod(rank, layout.tensor_parallel_size)
        world_rank = pipeline_rank * layout.data_parallel_size * layout.tensor_parallel_size + tensor_rank
        said = getattr(arguments, "rank", None)
        if isinstance(said, int) and layout.has_pipeline_module and said != world_rank:
            yield f"{name}: written by rank {said}, rank {world_rank} writes it; were files swapped?"
    if layout.folder.name.removeprefix("global_step").isdigit():
        named = int(layout.folder.name.removeprefix("global_step"))
        if named != layout.step:
            yield f"{layout.model_file(0)}: of step {layout.step}, the folder is called {layout.folder.name}"


def _loaded(file: Path) -> Any:
    """The content of a file, or what is wrong with it."""
    if not file.is_file():
        return f"{file.name}: missing"
    try:
        state = reader.load(file)
    except UserError as error:
        return f"{file.name}: {error.problems[0].removeprefix(str(file)).strip()}"
    return state if isinstance(state, dict) else f"{file.name}: holds no states"


def _golden(layout: SavedLayout, notes: list[str]) -> Iterator[str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = layout.folder / GOLDEN_LOGITS
    if not file.is_file():
        notes.append(f"no {GOLDEN_LOGITS}: an export cannot be held against the engine's own logits")
        return
    try:
        tensors = load_file(file)
        ids, logits = tensors["input_ids"], tensors["logits"]
    except (SafetensorError, OSError, KeyError) as error:
        yield f"{GOLDEN_LOGITS}: truncated or damaged ({error})"
        return
    rows = None if layout.has_weights_only else layout.padded_vocab_size  # an import's are the other model's own
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or (rows and logits.shape[2] != rows):
        yield f"{GOLDEN_LOGITS}: logits {list(logits.shape)} for ids {list(ids.shape)} and {rows} vocabulary rows"
    elif not is_finite(logits):
        yield f"{GOLDEN_LOGITS}: NaN or infinite logits"
