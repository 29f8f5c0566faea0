"""Launchers, agents and ranks as real processes: however a run ends, the cause is told and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_cluster import SmallCluster, wait_until  # type: ignore[import-not-found]

SLEEP = "import os, time; print('up', os.environ['RANK'], flush=True); time.sleep(100)"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    """A cluster of which nothing may be left when the test ends."""
    made = SmallCluster(tmp_path)
    yield made
    try:
        wait_until(made.is_quiet, "all processes to end", 15)
    finally:
        made.close()


def are_up(cluster: SmallCluster, count: int) -> bool:
    return cluster.log.exists() and cluster.log.read_text().count("up ") == count


def begin(cluster: SmallCluster, rank: str = SLEEP, *, nodes: int = 2, processes: int = 1, **how: object) -> None:
    """Starts a launch and waits until each of its ranks has said `up`."""
    cluster.start(rank, nodes=nodes, processes=processes, **how)
    wait_until(lambda: are_up(cluster, nodes * processes), "the ranks to start")


def test_all_ranks_of_all_nodes_run_and_the_run_ends_well(cluster):
    end = cluster.run(
        "import os, json; print(json.dumps({name: os.environ.get(name) for name in"
        " ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'A')}))",
        processes=2,
        environment={"A": "of the launcher"},
    )
    assert (end.exit_status, end.text) == (0, "")
    ranks = sorted(
        (json.loads(line) for line in end.printed.splitlines() if line.startswith("{")), key=lambda told: told["RANK"]
    )
    assert [(told["RANK"], told["LOCAL_RANK"], told["GROUP_RANK"]) for told in ranks] == [
        ("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1")
    ]  # fmt: skip
    assert {(told["WORLD_SIZE"], told["MASTER_ADDR"], told["A"]) for told in ranks} == {
        ("4", "127.0.0.1", "of the launcher")
    }
    assert len({told["MASTER_PORT"] for told in ranks}) == 1
    assert cluster.log.read_text() == end.printed


def test_a_rank_that_fails_is_named_with_its_last_lines_and_the_others_end(cluster):
    end = cluster.run(
        "import os, sys, time\nprint('before', os.environ['RANK'])\n"
        "if os.environ['RANK'] == '1':\n    print('the cause', file=sys.stderr); sys.exit(3)\ntime.sleep(100)"
    )
    assert end.exit_status == 3
    assert end.text == "rank 1 on node2 ended with status 3. Its last lines:\n    before 1\n    the cause"


def test_the_last_line_is_told_though_it_does_not_end(cluster):
    """A child of the rank holds the pipe open, so that there is no end of file either."""
    end = cluster.run(
        "import subprocess, sys\nsubprocess.Popen(['sleep', '100'], start_new_session=True)\n"
        "sys.stdout.write('half a line'); sys.exit(3)",
        nodes=1,
    )
    assert end.text == "rank 0 ended with status 3. Its last lines:\n    half a line"


def test_a_killed_rank_ends_the_run_with_its_signal(cluster):
    begin(cluster)
    (victim,) = [item for item in cluster.processes("-u -c") if item.environ().get("RANK") == "1"]
    victim.kill()
    end = cluster.end()
    assert end.exit_status == 137
    assert end.text.startswith("rank 1 on node2 was killed by SIGKILL; if nobody did that, the node was out of memory")


def test_a_killed_agent_takes_its_ranks_with_it_and_ends_the_run(cluster):
    begin(cluster, processes=2)
    cluster.agent("node2").kill()
    end = cluster.end()
    assert end.exit_status != 0
    assert "node2 was lost: the connection was closed" in end.text or "Connection reset" in end.text


@pytest.mark.slow
def test_a_killed_launcher_leaves_neither_agents_nor_ranks(cluster):
    begin(cluster, processes=2)
    cluster.launcher.kill()
    wait_until(cluster.is_quiet, "agents and ranks to end", 15)


@pytest.mark.slow
def test_an_agent_that_falls_silent_is_lost_after_the_time_out(cluster):
    begin(cluster, node_timeout_s=2)
    silent = cluster.agent("node2")
    silent.suspend()
    end = cluster.end()
    assert (end.exit_status, end.text) == (
        1, "node2 was lost: no sign for 2 s. The same command goes on from the last checkpoint.",
    )  # fmt: skip
    silent.resume()  # it finds the run over, and ends its ranks


@pytest.mark.slow
def test_a_run_longer_than_a_short_time_out_is_not_taken_for_lost(cluster):
    end = cluster.run("import time; time.sleep(4)", nodes=2, node_timeout_s=1)
    assert (end.exit_status, end.text) == (0, "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_ranks_which_may_save_and_end(cluster, number, status):
    begin(
        cluster,
        "import os, signal, sys, time\n"
        "def end(number, frame): print('saved', number, flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\n"
        "print('up', flush=True); print('up ', flush=True); time.sleep(100)",
    )
    cluster.launcher.send_signal(number)
    end = cluster.end()
    assert (end.exit_status, end.text) == (status, "")
    assert end.printed.count(f"saved {int(number)}") == 2


def test_an_agent_that_is_hung_up_lets_all_ranks_save(cluster):
    begin(
        cluster,
        "import signal, sys, time\n"
        "def end(number, frame): print('saved', number, flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('up ', flush=True); time.sleep(100)",
    )
    cluster.agent("node2").send_signal(signal.SIGHUP)
    end = cluster.end()
    assert (end.exit_status, end.text) == (143, "")
    assert end.printed.count(f"saved {int(signal.SIGTERM)}") == 2


def test_ranks_that_end_well_when_asked_make_a_good_end(cluster):
    begin(
        cluster,
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
        " print('up ', flush=True); time.sleep(100)",
    )
    cluster.launcher.terminate()
    assert cluster.end().exit_status == 0


@pytest.mark.slow
def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(cluster):
    begin(
        cluster,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up ', flush=True); time.sleep(100)",
        grace_s=1,
    )
    cluster.launcher.terminate()
    end = cluster.end()
    assert (end.exit_status, end.text) == (143, "")


def test_ctrl_c_for_the_second_time_does_not_wait(cluster):
    begin(
        cluster,
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True));"
        " print('up ', flush=True)\nwhile True: time.sleep(1)",
        grace_s=100,
    )
    cluster.launcher.send_signal(signal.SIGINT)
    wait_until(lambda: cluster.log.read_text().count("heard") == 2, "the ranks to hear of it")
    cluster.launcher.send_signal(signal.SIGINT)
    assert cluster.end().exit_status == 130


def test_a_signal_to_one_agent_ends_all_as_schedulers_do_it(cluster):
    begin(cluster)
    cluster.agent("node2").terminate()
    assert cluster.end().exit_status == 143


def test_a_signal_before_the_nodes_have_come_ends_the_launch(cluster):
    cluster.start(SLEEP, agents={"node1": {}})
    wait_until(lambda: (cluster.launch_dir / "invitation.json").exists(), "the invitation")
    wait_until(lambda: cluster.processes("--node node1"), "the agent")
    cluster.launcher.terminate()
    assert cluster.end().exit_status == 143


@pytest.mark.slow
def test_what_a_rank_leaves_behind_ends_with_it_and_holds_nobody_up(cluster):
    """A grandchild in its own session that holds the pipe open, as data loaders and W&B leave them."""
    end = cluster.run(
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], start_new_session=True)\n"
        "print('done')"
    )
    assert (end.exit_status, end.printed.count("done")) == (0, 2)


def test_ten_megabytes_come_whole_and_lines_are_not_cut(cluster):
    end = cluster.run(
        "import os, sys\nrank = os.environ['RANK']\nfor number in range(50_000):\n"
        "    sys.stdout.write(f'{rank} {number} ' + rank * 90 + '\\n')",
        processes=2,
    )
    assert end.exit_status == 0
    lines = end.printed.splitlines()
    assert len(lines) == 200_000 and len(end.printed) > 1.9e7
    last = dict.fromkeys("0123", -1)
    for line in lines:
        rank, number, rest = line.split(" ")
        assert int(number) == last[rank] + 1 and rest == rank * 90, line
        last[rank] = int(number)


def test_a_progress_bar_is_seen_before_its_line_ends(cluster):
    cluster.start(
        "import sys, time; sys.stderr.write('up \\rstep 1\\rst'); sys.stderr.flush(); time.sleep(100)", nodes=1
    )
    wait_until(lambda: cluster.log.exists() and "step 1" in cluster.log.read_text(), "the progress bar", 15)
    cluster.launcher.send_signal(signal.SIGINT)
    assert cluster.end().exit_status == 130


@pytest.mark.slow
def test_a_terminal_that_stands_still_does_not_end_the_run(cluster):
    """Ctrl-S, or `| less`: nobody takes the launcher's output for longer than the time-out."""
    cluster.start("import sys, time\nfor _ in range(4000): print('x' * 200)\nprint('end')", nodes=1, node_timeout_s=1)
    wait_until(lambda: cluster.log.exists() and cluster.log.stat().st_size, "the first output")
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.launcher.wait(4)
    end = cluster.end()
    assert (end.exit_status, end.text) == (0, "")
    assert end.printed.count("x" * 200) == 4000 and end.printed.endswith("end\n")


