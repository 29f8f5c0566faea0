from __future__ import annotations

from argparse import Namespace

import pytest

from train.checkpoint.megatron import stages


@pytest.mark.parametrize(
    ("layers", "count", "head", "expected"),
    [
        (24, 1, 1.2, (24,)),
        (24, 2, 0.0, (12, 12)),
        (24, 2, 1.2, (13, 11)),
        (24, 4, 1.2, (6, 6, 7, 5)),
        (24, 4, 0.9, (6, 6, 6, 6)),  # 5 of the last would be no faster: the others had 7
        (16, 4, 4.0, (5, 5, 5, 1)),
        (16, 4, 50.0, (5, 5, 5, 1)),  # a layer at least
        (7, 3, 0.0, (2, 3, 2)),
        (3, 3, 9.0, (1, 1, 1)),
    ],
)
def test_no_stage_waits_longer_than_it_must(layers: int, count: int, head: float, expected: tuple[int, ...]) -> None:
    found = stages.balanced(layers, count, head)
    assert found == expected and sum(found) == layers


@pytest.mark.parametrize("head", [0.0, 0.5, 1.7, 4.2])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_other_stages_are_faster(count: int, head: float) -> None:
    def slowest(parts: tuple[int, ...]) -> float:
        return max(*parts[:-1], parts[-1] + head)

    def all_parts(layers: int, left: int) -> list[tuple[int, ...]]:
        if left == 1:
            return [(layers,)]
        return [(own, *rest) for own in range(1, layers - left + 2) for rest in all_parts(layers - own, left - 1)]

    assert slowest(stages.balanced(11, count, head)) == min(map(slowest, all_parts(11, count)))


def test_the_logits_cost_what_their_multiplications_are_in_layers() -> None:
    arguments = Namespace(
        num_layers=24, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16, seq_length=2048,
        padded_vocab_size=32_000,
    )  # fmt: skip
    # 65.5 million for the logits, 50.3 + 4.2 for a layer
    assert stages.head_layers(
        hidden=2048, ffn=8192, key_value=2048, sequence=2048, vocabulary_rows=32_000, is_gated=False
    ) == pytest.approx(65.536 / 54.526, rel=1e-3)
    assert stages.of_arguments(arguments, 2) == (13, 11)
    llama = Namespace(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_key_value_heads=8,
        seq_length=2048, padded_vocab_size=128_256, swiglu=True,
    )  # fmt: skip
    assert stages.of_arguments(llama, 4) == (5, 5, 5, 1)


def test_a_checkpoint_says_its_stages_or_has_upstreams() -> None:
    plain = Namespace(num_layers=24, pipeline_model_parallel_size=4)
    assert stages.recorded(plain) == (6, 6, 6, 6)
    assert stages.recorded(Namespace(**vars(plain), layers_per_stage=[7, 7, 7, 3])) == (7, 7, 7, 3)
    assert stages.recorded(Namespace(num_layers=10, pipeline_model_parallel_size=3)) == ()  # 4 3 3, once 4 4 2


@pytest.mark.parametrize(
    ("given", "layers", "count", "words"),
    [
        ((), 4, 4, ()),
        ((2, 2), 4, 2, ()),
        ((), 3, 4, ("--num_layers 3 / --pipeline_parallel_size 4", "a layer at least")),
        ((2, 2), 4, 4, ("--layers_per_stage 2 2", "the 4 pipeline stages")),
        ((3, 2), 4, 2, ("--layers_per_stage 3 2", "sum up to --num_layers 4")),
        ((4, 0), 4, 2, ("numbers from 1 on",)),
        ((4,), 4, 2, ("the 2 pipeline stages",)),
    ],
)
def test_what_is_asked_for_wrongly(given: tuple[int, ...], layers: int, count: int, words: tuple[str, ...]) -> None:
    found = list(stages.problems(given, layers=layers, stages=count))
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)
