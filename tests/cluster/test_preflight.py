"""Nodes held against each other: what must be the same, what may differ, and how it is told."""

from __future__ import annotations

from typing import Any

from train.cluster import preflight

SAME: dict[str, Any] = {
    "interpreter": "/env/bin/python", "python": "3.12.3", "torch": "2.13.0", "CUDA": "13.0", "NCCL": "2.28",
    "GPU": "H200", "engine": "abc", "driver": "580", "GPUs": 8, "cores": 64, "open files": 262144, "locked memory": -1,
    "clock": 0.1,
    "temporary folder": "/tmp", "free MiB there": 9000, "unseen": [],
}  # fmt: skip


def compare(*changes: dict[str, Any], processes: int = 8, device: str = "cuda") -> preflight.Report:
    facts = {f"node{number}": {**SAME, **change} for number, change in enumerate(changes, 1)}
    return preflight.compare(facts, processes=processes, device=device)


def test_nodes_that_are_alike_are_told_with_no_word():
    assert compare({}, {}, {}) == preflight.Report((), (), "")
    assert preflight.compare({}, processes=1, device="cpu") == preflight.Report((), (), "")


def test_a_difference_is_a_problem_and_a_row_of_the_table():
    report = compare({}, {"torch": "2.11.0"}, {}, {"torch": None})
    assert report.problems == ("torch: 2.13.0 on node1 and node3; 2.11.0 on node2; none on node4.",)
    assert report.table == "       node1   node2   node3   node4\ntorch  2.13.0  2.11.0  2.13.0  none"
    assert report.notes == ()


def test_all_differences_are_told_at_once_in_a_straight_table():
    report = compare({}, {"torch": "2.11.0", "CUDA": "12.8", "engine": "abd"})
    assert [problem.partition(":")[0] for problem in report.problems] == ["torch", "CUDA", "engine"]
    starts = [line.index(line.split()[-1]) for line in report.table.splitlines()]
    assert len(set(starts)) == 1 and len(report.table.splitlines()) == 4


def test_cores_and_limits_may_differ():
    report = compare({}, {"cores": 32, "locked memory": 65536})
    assert report.problems == ()
    assert report.notes == ("cores: 64 on node1; 32 on node2.", "locked memory: -1 on node1; 65536 on node2.")
    assert "cores" in report.table


def test_many_nodes_are_counted_not_listed():
    (problem,) = compare(*[{}] * 9, {"torch": "2.11.0"}).problems
    assert problem == "torch: 2.13.0 on node1 and node2 and node3 and 6 more; 2.11.0 on node10."


def test_too_few_gpus_on_a_node():
    report = compare({}, {"GPUs": 7})
    assert "node2 has 7 GPUs for 8 processes, one each." in report.problems
    assert any(problem.startswith("GPUs: 8 on node1; 7 on node2") for problem in report.problems)
    assert compare({"GPUs": 0, "GPU": None, "driver": None}).problems == (
        "node1 has 0 GPUs for 8 processes, one each.",
    )


def test_a_run_on_the_cpu_asks_for_no_gpus_and_does_not_mind_one():
    assert compare({}, {"GPUs": 0, "GPU": None, "driver": None}, device="cpu") == preflight.Report((), (), "")


def test_a_clock_that_is_off_in_either_direction():
    assert compare({}, {"clock": 29.0}, {"clock": -29.0}).problems == ()
    assert compare({"clock": 31.2}, {"clock": -3600.0}).problems == (
        "node1: its clock is +31 s off the launcher's; have it set.",
        "node2: its clock is -3600 s off the launcher's; have it set.",
    )


def test_unseen_paths_and_a_full_temporary_folder_name_their_node():
    report = compare({}, {"unseen": ["/data/a", "/data/b"], "temporary folder": "/scratch", "free MiB there": 63})
    assert report.problems == (
        "node2 does not see /data/a: it must stand on a file system that all nodes share.",
        "node2 does not see /data/b: it must stand on a file system that all nodes share.",
        "node2: /scratch has 63 MiB free, 64 MiB are needed: free some, or name another folder in TMPDIR there.",
    )


def test_few_open_files_are_worth_a_line():
    assert compare({"open files": 1024}).notes == ("node1 allows 1024 open files; its hard limit keeps it from more.",)
    assert compare({"open files": -1}).notes == ()


def test_an_interface_that_a_node_lacks_is_refused() -> None:
    facts = {
        "node1": {"interface": "eno1", "interface_address": "10.0.0.1"},
        "node2": {"interface": "eno1", "interface_address": None},
    }
    (problem,) = preflight.compare(facts, processes=1, device="cpu").problems
    assert problem.startswith("node2 has no interface eno1")


def test_one_machine_by_two_names_is_refused():
    alike = {"boot": "a1", "host": "node1"}
    assert compare(alike, {"boot": "a2", "host": "node2"}, alike).problems == (
        "node1 and node3 are one machine, node1: name each node once, and its processes by slots.",
    )
    # cloned disks give host names twice; containers of one machine have one boot; an old kernel tells none
    assert compare(alike, {"boot": "a2", "host": "node1"}).problems == ()
    assert compare(alike, {"boot": "a1", "host": "container2"}).problems == ()
    assert compare({"boot": None, "host": "node1"}, {"boot": None, "host": "node1"}).problems == ()


def test_a_table_of_a_hundred_nodes_can_be_read():
    table = compare(*[{}] * 41, {"torch": "2.11.0"}, *[{}] * 58).table
    assert table == "       node[1-41,43-100]  node42\ntorch  2.13.0             2.11.0"