@pytest.mark.slow
def test_a_node_that_never_comes_is_named(cluster):
    end = cluster.run(SLEEP, nodes=3, agents={"node1": {}, "node3": {}}, join_timeout_s=2)
    assert end.exit_status == 1
    assert end.text.startswith("node2 did not come: no answer in 2 s (--join_timeout_s).")


def test_a_transport_that_ends_before_its_nodes_have_come(cluster):
    end = cluster.run(SLEEP, agents={})
    assert (end.exit_status, end.text) == (1, "node1, node2 did not come: status 0.")


def test_the_same_node_twice_is_refused_on_both_sides(cluster):
    end = cluster.run(SLEEP, agents={"node1": {}, "node1#again": {}})
    assert end.exit_status == 2
    assert "calls itself node1, which has come already (node1, node2): name each node once" in end.text


def test_an_unknown_node_is_refused(cluster):
    end = cluster.run(SLEEP, agents={"node1": {}, "other": {}})
    assert end.exit_status == 2
    assert "calls itself other, which is no node of this run (node1, node2)" in end.text


def test_a_program_that_is_not_there_is_named(cluster):
    end = cluster.run(SLEEP, argv=["/no/such/python", "-c", ""])
    assert end.exit_status != 0
    assert "/no/such/python" in end.text, end
    assert "Traceback" not in end.printed


