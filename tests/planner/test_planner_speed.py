"""Seconds that the planner counts, by hand, and which way they must go."""

from __future__ import annotations

import dataclasses

import pytest

from train.planner import calibration, speed
from train.planner.gpus import GPUS
from train.planner.layout import Layout
from train.planner.model import Shape
from train.planner.settings import PlanSettings
from train.planner.speed import Cluster
from train.recipe import ModelSettings

H200 = Cluster(GPUS["h200"], 8, 50.0)
ONE = Layout(
    tensor=1, pipeline=1, data=1, zero_stage=1, sequence_parallel=False, micro_batch=8, micro_batches=8, recompute=False
)


@pytest.fixture(scope="module")
def gpt() -> Shape:
    wanted = PlanSettings(num_gpus=1, model=ModelSettings(model_size="gpt_1.3B"))
    return wanted.shape(wanted.recipe())


def test_flops_are_those_of_the_benchmark(gpt: Shape) -> None:
    """6 per token and weight of a matrix product, 12 x layers x length x hidden for attention."""
    assert gpt.flops_per_token == 6 * (24 * 12 * 2048**2 + 32_000 * 2048) + 12 * 24 * 2048 * 2048


def test_a_large_matrix_product_attains_what_was_measured() -> None:
    rate = 2 * 8192.0**3 / speed.matrix_seconds(8192, 8192, 8192, "bf16", GPUS["h200"]) / 1e12
    assert rate / calibration.TRAINING_SHARE == pytest.approx(788, rel=0.01)


def test_attention_attains_what_was_measured(gpt: Shape) -> None:
    seconds = speed.attention_seconds(gpt, ONE, "bf16", GPUS["h200"])
    assert seconds / (8 * 2048) == pytest.approx(0.075e-6, rel=0.02)


def test_all_reduce_by_hand() -> None:
    link = 450e9 * calibration.LINK_SHARE
    found = speed.all_reduce_seconds(1e9, H200, stride=1, size=4)
    assert found == pytest.approx(2 * 3 / 4 * 1e9 / link + calibration.COLLECTIVE_S)
    assert speed.all_reduce_seconds(1e9, H200, stride=1, size=1) == 0


@pytest.mark.parametrize(
    ("stride", "size", "network_gpus"), [(1, 8, None), (4, 2, None), (8, 2, 1), (2, 8, 4), (1, 16, 8), (7, 2, None)]
)
def test_ranks_of_one_node_share_its_network(stride: int, size: int, network_gpus: int | None) -> None:
    link = 450e9 * calibration.LINK_SHARE
    network = link if network_gpus is None else network_gpus * 50e9 * calibration.NETWORK_SHARE
    assert H200.bandwidth(stride, size) == pytest.approx(min(link, network))


def test_the_bubble_is_the_pipelines_length(gpt: Shape) -> None:
    two = dataclasses.replace(ONE, pipeline=2)
    stages = [speed.micro_batch_seconds(gpt, two, "bf16", H200, stage) for stage in range(2)]
    update = max(speed.update_seconds(gpt, two, "bf16", H200, stage) for stage in range(2))
    expected = 7 * max(stages) + sum(stages) + update + calibration.STEP_S
    assert speed.step_seconds(gpt, two, "bf16", H200) == pytest.approx(expected)
    assert gpt.stage_layers(2) == (13, 11), "the last stage has the logits"
    assert stages[1] == pytest.approx(stages[0], rel=0.08)


def test_given_stages_are_planned(gpt: Shape) -> None:
    given = dataclasses.replace(gpt, layers_per_stage=(16, 8))
    assert given.stage_layers(2) == (16, 8) and given.stage_layers(4) == gpt.stage_layers(4)
    two = dataclasses.replace(ONE, pipeline=2)
    assert speed.step_seconds(given, two, "bf16", H200) > 1.1 * speed.step_seconds(gpt, two, "bf16", H200)


def test_which_way_it_goes(gpt: Shape) -> None:
    def rate(**changes: object) -> float:
        layout = dataclasses.replace(ONE, **changes)  # type: ignore[arg-type]
        return speed.tflops_per_gpu(gpt, layout, speed.step_seconds(gpt, layout, "bf16", H200))

    assert rate(micro_batch=16, micro_batches=4) > rate() > rate(micro_batch=1, micro_batches=64)
    assert 0.7 < rate(recompute=True) / rate() < 0.85
    assert rate(tensor=2) < rate(tensor=2, sequence_parallel=True) < rate()
    assert rate(pipeline=2, micro_batches=64) > rate(pipeline=2, micro_batches=4)
    assert rate(data=16, micro_batches=1) < rate(data=8, micro_batches=1)
    assert speed.step_seconds(gpt, ONE, "fp32", H200) > 5 * speed.step_seconds(gpt, ONE, "bf16", H200)
