"""The ranks of one node: what is started, with which variables, and what becomes of their output and their children."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_cluster import wait_until  # type: ignore[import-not-found]

from train import process
from train.cluster.node_ranks import NodeRanks, Order, build_argv, build_environment
from train.cluster.steady_output import SteadyOutput

ORDER = Order(
    argv=["/env/bin/python", "-m", "train.engine.transformers.worker", "--recipe", "a b"],
    environment={"A": "1"},
    processes=4,
    node_rank=1,
    nodes=2,
    master_address="10.0.0.1",
    master_port=20001,
)


def order(**changes: Any) -> Order:
    return Order(**{**ORDER.__dict__, **changes})


def test_ranks_of_our_own_are_the_command_itself():
    assert build_argv(ORDER) == ORDER.argv
    assert build_argv(order(starter="torchrun", is_distributed=False)) == ORDER.argv


def test_torchrun_is_told_where_the_others_are():
    assert build_argv(order(starter="torchrun")) == [
        "/env/bin/python", "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "4",
        "--master_addr", "10.0.0.1", "--master_port", "20001",
        "-m", "train.engine.transformers.worker", "--recipe", "a b",
    ]  # fmt: skip


def test_deepspeeds_launcher_is_told_of_every_rank_of_the_world():
    argv = build_argv(order(starter="deepspeed"))
    assert argv[:3] == ["/env/bin/python", "-m", "deepspeed.launcher.launch"]
    world = json.loads(base64.urlsafe_b64decode(argv[3].removeprefix("--world_info=")))
    assert world == {"0": [0, 1, 2, 3], "1": [0, 1, 2, 3]}
    assert argv[4:] == [
        "--node_rank=1", "--master_addr", "10.0.0.1", "--master_port", "20001", "--no_local_rank", "--module",
        "train.engine.transformers.worker", "--recipe", "a b",
    ]  # fmt: skip


def test_a_ranks_variables_are_those_that_torchrun_sets():
    found = build_environment(ORDER, 2, "ib0", {"PATH": "/bin", "A": "node"})
    assert found == {
        "PATH": "/bin", "A": "1",
        "RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20001",
        "GLOO_SOCKET_IFNAME": "ib0", "TP_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0",
    }  # fmt: skip


@pytest.mark.parametrize("starter", ["torchrun", "deepspeed"])
def test_another_starter_numbers_the_ranks_itself(starter):
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(build_environment(order(starter=starter), 0, "ib0", {}))


def test_a_plain_process_knows_of_no_ranks():
    assert "RANK" not in build_environment(order(is_distributed=False, nodes=1), 0, None, {})


def test_what_the_user_has_set_for_the_interface_stands():
    users = {"NCCL_SOCKET_IFNAME": "^docker0", "GLOO_SOCKET_IFNAME": "eth5"}
    found = build_environment(ORDER, 0, "ib0", users)
    assert {name: found[name] for name in users} == users and found["TP_SOCKET_IFNAME"] == "ib0"
    found = build_environment(order(environment=users), 0, "ib0", {})
    assert {name: found[name] for name in users} == users


def test_one_node_speaks_over_its_loopback_and_leaves_nccl_alone():
    found = build_environment(order(nodes=1, node_rank=0), 0, "eth0", {})
    assert found["GLOO_SOCKET_IFNAME"] == "lo" and "NCCL_SOCKET_IFNAME" not in found


def test_an_unknown_interface_is_left_to_the_libraries():
    assert not [name for name in build_environment(ORDER, 0, None, {}) if name.endswith("_SOCKET_IFNAME")]


def test_what_mpirun_says_of_its_own_processes_does_not_reach_the_ranks():
    """mpi4py, DeepSpeed and others would believe it: two agents, where there are sixteen ranks."""
    found = build_environment(ORDER, 0, None, {"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0", "PMI_SIZE": "2"})
    assert not [name for name in found if name.startswith(("OMPI_", "PMI"))]


# Real processes.


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., NodeRanks]]:
    running: list[NodeRanks] = []

    def begin(code: str, **changes: Any) -> NodeRanks:
        given = {"argv": [sys.executable, "-u", "-c", code], "processes": 1, "node_rank": 0, "nodes": 1}
        running.append(NodeRanks(order(**{**given, "working_dir": str(tmp_path), **changes}), None))
        return running[-1]

    yield begin
    for ranks in running:
        ranks.close()


def serve(ranks: NodeRanks, seconds: float = 20) -> list[dict[str, Any]]:
    """What an agent does until the ranks have ended; their failures."""
    failures: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    while ranks.are_running():
        assert time.monotonic() < deadline, "the ranks do not end"
        ready, _, _ = select.select(ranks.pipes(), [], [], 0.05)
        ranks.copy_output(ready)
        failures += ranks.new_failures()
    assert ranks._output.finish(10)
    return [*failures, *ranks.new_failures()]


def test_ranks_start_in_the_folder_with_their_numbers_and_no_input(start, tmp_path, capfd):
    code = "import os, sys; print(os.environ['RANK'], os.environ['A'], os.getcwd(), repr(sys.stdin.read()))"
    assert serve(start(code, processes=2)) == []
    assert sorted(capfd.readouterr().out.splitlines()) == [f"{rank} 1 {tmp_path} ''" for rank in (0, 1)]


def test_a_failure_is_told_once_with_its_last_lines(start):
    (failure,) = serve(start("print(*range(100), sep='\\n'); print(); raise SystemExit(7)"))
    assert failure == {"rank": 0, "status": 7, "lines": [str(number) for number in range(75, 100)]}


def test_rank_numbers_count_over_nodes_and_signals_are_as_shells_have_them(start):
    code = "import os, signal; os.environ['RANK'] == '3' and os.kill(os.getpid(), signal.SIGSEGV)"
    (failure,) = serve(start(code, processes=2, node_rank=1, nodes=2))
    assert (failure["rank"], failure["status"]) == (3, 139)


def test_a_failure_is_told_though_a_child_goes_on_printing(start, capfd):
    """Reading what a dead rank has left must come to an end."""
    code = "import subprocess; subprocess.Popen(['sh', '-c', 'yes'], start_new_session=True); raise SystemExit(7)"
    ranks = start(code)
    (item,) = ranks._processes
    item.child.wait(20)
    (failure,) = ranks.new_failures()
    assert failure["status"] == 7
    serve(ranks)


def test_no_second_rank_starts_where_the_program_is_missing(start):
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        start("", argv=["no-such-program"], processes=2)
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        start("", working_dir="/no_such_folder")


def test_a_line_longer_than_any_reader_wants_is_passed_on_in_pieces(start, capfd):
    assert serve(start("import sys\nfor _ in range(30): sys.stdout.write('x' * 100_000)")) == []
    assert capfd.readouterr().out.rstrip("\n") == "x" * 3_000_000


def test_a_character_is_not_cut_where_a_read_ends(start, capfd):
    assert serve(start("import sys; sys.stdout.buffer.write(('日本語' * 30 + '\\n').encode() * 2000)")) == []
    assert capfd.readouterr().out == ("日本語" * 30 + "\n") * 2000


def test_end_within_kills_ranks_and_what_they_started(start, tmp_path):
    code = f"""