def test_nodes_that_differ_are_refused_with_a_table_or_only_told(cluster, tmp_path):
    site = tmp_path / "site"
    (site / "deepspeed-0.0.1.dist-info").mkdir(parents=True)
    (site / "deepspeed-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n"
    )
    agents = {"node1": {}, "node2": {"env": {"PYTHONPATH": str(site)}}}
    end = cluster.run("print('ran')", agents=agents)
    assert end.exit_status == 2 and "ran" not in end.printed
    assert "0.0.1 on node2." in end.text and end.text.endswith("--preflight warn starts all the same.")
    assert "nodes differ:" in end.printed
    end = cluster.run("print('ran')", agents=agents, refuses_differences=False)
    assert end.exit_status == 0 and end.printed.count("ran") == 2
    assert "warning: deepspeed: " in end.printed


def test_a_path_that_a_node_does_not_see_is_refused(cluster, tmp_path):
    end = cluster.run("print('ran')", nodes=1, paths=[str(tmp_path), str(tmp_path / "nowhere")])
    assert end.exit_status == 2 and "ran" not in end.printed
    assert f"node1 does not see {tmp_path}/nowhere: it must stand on a file system that all nodes share." in end.text


def test_the_invitation_is_the_owners_alone_and_gone_afterwards(cluster):
    begin(cluster)
    file = cluster.launch_dir / "invitation.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = json.loads(file.read_text())["key"]
    cluster.launcher.send_signal(signal.SIGINT)
    end = cluster.end()
    assert not file.exists()
    assert key not in end.printed + end.text


