"""The micro batch of a run that leaves it open (--micro_batch_size 0), and a word before a GPU runs out of memory.

Whether activations are recomputed is settled with it, where that is open: of what fits the fastest is taken.

recipe, note = settle(recipe, engine, allocation, gpu=this_gpu(), recorded=None)

What fits and what is fastest is the planner's prediction (train/planner, docs/plan.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train import process
from train.cluster.allocation import Allocation
from train.engine import choose
from train.planner import calibration
from train.recipe import PretrainRecipe

if TYPE_CHECKING:
    from train.planner.layout import Layout
    from train.planner.memory import Memory
    from train.planner.search import Candidate

AUTOMATIC = 0
_ON_A_CPU = 4  # more gains nothing there
_SO_FAR = "as in this run so far"
_FAST = "by the plan as fast as any that fits"
_KEPT = "activations are kept, --activation_checkpoint True needs less memory"
_KINDS = {"H200": "h200", "H100": "h100", "A100": "a100_80"}


@dataclass(frozen=True)
class ThisGpu:
    """The kind of GPU of this machine, and the memory of the smallest one."""

    name: str
    memory_gib: float


def this_gpu() -> ThisGpu | None:
    """The GPU that nvidia-smi tells of; None where it tells nothing."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    status, text = process.capture(process.Command(query), timeout_s=30)
    return parse(text) if status == 0 else None


def parse(text: str) -> ThisGpu | None:
    """Reads `name, MiB` lines; None where there is none (a device split into instances has no memory of its own)."""
    found = []
    for line in text.splitlines():
        name, _, memory = line.rpartition(",")
        if name.strip() and memory.strip().isdigit():
            found.append(ThisGpu(name.strip(), int(memory) / 1024))
    return min(found, key=lambda gpu: gpu.memory_gib, default=None)


