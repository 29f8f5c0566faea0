"""Figures held against each other: who is named, who is not, and how it is told."""

from __future__ import annotations

import json

import pytest

from train.cluster import slow_nodes
from train.cluster.slow_nodes import RankFigures
from train.errors import UserError


def gpus(*products: float, inside: float = 400.0, beside: tuple[float, ...] = (), over: float | None = 40.0):
    """The ranks of one node."""
    return [RankFigures(product, inside, beside, over) for product in products]


def compare(*nodes: list[RankFigures], device: str = "cuda") -> slow_nodes.Report:
    names = [f"node{number}" for number in range(1, len(nodes) + 1)]
    return slow_nodes.compare([rank for node in nodes for rank in node], nodes=names, device=device)


def test_nodes_that_are_alike_pass_and_are_shown():
    report = compare(gpus(700, 690), gpus(705, 640), gpus(710, 700))
    assert report.problems == () and report.slow == ()
    assert report.table.splitlines() == [
        "node    matrix product (TFLOP/s)  all-reduce in the node (GB/s)",
        "node1   690                       400",
        "node2   640                       400",
        "node3   700                       400",
        "median  690                       400",
    ]
    assert report.all_reduce_over_all_gb_per_s == 40.0


def test_a_throttled_gpu_names_its_node_and_itself():
    report = compare(gpus(700, 690, 700), gpus(705, 640, 702), gpus(710, 700, 310))
    assert report.slow == ("node3",)
    (problem,) = report.problems
    assert problem.startswith(
        "node3: 310 TFLOP/s in a matrix product, 48% of the median of all nodes (640); GPU 2 below"
    )
    assert problem.endswith("leave node3 out.")
    assert "node3   310                       400  <- slow" in report.table.splitlines()


@pytest.mark.parametrize(("product", "is_slow"), [(79.9, True), (80.1, False), (500.0, False)])
def test_the_matrix_product_s_threshold(product, is_slow):
    assert bool(compare(gpus(100), gpus(100), gpus(product), gpus(100)).slow) is is_slow


@pytest.mark.parametrize(("inside", "is_slow"), [(69.9, True), (70.1, False)])
def test_the_all_reduce_s_threshold(inside, is_slow):
    report = compare(gpus(100, inside=100), gpus(100, inside=inside), gpus(100, inside=100))
    assert bool(report.slow) is is_slow
    assert not is_slow or "in an all-reduce in the node, 70% of the median" in report.problems[0]


def test_a_bad_link_is_told_from_its_neighbours():
    """Both neighbours of node2 had one slow all-reduce as well, with node2."""
    figures = [(10.0, 3.0), (3.0, 3.0), (3.0, 10.0), (10.0, 10.0)]
    report = compare(*(gpus(700, beside=pair) for pair in figures))
    assert report.slow == ("node2",)
    assert "3 GB/s in an all-reduce with either neighbour, 30% of the median of all nodes (10)" in report.problems[0]


def test_of_two_nodes_the_worse_one_is_held_against_the_other():
    """Half its neighbour's speed is 67% of the median of both, and three quarters would pass as 86%."""
    report = compare(gpus(700), gpus(525))
    assert report.slow == ("node2",)
    assert "525 TFLOP/s in a matrix product, 75% of the other node (700)" in report.problems[0]
    assert "median" not in report.table


def test_what_all_nodes_do_together_judges_none():
    slow_for_all = [gpus(700, over=0.001), gpus(700, over=0.001), gpus(700, over=0.0005)]
    report = compare(*slow_for_all)
    assert report.slow == () and report.all_reduce_over_all_gb_per_s == 0.0005


def test_one_node_holds_its_gpus_against_each_other():
    report = compare(gpus(700, 690, 500, 705, over=None))
    (problem,) = report.problems
    assert problem.startswith("node1: GPU 2 below 80% of the median of its GPUs in a matrix product.")
    assert "CUDA_VISIBLE_DEVICES" in problem
    assert compare(gpus(700, 690, over=None)).problems == ()
    assert "GPU 1 below 80% of its other GPU" in compare(gpus(700, 500, over=None)).problems[0]
    assert compare(gpus(700, over=None)).problems == ()


def test_ranks_on_a_cpu_are_not_judged_among_each_other():
    assert compare(gpus(0.05, 0.02, over=None), device="cpu").problems == ()
    assert "GFLOP/s)" in compare(gpus(0.05), device="cpu").table and "50 " in compare(gpus(0.05), device="cpu").table


def test_of_many_nodes_the_slow_and_the_slowest_are_shown():
    report = compare(*(gpus(700 + number) for number in range(99)), gpus(100, inside=100))
    lines = report.table.splitlines()
    assert len(lines) == 1 + 32 + 1 + 1
    assert any(line.startswith("node100 ") and line.endswith("<- slow") for line in lines)
    assert lines[-1] == "and 68 nodes that are faster in the matrix product"
    assert "all-reduce in the node" in report.problems[0] and "matrix product" in report.problems[0]


def test_missing_ranks_are_refused():
    with pytest.raises(UserError, match="3 ranks of 2 nodes"):
        slow_nodes.compare(gpus(1, 2, 3), nodes=["node1", "node2"], device="cuda")
    with pytest.raises(UserError, match="0 ranks of 2 nodes"):
        slow_nodes.compare([], nodes=["node1", "node2"], device="cuda")


def test_json_has_the_units_in_its_keys():
    plain = json.loads(json.dumps(slow_nodes.as_plain(compare(gpus(700), gpus(100)), "cuda")))
    assert plain["slow_nodes"] == ["node2"] and plain["nodes"][1]["matrix_product_tflops"] == 100
    assert plain["problems"] and plain["all_reduce_over_all_gb_per_s"] == 40.0


@pytest.mark.parametrize("count", range(1, 12))
def test_every_node_meets_both_neighbours_and_is_in_one_pair_at_a_time(count):
    rounds = slow_nodes.neighbours(count)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
    met = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    ring = {tuple(sorted((node, (node + 1) % count))) for node in range(count)} if count > 2 else set()
    assert met == sorted(ring)
    assert len(rounds) <= 3
