"""How many layers each pipeline stage has. The last stage also turns the stream into logits, and gets fewer.

Upstream gives all stages the same number, whatever the vocabulary: with 128,000 words the logits of a 1B-class model
cost as much as four of its layers, for which all other stages would wait.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence


def head_layers(*, hidden: int, ffn: int, key_value: int, sequence: int, vocabulary_rows: int, is_gated: bool) -> float:
    """What the logits cost, in layers: both counted as multiplications per token.

    Args:
        hidden: width of the stream.
        ffn: width of the feed-forward layer.
        key_value: width of all key heads together.
        sequence: tokens of a sequence; attention looks at half of them on average.
        vocabulary_rows: rows of the whole embedding, padding included.
        is_gated: whether the feed-forward layer has a gate, as SwiGLU does.
    """
    layer = 2 * hidden * (hidden + key_value) + (3 if is_gated else 2) * hidden * ffn + sequence * hidden
    return hidden * vocabulary_rows / layer


def balanced(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Layers of each stage so that the slowest one is as fast as can be; each has at least one.

    Args:
        layers: of the model, at least as many as stages.
        stages: of the pipeline.
        head: what the last stage does beside its layers, in layers.
    """
    if stages == 1:
        return (layers,)

    def cost(last: int) -> float:
        return max(-(-(layers - last) // (stages - 1)), last + head)

    # of equally fast ones the most even
    last = min(range(1, layers // stages + 1), key=lambda count: (cost(count), -count))
    each, more = divmod(layers - last, stages - 1)
    # early stages keep the activations of more micro batches: what is left over goes to late ones
    return (*[each] * (stages - 1 - more), *[each + 1] * more, last)


def of_arguments(arguments: Namespace, stages: int) -> tuple[int, ...]:
    """The balanced stages of a run, by upstream's arguments for it."""
    heads, groups = arguments.num_attention_heads, getattr(arguments, "num_key_value_heads", None)
    hidden = int(arguments.hidden_size)
    head = head_layers(
        hidden=hidden,
        ffn=int(arguments.ffn_hidden_size),
        key_value=hidden * int(groups or heads) // int(heads),
        sequence=int(arguments.seq_length),
        vocabulary_rows=int(arguments.padded_vocab_size),
        is_gated=bool(getattr(arguments, "swiglu", False)),
    )
    return balanced(int(arguments.num_layers), stages, head)


def recorded(arguments: Namespace) -> tuple[int, ...]:
    """The stages that a checkpoint was saved in: as its arguments say, or all alike, as upstream has them.

    Empty where that cannot be told: DeepSpeed's versions differ in who gets the layers that are left over.
    """
    stages, layers = int(getattr(arguments, "pipeline_model_parallel_size", 1)), int(arguments.num_layers)
    found = getattr(arguments, "layers_per_stage", None)
    if found is not None:
        return tuple(int(count) for count in found)
    return () if layers % stages else (layers // stages,) * stages


def problems(layers_per_stage: Sequence[int], *, layers: int, stages: int) -> Iterator[str]:
    """What is wrong with the stages that a user asks for, or with so many of them."""
    if layers < stages:
        yield f"--num_layers {layers} / --pipeline_parallel_size {stages}: each pipeline stage needs a layer at least."
    elif layers_per_stage:
        text = " ".join(map(str, layers_per_stage))
        if len(layers_per_stage) != stages:
            yield f"--layers_per_stage {text}: a number for each of the {stages} pipeline stages was expected."
        if sum(layers_per_stage) != layers or min(layers_per_stage) < 1:
            yield f"--layers_per_stage {text}: numbers from 1 on that sum up to --num_layers {layers} were expected."