def open_to_one(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe with a number where the micro batch is left open, for those who only look at the rest of it."""
    return recipe if recipe.training.micro_batch_size != AUTOMATIC else _with(recipe, 1)


def settle(
    recipe: PretrainRecipe, engine: str, allocation: Allocation, *, gpu: ThisGpu | None, recorded: int | None = None
) -> tuple[PretrainRecipe, str]:
    """The recipe with its micro batch, and a line for the user: why this one, or that it may not fit; else empty.

    Args:
        recipe: a resolved recipe.
        engine: what trains it.
        allocation: where.
        gpu: this machine's.
        recorded: the micro batch with which the run has been trained so far.
    """
    given, per_rank = recipe.training.micro_batch_size, _sequences_per_rank(recipe, engine, allocation)
    if given != AUTOMATIC and (per_rank % given or engine != choose.MEGATRON):
        return recipe, ""  # others tell of the first; what transformers needs is not known as well as its user may know
    fixed = given or (recorded if recorded and per_rank % recorded == 0 else 0)
    if allocation.device == "cpu":
        size = fixed or _largest(per_rank, _ON_A_CPU)
        return _with(recipe, size), f"micro batch: {size}, {_SO_FAR if fixed else 'on a CPU'}"
    unknown = _unknown(recipe, gpu)
    planned = [] if gpu is None or unknown else list(_planned(recipe, engine, allocation, gpu, fixed))
    possible = [one for one in planned if fixed in (0, one.layout.micro_batch)]
    if gpu is None or not possible:
        why = _SO_FAR if fixed else f"as {unknown or 'the plan does not know this layout'}"
        kept = "" if recipe.parallel.activation_checkpoint is not None else f"; {_KEPT}"
        return _with(recipe, fixed or 1), "" if given else f"micro batch: {fixed or 1}, {why}{kept}"
    fitting = [one for one in possible if one.needed_gib <= _usable(gpu)]
    from train.planner.search import lightest

    chosen = lightest(fitting) if fitting else min(possible, key=lambda one: one.needed_gib)
    found = _with(recipe, chosen.layout.micro_batch, chosen.layout.recompute)
    if given:
        return found, _about_given(recipe, chosen, planned, gpu)
    return found, _about_chosen(chosen, gpu, fits=bool(fitting), why=_SO_FAR if fixed else _FAST)


def _unknown(recipe: PretrainRecipe, gpu: ThisGpu | None) -> str:
    """Why the plan has nothing to say; empty where it has."""
    if gpu is None:
        return "nvidia-smi does not tell the GPU's memory"
    if recipe.parallel.attention == "eager":
        return "the plan is not for --attention eager, which keeps all its weights"
    return ""


def _about_chosen(chosen: Candidate, gpu: ThisGpu, *, fits: bool, why: str) -> str:
    layout = chosen.layout
    what = f"micro batch: {layout.micro_batch}{', activations recomputed' if layout.recompute else ''}"
    if fits:
        return f"{what}, {why}: {chosen.needed_gib:.0f} of the {gpu.memory_gib:.0f} GiB of this {gpu.name}"
    return (
        f"{what}; even that needs {chosen.needed_gib:.1f} GiB by the plan, and of this {gpu.name} {_usable(gpu):.1f}"
        " may be used: see scripts/step2_pretrain_model/plan.sh"
    )


def _about_given(recipe: PretrainRecipe, chosen: Candidate, planned: Sequence[Candidate], gpu: ThisGpu) -> str:
    """What the user of a micro batch of his own should know."""
    size, is_open = chosen.layout.micro_batch, recipe.parallel.activation_checkpoint is None
    fitting = [one.layout for one in planned if one.needed_gib <= _usable(gpu)]
    if chosen.needed_gib > _usable(gpu):
        smaller = max((layout.micro_batch for layout in fitting), default=None)
        advice = f"--micro_batch_size {smaller} would fit" if smaller else "no micro batch fits in this layout"
        recomputed = " with activations recomputed" if chosen.layout.recompute else ""
        return (
            f"warning: a micro batch of {size} needs {chosen.needed_gib:.1f} GiB of GPU memory{recomputed} by the plan,"
            f" and of the {gpu.memory_gib:.1f} of this {gpu.name} {_usable(gpu):.1f} may be used: {advice};"
            " scripts/step2_pretrain_model/plan.sh shows other layouts."
        )
    if chosen.layout.recompute and is_open:
        kept = max((layout.micro_batch for layout in fitting if not layout.recompute), default=None)
        faster = f"--micro_batch_size {kept} fits without, " if kept else ""
        return (
            f"activations are recomputed, as a micro batch of {size} fits only so by the plan ({faster}"
            "--activation_checkpoint False keeps them)"
        )
    return ""


def _planned(
    recipe: PretrainRecipe, engine: str, allocation: Allocation, gpu: ThisGpu, fixed: int
) -> Iterator[Candidate]:
    """What the plan says of each micro batch, and of a fixed one, with the memory that this engine needs for it."""
    from train.checkpoint.megatron import vocabulary
    from train.planner.gpus import GPUS
    from train.planner.model import Shape
    from train.planner.search import LARGEST_MICRO_BATCH, Query, search
    from train.planner.speed import Cluster

    parallel, training = recipe.parallel, recipe.training
    kind = next((kind for word, kind in _KINDS.items() if word in gpu.name), "h100")
    is_megatron = engine == choose.MEGATRON
    query = Query(
        num_gpus=allocation.world_size,
        cluster=Cluster(GPUS[kind], allocation.processes_per_host, GPUS[kind].network_gb_s),
        usable_gib=float("inf"),
        global_batch=training.global_batch_size or 1,
        precision=training.precision,
        tensor=parallel.tensor_parallel_size if is_megatron else 1,
        pipeline=parallel.pipeline_parallel_size if is_megatron else 1,
        zero_stage=1 if training.precision == "bf16" else min(parallel.zero_stage, 1),
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.activation_checkpoint,
    )
    vocab_size = vocabulary.engine_vocab_size(recipe.data.input_tokenizer_file)
    shape = Shape.of(recipe.model, vocab_size=vocab_size, layers_per_stage=parallel.layers_per_stage)
    queries = [query]
    if fixed > LARGEST_MICRO_BATCH:
        queries.append(dataclasses.replace(query, micro_batch=fixed))
    for found in itertools.chain.from_iterable(search(shape, query).fitting for query in queries):
        needed = found.needed_gib + _unplanned_gib(recipe, engine, found.layout, found.memory)
        yield dataclasses.replace(found, needed_gib=needed)


def _unplanned_gib(recipe: PretrainRecipe, engine: str, layout: Layout, planned: Memory) -> float:
    """What a rank needs more, or less, than the plan says, which is for Megatron-DeepSpeed's compiled layers."""
    is_megatron = engine == choose.MEGATRON
    if is_megatron and recipe.model.dropout == 0:
        return 0.0
    more = planned.activations + 2 * planned.logits  # layers as they are keep about twice as much
    if is_megatron:
        return more
    zero_stage, elsewhere = recipe.parallel.zero_stage, 1 - 1 / layout.data
    if zero_stage == 0 and layout.zero_stage:
        more += planned.optimizer * (layout.data - 1)
    if zero_stage >= 2:
        more -= planned.gradients * elsewhere
    if zero_stage == 3:
        more -= planned.weights * elsewhere
    return more


def _sequences_per_rank(recipe: PretrainRecipe, engine: str, allocation: Allocation) -> int:
    parallel = recipe.parallel
    per_copy = parallel.tensor_parallel_size * parallel.pipeline_parallel_size if engine == choose.MEGATRON else 1
    return (recipe.training.global_batch_size or 1) // max(allocation.world_size // per_copy, 1) or 1


def _largest(number: int, limit: int) -> int:
    """The largest divisor up to a limit."""
    return max(size for size in range(1, limit + 1) if number % size == 0)


def _usable(gpu: ThisGpu) -> float:
    return gpu.memory_gib * (1 - calibration.HEADROOM)


def _with(recipe: PretrainRecipe, size: int, recomputes: bool = False) -> PretrainRecipe:
    given = recipe.parallel.activation_checkpoint
    parallel = dataclasses.replace(recipe.parallel, activation_checkpoint=recomputes if given is None else given)
    training = dataclasses.replace(recipe.training, micro_batch_size=size)
    return dataclasses.replace(recipe, training=training, parallel=parallel)
