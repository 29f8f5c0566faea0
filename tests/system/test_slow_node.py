"""--preflight measure: a node whose core somebody else uses, and a node behind a bad link, are found by their names.

The slowness is real. Each node's ranks are bound to a core of their own, as on a cluster; on node2's core other
programs are busy, too. (The hosts share this machine, so without the binding they would be slow together.) The link is
shaped by the kernel.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs  # type: ignore[import-not-found]
from hosts import PROJECT_ROOT, Hosts  # type: ignore[import-not-found]

pytestmark = pytest.mark.alone
NEIGHBOURS = 5  # as many processes beside the rank leave it a sixth of the core: far enough from what noise does
MEASURE = PROJECT_ROOT / "scripts" / "common" / "measure_nodes.sh"


@pytest.fixture
def own_cores(tmp_path: Path) -> Path:
    """A --node_setup that binds node1 to one core of this machine and node2 to another."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two nodes need a core each to be compared, and this machine has one")
    file = tmp_path / "own_cores.sh"
    file.write_text(
        f'core={cores[0]}\n[[ "$(uname -n)" == node1 ]] || core={cores[1]}\ntaskset -pc "${{core}}" $$ > /dev/null\n'
    )
    return file


@pytest.fixture
def busy_node2(hosts: Hosts) -> Iterator[None]:
    """Somebody else's programs on node2's core."""
    core = str(sorted(os.sched_getaffinity(0))[1])
    argv = ["taskset", "-c", core, sys.executable, "-c", "while True: pass"]
    busy = [hosts.popen("node2", argv) for _ in range(NEIGHBOURS)]
    yield
    for process in busy:
        process.terminate()
        process.communicate()


@pytest.mark.usefixtures("busy_node2")
def test_a_node_whose_core_is_shared_is_named_and_the_run_does_not_start(
    hosts: Hosts, corpus: Path, tmp_path: Path, own_cores: Path
) -> None:
    command = runs.pretrain(
        corpus, tmp_path / "out", hostfile=runs.hostfile(tmp_path, "node1", "node2"), launcher="pdsh",
        preflight="measure", node_setup=own_cores,
    )  # fmt: skip
    done = hosts.run("node1", command, env=runs.ENVIRONMENT, timeout_s=240)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "error: node2: " in said and "GFLOP/s in a matrix product" in said and "of the other node" in said, said
    assert "leave node2 out" in said and "--preflight check starts without measuring" in said
    assert "all-reduce over all nodes: " in said, "it went over the network between them"
    assert not runs.losses(tmp_path / "out"), "it trained"
    assert not [item for item in hosts.strays("node2") if "while True: pass" not in item.argv]


def measure(hosts: Hosts, folder: Path, *names: str, **more: object) -> dict[str, Any]:
    """What measure_nodes.sh writes of these hosts; it only warns, as this machine may be too uneven for all of them."""
    output = folder / "measured.json"
    given = {"hostfile": runs.hostfile(folder, *names), "launcher": "pdsh", "device": "cpu", "output": output, **more}
    command = ["bash", str(MEASURE), *runs.flags({**given, "preflight": "warn"})]
    done = hosts.run("login", command, env=runs.ENVIRONMENT, timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.name for file in folder.iterdir() if "measured" in file.name] == ["measured.json"], "nothing is left"
    record: dict[str, Any] = json.loads(output.read_text())
    assert [node["node"] for node in record["nodes"]] == list(names)
    return record


def test_measuring_without_a_run(hosts: Hosts, tmp_path: Path, own_cores: Path) -> None:
    record = measure(hosts, tmp_path, "node1", "node2", node_setup=own_cores)
    assert record["all_reduce_over_all_gb_per_s"] > 0
    assert all(node["matrix_product_tflops"] > 0 for node in record["nodes"])
    assert not hosts.strays("node1") and not hosts.strays("node2")


def test_a_node_behind_a_bad_link_is_named(hosts: Hosts, tmp_path: Path) -> None:
    """200 Mbit/s where the others have several Gbit/s; the two that it drags down in its pairs are not blamed."""
    interface = hosts.interfaces["node2"]
    shaping = ["tc", "qdisc", "add", "dev", interface, "root", "tbf", "rate", "200mbit", "burst", "256kb"]
    shaped = hosts.run("node2", [*shaping, "latency", "50ms"])
    if shaped.returncode != 0:
        pytest.skip(f"this kernel slows no link down: {shaped.stderr.strip()}")
    try:
        record = measure(hosts, tmp_path, "login", "node1", "node2")
    finally:
        hosts.run("node2", ["tc", "qdisc", "del", "dev", interface, "root"], check=True)
    blamed = [problem.partition(":")[0] for problem in record["problems"] if "with either neighbour" in problem]
    assert blamed == ["node2"], record
    assert record["all_reduce_over_all_gb_per_s"] < 0.05, "25 MB/s: one bad link is everybody's"
