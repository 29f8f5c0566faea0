"""Real launches on two hosts, through every launcher and every starter, with both engines, and finetuning under ZeRO-3.

The hosts' interfaces have different names (eno1, eth0), their login shells know nothing of this project's environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs  # type: ignore[import-not-found]
from hosts import Hosts  # type: ignore[import-not-found]

from train.engine.megatron_deepspeed import checkout


@pytest.fixture(scope="module")
def expected(hosts: Hosts, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the tiny run with two processes on one machine."""
    output = tmp_path_factory.mktemp("one_machine")
    done = hosts.run("node1", runs.pretrain(corpus, output, num_processes=2), env=runs.ENVIRONMENT, timeout_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs.losses(output)


@pytest.mark.parametrize(
    ("launcher", "starter", "start_on"),
    [
        ("pdsh", "own", "node1"),
        ("pdsh", "deepspeed", "node1"),
        ("openmpi", "own", "node1"),
        ("openmpi", "torchrun", "login"),
        ("ssh", "own", "login"),
    ],
)
def test_two_hosts_train_as_one_machine_does(
    hosts: Hosts, corpus: Path, expected: dict[int, float], tmp_path: Path, launcher: str, starter: str, start_on: str
) -> None:
    hostfile = runs.hostfile(tmp_path, "node1", "node2")
    command = runs.pretrain(corpus, tmp_path / "out", hostfile=hostfile, launcher=launcher, starter=starter)
    done = hosts.run(start_on, command, env=runs.ENVIRONMENT, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "world size 2" in done.stdout and "node[1-2]" in done.stdout
    assert runs.losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    layout = json.loads((tmp_path / "out" / "manifest" / "tiny.json").read_text())["results"]["layout"]
    assert (layout["hosts"], layout["world_size"]) == (2, 2)
    assert not hosts.strays("node1") and not hosts.strays("node2")
    assert not list((tmp_path / "out" / "launch").rglob("invitation.json"))


@pytest.mark.parametrize(("layout", "slots"), [({"data_parallel_size": 2}, 1), ({"tensor": 2, "pipeline": 2}, 2)])
def test_megatron_deepspeed_over_two_hosts(
    hosts: Hosts, corpus: Path, tmp_path: Path, layout: dict[str, int], slots: int
) -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    sizes = {f"{name}_parallel_size" if name in ("tensor", "pipeline") else name: size for name, size in layout.items()}
    command = runs.pretrain(
        corpus, tmp_path / "out", engine="megatron-deepspeed", num_processes=slots, launcher="pdsh",
        hostfile=runs.hostfile(tmp_path, "node1", "node2", slots=slots), **sizes,
    )  # fmt: skip
    done = hosts.run("node1", command, env=runs.ENVIRONMENT, timeout_s=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = runs.losses(tmp_path / "out")
    assert sorted(found) == list(range(1, runs.STEPS + 1)) and found[runs.STEPS] < found[1]


def test_finetuning_under_zero_3_over_two_hosts(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    model = runs.make_model(hosts, corpus, tmp_path)
    output = tmp_path / "finetuned"
    command = runs.finetune(
        model, output, hostfile=runs.hostfile(tmp_path, "node1", "node2"), launcher="pdsh", zero_stage=3
    )
    done = hosts.run("node1", command, env=runs.ENVIRONMENT, timeout_s=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    results: dict[str, Any] = json.loads((output / "manifest.json").read_text())["results"]
    assert results["layout"]["world_size"] == 2 and results["layout"]["zero_stage"] == 3
    assert results["last_loss"] < results["first_loss"]
    assert not hosts.strays("node1") and not hosts.strays("node2")