import os, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(100)
"""
    ranks = start(code)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the rank to start")
    ranks.signal(signal.SIGTERM)
    ranks.end_within(0.3)
    ranks.end_within(50)  # a later word does not make it live longer
    (failure,) = serve(ranks)
    assert failure["status"] == 137
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie", "the child to end")


def test_signals_go_to_ranks_and_not_to_what_they_started(start, tmp_path, capfd):
    """A data loader's worker that gets SIGTERM too would fail the step that its rank wants to finish."""
    code = f"""
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
def end(*_):
    time.sleep(0.3); print("child", child.poll(), flush=True); child.kill(); sys.exit(0)
signal.signal(signal.SIGTERM, end)
open({str(tmp_path / "up")!r}, "w").close()
time.sleep(100)
"""
    ranks = start(code)
    wait_until(lambda: (tmp_path / "up").exists(), "the rank to start")
    ranks.signal(signal.SIGTERM)
    assert serve(ranks) == []
    assert capfd.readouterr().out == "child None\n"


def test_ranks_end_when_the_agent_is_killed(tmp_path):
    code = """
import sys, time
from train.cluster.node_ranks import NodeRanks, Order
order = Order([sys.executable, "-c", "import time; time.sleep(100)"], {}, 2, 0, 1, "127.0.0.1", 20001)
ranks = NodeRanks(order, None)
print(*[item.child.pid for item in ranks._processes], flush=True)
time.sleep(100)
"""
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    pids = [int(word) for word in agent.stdout.readline().split()]
    agent.kill()
    agent.wait()
    agent.stdout.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids),
               "the ranks to end")  # fmt: skip
    assert len(pids) == 2


def test_only_the_own_ranks_are_killed(start, monkeypatch):
    """Two runs under one launcher carry marks that begin alike."""
    monkeypatch.setenv(process.MARK, "outer")
    one, other = start("import time; time.sleep(100)"), start("import time; time.sleep(100)")
    one.kill()
    wait_until(lambda: one._processes[0].child.poll() is not None, "one to end")
    assert other._processes[0].child.poll() is None


# The output whose reader may stand still.


def test_output_never_waits_for_its_reader_and_comes_whole():
    reading, writing = os.pipe()
    output = SteadyOutput(writing)
    data = os.urandom(3 << 20)
    for start_at in range(0, len(data), 1 << 16):
        output.write(data[start_at : start_at + (1 << 16)])
    assert output.is_behind() and output.is_waiting() and not output.finish(0.1)
    got = b""
    while len(got) < len(data):
        got += os.read(reading, 1 << 16)
    assert got == data
    assert output.finish(10) and not output.is_behind() and not output.is_waiting()
    os.close(reading)
    output.write(b"nobody reads this")
    assert output.finish(10)
    os.close(writing)


def test_threads_are_those_of_the_cores_that_the_job_has_on_this_node(start, monkeypatch, capfd):
    """A job has four of 64 cores, or the launcher stands on a login node: its number is none of theirs."""
    code = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("train.cluster.node_ranks.os.sched_getaffinity", lambda _: set(range(7)))
    assert serve(start(code, processes=2)) == []
    assert capfd.readouterr().out.splitlines() == ["threads 3"] * 2
    monkeypatch.setattr("train.cluster.node_ranks.os.sched_getaffinity", lambda _: {0})
    assert serve(start(code, processes=2)) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert serve(start(code)) == []
    assert capfd.readouterr().out.splitlines() == ["threads 1", "threads 1", "threads 5"]
