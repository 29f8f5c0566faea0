"""The launcher's half, spoken to by agents that the test plays: who may come, who is to blame, when it is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_cluster import wait_until  # type: ignore[import-not-found]

from train import start_times
from train.cluster import coordinator as coordinators
from train.cluster.channel import Channel, ChannelError, connect
from train.cluster.coordinator import Coordinator, Failure, Job

FACTS = {"host": "box", "free_port": 20001, "interface_address": None}


class Play:
    """A coordinator, and agents of it."""

    def __init__(self, folder: Path, nodes: tuple[str, ...] = ("node1", "node2"), **job: Any) -> None:
        given = {"processes": 1, "device": "cpu", "argv": ("python",), "environment": {"A": "1"}, "is_local": True}
        self.coordinator = Coordinator(Job("job", nodes, **{**given, **job}, working_dir=folder), folder / "launch")
        self.folder = folder
        self.agents: list[Channel] = []

    def __enter__(self) -> Play:
        self.coordinator.__enter__()
        self.invitation = json.loads((self.folder / "launch" / "invitation.json").read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self.coordinator.__exit__()
        for agent in self.agents:
            agent.close()

    def come(self, node: str, **facts: Any) -> Channel:
        """An agent that has said hello."""
        agent = connect(self.invitation["addresses"], self.invitation["port"], self.invitation["key"])
        self.agents.append(agent)
        agent.send({"kind": "hello", "node": node, "facts": {**FACTS, "clock": time.time(), **facts}})
        return agent

    def started(self, *nodes: str) -> tuple[Channel, ...]:
        """Agents of which each was told what to run."""
        agents = tuple(self.come(node) for node in nodes)
        for agent in agents:
            assert hear(agent, "start")
        return agents

    def over(self) -> Failure | None:
        """Keeps the time until the run is over; how it ended."""
        wait_until(lambda: self.coordinator.is_over() or self.coordinator._over_at, "the end", 15)
        return self.coordinator.result(0)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    with Play(tmp_path) as playing:
        yield playing


def hear(agent: Channel, kind: str) -> dict[str, Any]:
    """The next message of a kind; others before it are passed over."""
    while (message := agent.receive(10))["kind"] != kind:
        pass
    return message


def ended(*agents: Channel) -> None:
    for agent in agents:
        agent.send({"kind": "ended"})


def failed(agent: Channel, rank: int | None, status: int, *lines: str) -> None:
    agent.send({"kind": "failed", "rank": rank, "status": status, "lines": list(lines)})


def test_each_node_is_told_its_place_once_all_have_come(play):
    second = play.come("node2", free_port=20002)
    first = play.come("node1")
    orders = [hear(agent, "start")["order"] for agent in (first, second)]
    assert [(order["node_rank"], order["peer"]) for order in orders] == [(0, "127.0.0.1"), (1, "127.0.0.1")]
    for order in orders:
        assert (order["master_address"], order["master_port"], order["nodes"]) == ("127.0.0.1", 20001, 2)
        environment = dict(order["environment"])
        assert 0 < time.time() - float(environment.pop(start_times.BEGAN_VARIABLE)) < 24 * 3600
        assert (order["argv"], environment) == (["python"], {"A": "1"})
    ended(first, second)
    assert play.over() is None
    assert hear(first, "over")["status"] == hear(second, "over")["status"] == 0


def test_the_address_of_the_wanted_interface_is_the_masters(play):
    agents = [play.come("node1", interface_address="10.9.9.9"), play.come("node2")]
    assert {hear(agent, "start")["order"]["master_address"] for agent in agents} == {"10.9.9.9"}


@pytest.mark.parametrize("name", ["1", "node2.example.org", "node2"])
def test_a_node_goes_by_its_name_its_short_name_or_its_number(play, name):
    play.come(name)
    assert hear(play.come("node1"), "start")["order"]["node_rank"] == 0


def test_a_short_name_that_two_nodes_share_names_neither(tmp_path):
    with Play(tmp_path, ("a.one", "a.two")) as play:
        play.come("a")
        failure = play.over()
        assert failure is not None and failure.exit_status == 2
        assert "box calls itself a, which is no node of this run (a.one, a.two)" in failure.text


def test_the_same_node_twice_ends_the_run_and_the_second_is_told(play):
    first = play.come("node1")
    wait_until(lambda: play.coordinator._members, "the first")
    again = play.come("0")
    assert hear(again, "over")["status"] == 2
    assert hear(first, "end")
    ended(first)
    failure = play.over()
    assert failure is not None and "calls itself 0, which has come already" in failure.text


def test_the_first_failure_is_the_cause(play):
    first, second = play.started("node1", "node2")
    failed(second, 1, 3, "the cause")
    wait_until(lambda: play.coordinator._failure, "the failure to be heard")
    failed(first, 0, 1, "connection reset by peer")
    assert hear(first, "end")["grace_s"] > 0
    ended(first, second)
    assert play.over() == Failure("rank 1 on node2 ended with status 3. Its last lines:\n    the cause", 3)
    assert hear(first, "over")["status"] == 3


def test_a_kill_told_just_after_the_errors_that_it_made_is_the_cause(play):
    first, second = play.started("node1", "node2")
    failed(first, 0, 1, "connection reset by peer")
    failed(second, 1, 137)
    wait_until(lambda: play.coordinator._killed, "the second failure to be heard")
    ended(first, second)
    failure = play.over()
    assert failure is not None and failure.exit_status == 137
    assert failure.text.startswith("rank 1 on node2 was killed by SIGKILL") and failure.text.endswith("without a word.")


def test_an_abort_is_no_cause_of_an_error_told_before(play):
    """NCCL's watchdog aborts the ranks that a failed one has left alone."""
    first, second = play.started("node1", "node2")
    failed(first, 0, 1, "ValueError: the cause")
    wait_until(lambda: play.coordinator._failure, "the failure to be heard")
    failed(second, 1, 134, "terminate called")
    ended(first, second)
    failure = play.over()
    assert failure is not None and "the cause" in failure.text and failure.exit_status == 1


