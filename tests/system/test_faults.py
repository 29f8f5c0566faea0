"""What goes wrong on clusters: each fault ends the run in seconds, names node and cause, and leaves a run that resumes.

"In seconds" is held against the time-outs that users wait for today: half an hour in a collective, a quarter in TCP.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs  # type: ignore[import-not-found]
from hosts import Hosts, wait_until  # type: ignore[import-not-found]

IN_SECONDS = 60  # on two busy cores; the product's own limit for a node that goes away is 20 s

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(hosts: Hosts, corpus: Path, tmp_path: Path) -> Start:
    """Starts a run on node1 and node2 from node1, through pdsh; `more` wins."""

    def begin(*, env: dict[str, str] | None = None, on: str = "node1", **more: Any) -> subprocess.Popen[str]:
        given = {"hostfile": runs.hostfile(tmp_path, "node1", "node2"), "launcher": "pdsh", **more}
        command = runs.pretrain(corpus, tmp_path / "out", **given)
        return hosts.popen(on, command, env={**runs.ENVIRONMENT, **(env or {})})

    return begin


def refused(running: subprocess.Popen[str], *words: str, status: int | None = None) -> str:
    """The output of a run that ended by itself, in seconds, with an error that has all `words`."""
    code, said = runs.finish(running, IN_SECONDS)
    assert code != 0 and (status is None or code == status), said
    assert [word for word in words if word not in said] == [], said
    assert "Traceback" not in said[said.rindex("error:") :], said
    return said


def goes_on(start: Start, output: Path, **more: Any) -> None:
    """The same command, called again, finishes the run from its last checkpoint."""
    code, said = runs.finish(start(**more))
    assert code == 0 and "goes on from step" in said, said
    assert sorted(runs.losses(output)) == list(range(1, runs.STEPS + 1))


def slow(step: int, output: Path) -> dict[str, str]:
    """An environment in which every rank waits before each step after `step`, so that a fault meets a run at work."""
    folder = output.parent / "slow"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import sys, time\n"
        "def hook(name, arguments):\n"
        f"    if name == 'open' and str(arguments[0]).endswith('tiny.jsonl') and 'a' in str(arguments[1]):\n"
        f"        hook.count += 1\n"
        f"        time.sleep(120 if hook.count > {step} else 0)\n"
        "hook.count = 0\n"
        "sys.addaudithook(hook)\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_a_rank_killed_in_the_middle_ends_the_run_by_its_name(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    running = start(env=slow(6, tmp_path / "out"))
    runs.wait_for(lambda: max(runs.losses(tmp_path / "out"), default=0) >= 5, running)
    (victim,) = runs.hosts_of_ranks(hosts, "node2")
    os.kill(victim, signal.SIGKILL)
    said = refused(running, "rank 1 on node2 was killed by SIGKILL", status=137)
    assert "its last lines" in said.lower() or "without a word" in said
    assert not runs.hosts_of_ranks(hosts, "node1") and not runs.hosts_of_ranks(hosts, "node2")
    goes_on(start, tmp_path / "out")


def test_a_node_that_goes_away_is_named_in_seconds(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    running = start(env=slow(6, tmp_path / "out"), node_timeout_s=5)
    runs.wait_for(lambda: max(runs.losses(tmp_path / "out"), default=0) >= 5, running)
    hosts.cut("node2")
    refused(running, "node2 was lost", "no sign for 5 s", status=1)
    # and what runs on the node that nobody hears of ends by itself
    wait_until(lambda: not runs.hosts_of_ranks(hosts, "node2"), "the cut node to end its ranks")
    hosts.join("node2")
    goes_on(start, tmp_path / "out")


def test_the_launcher_killed_leaves_nothing_running(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    running = start(env=slow(6, tmp_path / "out"))
    runs.wait_for(lambda: max(runs.losses(tmp_path / "out"), default=0) >= 5, running)
    launchers = [item.pid for item in hosts.processes("node1") if any(w.endswith("pretrain.py") for w in item.argv)]
    for pid in launchers:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not hosts.strays("node1") and not hosts.strays("node2"), "all nodes to be quiet")
    runs.finish(running)
    goes_on(start, tmp_path / "out")


def test_ctrl_c_and_sigterm_end_all_nodes(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    for number, word in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended early (asked by SIGTERM)")):
        output = tmp_path / "out"
        running = start(job_name=f"tiny{number}", train_tokens="10M", save_interval=100000)
        runs.wait_for(lambda output=output, number=number: len(runs.losses(output, f"tiny{number}")) > 3, running)
        running.send_signal(number)
        refused(running, word, status=130)
        assert not hosts.strays("node1") and not hosts.strays("node2")


def test_a_host_that_refuses_ssh(start: Start, hosts: Hosts) -> None:
    hosts.refuse_ssh("node2")
    refused(start(), "node2 could not be started", "refused")


def test_a_hostfile_that_names_an_unknown_host(start: Start, tmp_path: Path) -> None:
    refused(start(hostfile=runs.hostfile(tmp_path, "node1", "node7")), "node7 could not be started", "resolve")


def test_a_node_without_the_environment(start: Start, hosts: Hosts) -> None:
    hosts.small_disk("node2", sys.prefix)
    refused(start(), "node2", "install the environment where every node sees it", status=2)


def test_a_wrong_python_on_a_node(start: Start, tmp_path: Path) -> None:
    """What is found before training is told as a table, and refused."""
    setup = tmp_path / "setup.sh"
    stand_in = tmp_path / "site"
    stand_in.mkdir()
    other = stand_in / "deepspeed-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    setup.write_text(f'[[ "$(uname -n)" != node2 ]] || export PYTHONPATH="{stand_in}"\n')
    said = refused(start(node_setup=setup), "deepspeed: ", "0.0.1 on node2", "nodes differ:", status=2)
    assert "loss" not in said, "it trained"


def test_a_full_disk_on_one_node(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    hosts.small_disk("node2", tmp_path / "scratch", "1m")
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export TMPDIR={tmp_path}/scratch\n")
    refused(start(node_setup=setup), f"node2: {tmp_path}/scratch has", "MiB free", status=2)


def test_a_stale_lock_of_an_extension_build_does_not_hang_a_run(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    """What a build that was killed leaves behind: torch waits for it for ever."""
    lock = tmp_path / "out" / "torch_extensions" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    code, said = runs.finish(start(zero_stage=1), IN_SECONDS)
    assert code == 0 and not lock.exists(), said


def test_a_run_folder_that_a_node_does_not_see(start: Start, hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    hosts.small_disk("node2", tmp_path / "out", "1m")
    refused(start(), "node2", "All nodes must share it")