def test_an_agent_without_an_invitation_says_why(tmp_path):
    argv = [sys.executable, "-m", "train.cluster.agent", "--launch_dir", str(tmp_path), "--node", "node1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "invitation.json" in done.stdout and "the run has ended, or its folder is not shared" in done.stdout


def test_an_agent_that_reaches_no_launcher_says_where_it_tried(tmp_path):
    invitation = {"addresses": ["127.0.0.1"], "port": 9, "key": "k" * 64, "node_timeout_s": 5}
    (tmp_path / "invitation.json").write_text(json.dumps(invitation))
    argv = [sys.executable, "-m", "train.cluster.agent", "--launch_dir", str(tmp_path), "--node", "node1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "port 9 of the launcher cannot be reached (127.0.0.1: " in done.stdout
    assert "k" * 64 not in done.stdout


def test_a_secret_reaches_the_ranks_and_nothing_else(cluster, tmp_path):
    """Planted in the launch; looked for in every file, every argv, the log, and the agents' own environment."""
    planted = "planted-secret-4711"
    begin(
        cluster,
        textwrap.dedent("""
            import os, time
            print('length', len(os.environ['WANDB_API_KEY']), flush=True)
            print('up ', flush=True)
            time.sleep(100)
        """),
        secrets={"WANDB_API_KEY": planted},
        environment={"HF_TOKEN": planted},
    )
    (cluster.folder / "spec.json").unlink()  # the test's own
    assert all(planted not in " ".join(item.cmdline()) for item in cluster.processes())
    agents = cluster.processes("train.cluster.agent")
    assert len(agents) == 2 and all(planted not in item.environ().values() for item in agents)
    cluster.launcher.send_signal(signal.SIGINT)
    end = cluster.end()
    assert end.printed.count(f"length {len(planted)}") == 2 and planted not in end.printed + end.text
    for folder, _, files in os.walk(tmp_path):
        assert all(planted not in (Path(folder) / file).read_text() for file in files)


def test_nodes_that_are_slow_to_tell_of_themselves_are_not_lost(cluster, tmp_path):
    """nvidia-smi without its daemon takes longer on a node of eight GPUs than a node may be silent."""
    agents = {}
    for node, seconds in (("node1", 2), ("node2", 4)):  # the first one waits for the second one's start
        (tmp_path / node).mkdir()
        (tmp_path / node / "nvidia-smi").write_text(f"#!/bin/sh\nsleep {seconds}\nexit 9\n")
        (tmp_path / node / "nvidia-smi").chmod(0o755)
        variables = {"PATH": f"{tmp_path / node}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
        agents[node] = {"env": variables}
    end = cluster.run("print('ran')", agents=agents, node_timeout_s=1)
    assert (end.exit_status, end.text) == (0, "")


def test_a_rank_that_dies_between_two_questions_is_told_before_the_end(monkeypatch):
    """Its pipe has closed and its status is not there yet: that node would end, and the run be called good."""
    from train.cluster import agent

    class Channel:
        def __init__(self):
            self.told, self.ours, self.theirs = [], *socket.socketpair()

        def fileno(self):
            return self.ours.fileno()

        def send(self, message):
            self.told.append(message["kind"])

    class Ranks:
        """It is dead from the moment at which somebody asks whether it lives."""

        is_dead = False

        def pipes(self):
            return []

        def copy_output(self, _ready):
            pass

        def new_failures(self):
            return [{"rank": 0, "status": 130, "lines": []}] if self.is_dead else []

        def are_running(self):
            self.is_dead = True
            return False

    channel = Channel()
    serving = agent._Agent(channel, node_timeout_s=60.0)
    serving._ranks = Ranks()
    monkeypatch.setattr(agent, "_POLL_S", 0.0)
    assert serving._turn() is None
    assert channel.told == ["failed", "ended"]