def test_words_of_a_death_by_signal(play):
    first, second = play.started("node1", "node2")
    failed(first, None, 139)
    ended(first, second)
    assert play.over() == Failure("a rank on node1 was killed by SIGSEGV, without a word.", 139)


def test_a_lost_connection_ends_the_run(play):
    first, second = play.started("node1", "node2")
    second.close()
    assert hear(first, "end")
    ended(first)
    failure = play.over()
    assert failure is not None and failure.exit_status == 1
    assert (
        failure.text == "node2 was lost: the connection was closed. The same command goes on from the last checkpoint."
    )


def test_silence_ends_the_run_after_the_time_out(tmp_path):
    with Play(tmp_path, node_timeout_s=0.5) as play:
        first, second = play.started("node1", "node2")
        wait_until(lambda: [first.send({"kind": "alive"}), play.coordinator._failure][1], "the loss")
        ended(first)
        failure = play.over()
        assert failure is not None and failure.text.startswith("node2 was lost: no sign for 0.5 s.")
        assert hear(second, "over")["status"] == 1


def test_signs_of_life_are_answered(play):
    agent = play.come("node1")
    agent.send({"kind": "alive"})
    assert hear(agent, "alive")


def test_a_node_that_takes_long_to_look_at_itself_is_waited_for(tmp_path):
    """nvidia-smi without its persistence daemon takes longer than the time in which a running node must be heard."""
    with Play(tmp_path, ("node1",), node_timeout_s=0.3) as play:
        agent = connect(play.invitation["addresses"], play.invitation["port"], play.invitation["key"])
        play.agents.append(agent)
        time.sleep(1)
        agent.send({"kind": "hello", "node": "node1", "facts": {**FACTS, "clock": time.time()}})
        assert hear(agent, "start")


def test_nobody_comes(tmp_path):
    with Play(tmp_path, tuple(f"node{number}" for number in range(12)), join_timeout_s=0.2) as play:
        failure = play.over()
        assert failure is not None and failure.exit_status == 1
        assert failure.text.startswith(
            f"{', '.join(f'node{n}' for n in range(8))} and 4 more did not come: no answer in"
        )


def test_a_late_agent_learns_that_the_run_is_over(tmp_path):
    with Play(tmp_path, join_timeout_s=0.2) as play:
        assert play.over() is not None
        assert hear(play.come("node1"), "over")["status"] == 1


def test_strangers_hold_nobody_up(play):
    address = (play.invitation["addresses"][0], play.invitation["port"])
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(20)]
        for stranger in strangers[::2]:
            stranger.sendall(os.urandom(64))
        agents = play.started("node1", "node2")
        ended(*agents)
        assert play.over() is None


def test_somebody_without_the_key_is_not_counted(play):
    with pytest.raises(ChannelError):
        connect(play.invitation["addresses"], play.invitation["port"], "0" * 64)
    assert play.coordinator._members == {}


def test_sigterm_goes_to_all_ranks_and_what_they_saved_counts_as_interrupted(play):
    first, second = play.started("node1", "node2")
    play.coordinator.signalled(signal.SIGTERM)
    assert hear(first, "signal")["number"] == hear(second, "signal")["number"] == signal.SIGTERM
    failed(first, 0, 130)
    ended(first, second)
    assert play.over() == Failure("", 143)


def test_sigterm_twice_does_not_cut_a_save_short(play):
    """Schedulers send it to every process of a job: the launcher gets it, and hears of the agents' too."""
    first, _ = play.started("node1", "node2")
    play.coordinator.signalled(signal.SIGTERM)
    play.coordinator.signalled(signal.SIGTERM)
    first.send({"kind": "asked", "number": signal.SIGTERM})
    first.send({"kind": "alive"})
    assert hear(first, "alive") and play.coordinator._give_up_at is None
    play.coordinator.signalled(signal.SIGINT)
    assert hear(first, "end")["grace_s"] == 0


def test_after_the_grace_all_are_killed(tmp_path):
    with Play(tmp_path, grace_s=0.2) as play:
        first, second = play.started("node1", "node2")
        play.coordinator.signalled(signal.SIGTERM)
        wait_until(lambda: play.coordinator.is_over() or play.coordinator._give_up_at, "the grace to end")
        assert hear(first, "end")["grace_s"] == hear(second, "end")["grace_s"] == 0
        ended(first, second)
        assert play.over() == Failure("", 143)


def test_a_node_that_was_told_to_end_and_says_nothing_is_not_waited_for(play, monkeypatch):
    monkeypatch.setattr(coordinators, "_TRANSPORT_GRACE_S", 0.2)
    monkeypatch.setattr(coordinators, "_ECHO_GRACE_S", 0.2)
    first, _ = play.started("node1", "node2")
    failed(first, 0, 5)
    assert play.over() is not None  # neither has said that it has ended
    wait_until(play.coordinator.is_over, "the transport's time to be up")


def test_what_the_transport_says_of_a_host_ends_the_run(play):
    first = play.come("node1")
    play.coordinator.output(b"node2: ssh: connect to host node2 port 22: Connection refused\npdsh@node1: nod")
    play.coordinator.output(b"e2: ssh exited with exit code 255\n")
    assert hear(first, "end")
    ended(first)
    failure = play.over()
    assert failure is not None and failure.exit_status == 2
    assert failure.text.startswith("node2 could not be started (status 255).")
    assert "Connection refused" in failure.text


def test_a_shell_that_finds_no_script_hints_at_the_folder(play):
    play.coordinator.output(b"pdsh@node1: node2: ssh exited with exit code 127\n")
    failure = play.over()
    assert failure is not None and f"Does it see {play.folder}/launch? All nodes must share it." in failure.text


def test_an_end_of_the_transport_for_a_node_that_has_ended_is_nothing(play):
    first, second = play.started("node1", "node2")
    ended(first, second)
    wait_until(lambda: play.coordinator._has_ended("node2"), "the end to be heard")
    play.coordinator.output(b"pdsh@node1: node2: ssh exited with exit code 1\n")
    assert play.over() is None


def test_output_without_a_line_end_is_not_kept_for_ever(play):
    for _ in range(100):
        play.coordinator.output(b"x" * 65536)
    assert len(play.coordinator._rest) < 1 << 18


def test_a_transport_that_ends_under_a_running_run(play):
    play.started("node1", "node2")
    text = "node1, node2 broke off without a word: what had started them ended with status 137."
    assert play.coordinator.result(137) == Failure(f"{text} The same command goes on from the last checkpoint.", 1)


def test_nothing_listens_afterwards_and_no_secret_shows_in_what_is_printed(tmp_path):
    with Play(tmp_path, secrets={"HF_TOKEN": "planted"}) as play:
        address = (play.invitation["addresses"][0], play.invitation["port"])
        assert "planted" not in repr(play.coordinator._job)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5).close()
    assert list((tmp_path / "launch").iterdir()) == []


def test_an_old_invitation_is_replaced(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "invitation.json").write_text("{}")
    with Play(tmp_path) as play:
        assert (tmp_path / "launch" / "invitation.json").stat().st_mode & 0o777 == 0o600
        assert len(play.invitation["key"]) == 64


def test_a_connection_that_breaks_off_before_it_is_taken_keeps_nobody_out(play, monkeypatch):
    """accept() passes on what became of a connection, and tells of a lack of open files."""
    listener, errors = play.coordinator._listener, [ConnectionAbortedError(103, "aborted"), OSError(24, "open files")]

    class Weak:
        def accept(self) -> Any:
            connection = listener.accept()
            if errors:
                error = errors.pop()  # before the other side can see that the connection is closed
                connection[0].close()
                raise error
            return connection

        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

    monkeypatch.setattr(play.coordinator, "_listener", Weak())
    for _ in range(3):  # the first one is taken by the listener itself, which waits in accept() already
        with contextlib.suppress(ChannelError):
            connect(play.invitation["addresses"], play.invitation["port"], play.invitation["key"]).close()
    assert errors == []
    ended(*play.started("node1", "node2"))
    assert play.over() is None


def test_an_error_of_the_launchers_own_in_a_nodes_thread_ends_the_run(play, monkeypatch, capsys):
    def compare(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("the terminal is gone")

    monkeypatch.setattr(coordinators.preflight, "compare", compare)
    first, second = play.come("node1"), play.come("node2")
    assert hear(first, "end") and hear(second, "end")
    failure = play.over()
    assert failure is not None and failure.exit_status == 1
    assert "cannot be followed any more: BrokenPipeError('the terminal is gone')." in failure.text
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("is_scheduled", "status"), [(False, 2), (True, 1)])
def test_a_bad_node_of_a_scheduler_ends_no_chain_of_jobs(tmp_path, is_scheduled, status):
    """The next job of a chain may be given other nodes, and 2 would end the chain."""
    with Play(tmp_path, is_scheduled=is_scheduled) as play:
        first = play.come("node1")
        play.coordinator.output(b"pdsh@node1: node2: ssh exited with exit code 255\n")
        assert hear(first, "end")
        ended(first)
        failure = play.over()
    assert failure is not None and failure.exit_status == status


def test_the_launcher_listens_where_an_administrator_can_open_a_port(tmp_path):
    with Play(tmp_path) as play:
        assert 20000 <= play.invitation["port"] < 32000
