"""The launcher's half of a run on several nodes: who has come, what they run, who failed first, when it is over.

    with Coordinator(job, launch_dir) as coordinator:
        process.run(transport, log=log, watcher=coordinator)
    result = coordinator.result(...)

One thread per node's connection; `is_over`, called by `process.run`, keeps the time. The transport (pdsh, srun, ...)
only starts the agents: it is killed when it outlives them, as it does when a node has gone away.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train import start_times
from train.cluster import network, preflight
from train.cluster.agent import INVITATION
from train.cluster.channel import Channel, ChannelError, welcome
from train.cluster.launchers import lost_host
from train.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER

_ECHO_S = 0.5  # a rank that dies takes others with it; a signal's death so shortly after an error's is the cause
_ECHO_GRACE_S = 3.0  # what the other ranks get to say their own last words
_TRANSPORT_GRACE_S = 5.0
_LONGEST_LINE = 1 << 16
_POLL_S = 0.2
_KILLED = 128
_ABORTED = 128 + signal.SIGABRT  # how NCCL and gloo end the ranks that a dead one has left alone


@dataclass(frozen=True)
class Job:
    """What runs on every node, and how patient the launcher is.

    Attributes:
        name: tells this job from others on the same nodes; the port follows from it.
        nodes: the nodes' names, the first one leads.
        processes: ranks on each.
        device: "cuda" or "cpu".
        argv, environment, working_dir: of every rank.
        secrets: variables that travel through the connection alone.
        starter, is_distributed, interface: as in `train.cluster.node_ranks.Order`.
        engine_dir: the engine's checkout, whose commit every node is asked for.
        paths: what every node must see; the launch folder always belongs to them.
        refuses_differences: whether a preflight that finds differences ends the run.
        is_local: whether this machine is the only node.
        is_scheduled: whether a scheduler has chosen the nodes.
        join_timeout_s, node_timeout_s, grace_s: see ClusterSettings.
    """

    name: str
    nodes: tuple[str, ...]
    processes: int
    device: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    working_dir: Path
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    starter: str = "own"
    is_distributed: bool = True
    interface: str | None = None
    engine_dir: Path | None = None
    paths: tuple[Path, ...] = ()
    refuses_differences: bool = True
    is_local: bool = False
    is_scheduled: bool = False
    join_timeout_s: float = 120.0
    node_timeout_s: float = 20.0
    grace_s: float = 60.0


@dataclass(frozen=True)
class Failure:
    """What ended a run.

    Attributes:
        text: the cause and the node, with the last lines where a rank has left some.
        exit_status: of the whole run.
    """

    text: str
    exit_status: int


@dataclass
class _Member:
    channel: Channel
    facts: dict[str, Any]
    clock_offset_s: float
    has_ended: bool = False


class Coordinator:
    """Serves the agents of one run, and watches their transport (a `train.process.Watcher`)."""

    def __init__(self, job: Job, launch_dir: Path) -> None:
        self._job = job
        self._launch_dir = launch_dir
        self._key = secrets.token_hex(32)
        self._lock = threading.RLock()
        self._members: dict[int, _Member] = {}
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._killed = False  # whether the failure is a death by a signal
        self._asked: int | None = None
        self._kill_at: float | None = None
        self._over_at: float | None = None
        self._give_up_at: float | None = None
        self._is_cut_short = False
        self._is_closed = False
        self._has_started = False
        # Nodes that a user has named are the user's to mend. Those of a scheduler may be others next time: a chain of
        # jobs, which 2 ends, goes on.
        self._node_fault = EXIT_FAILURE if job.is_scheduled else EXIT_USER
        self._began = time.monotonic()
        self._lines: collections.deque[str] = collections.deque(maxlen=200)
        self._rest = ""

    def __enter__(self) -> Coordinator:
        job = self._job
        host = "127.0.0.1" if job.is_local else ""
        self._listener = network.listen(f"{job.name} launcher {os.getpid()}", host=host, backlog=len(job.nodes) + 8)
        addresses = ["127.0.0.1"] if job.is_local else self._addresses()
        invitation = {
            "addresses": addresses,
            "port": self._listener.getsockname()[1],
            "key": self._key,
            "job": job.name,
            "nodes": list(job.nodes),
            "node_timeout_s": job.node_timeout_s,
            "interface": job.interface,
            "engine_dir": None if job.engine_dir is None else str(job.engine_dir),
            "paths": [str(path) for path in job.paths],
        }
        self._launch_dir.mkdir(parents=True, exist_ok=True)
        file = self._launch_dir / INVITATION
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(invitation, stream)
        self._began = time.monotonic()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        with self._lock:
            self._tell_over()
            for member in self._members.values():
                member.channel.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        (self._launch_dir / INVITATION).unlink(missing_ok=True)

    # What process.run asks and tells.

    def output(self, chunk: bytes) -> None:
        """Reads what the transport prints: it alone knows of a host that could not be reached."""
        *lines, self._rest = (self._rest[-_LONGEST_LINE:] + chunk.decode(errors="replace")).split("\n")
        self._lines.extend(lines)
        with self._lock:
            if self._over_at is not None or self._failure is not None:
                return
            for line in lines:
                found = lost_host(line)
                if found is None or self._has_ended(found.host):
                    continue
                has_come = self._index(found.host) in self._members
                # a host that could not be started is for the user to mend, whatever ssh's status was
                status = EXIT_FAILURE if has_come else self._node_fault
                self._fail(Failure(self._lost_text(found.host, found.status, has_come), status))
                return

    def signalled(self, number: int) -> None:
        """The launcher was asked to end: the ranks are, too. Asked again by Ctrl-C, it does not wait."""
        with self._lock:
            # not so for SIGTERM: schedulers send it to every process of a job, and the agents pass on what they get
            is_again = self._asked is not None and number == signal.SIGINT
            self._asked = self._asked or number
            if not self._has_started or is_again:
                self._end(0)
                return
            self._broadcast({"kind": "signal", "number": number})
            self._kill_at = self._kill_at or time.monotonic() + self._job.grace_s

    def is_over(self) -> bool:
        """Keeps the time; whether the transport is to be killed."""
        now = time.monotonic()
        with self._lock:
            if not self._has_started and self._failure is None and self._asked is None:
                self._check_joined(now)
            if self._kill_at is not None and now > self._kill_at:
                self._kill_at = None
                self._end(0)
            if self._over_at is None and self._all_ended():
                self._tell_over()
            return self._over_at is not None and now > self._over_at + _TRANSPORT_GRACE_S

    def result(self, transport_status: int) -> Failure | None:
        """How the run ended: None when it went well.

        Args:
            transport_status: the exit status of what started the agents.
        """
        with self._lock:
            if self._failure is not None:
                return self._failure
            if self._asked is not None and (self._is_cut_short or self._give_up_at is not None):
                return Failure("", _KILLED + self._asked)
            missing = [node for number, node in enumerate(self._job.nodes) if number not in self._members]
            if missing:
                return Failure(self._not_come_text(missing, f"status {transport_status}"), _status(transport_status))
            unended = [node for number, node in enumerate(self._job.nodes) if not self._members[number].has_ended]
            if unended:
                why = f"what had started them ended with status {transport_status}"
                text = f"{', '.join(unended)} broke off without a word: {why}."
                return Failure(f"{text} The same command goes on from the last checkpoint.", EXIT_FAILURE)
            return None

    # The agents' side.

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._is_closed:  # the run is over
                    return
                time.sleep(_POLL_S)  # a connection that broke off again, or no more open files for now
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            channel = welcome(connection, self._key)
            hello = channel.receive(self._job.join_timeout_s)  # it asks nvidia-smi and git first
        except (ChannelError, ValueError):
            connection.close()
            return
        try:
            self._follow(channel, hello)
        except Exception as error:  # this thread alone hears the node: without it the run would wait for ever
            traceback.print_exc()
            with self._lock:
                self._fail(Failure(f"{hello.get('node')} cannot be followed any more: {error!r}.", EXIT_FAILURE))

    def _follow(self, channel: Channel, hello: dict[str, Any]) -> None:
        """Listens to a node until it is gone."""
        number = self._join(channel, hello)
        if number is None:
            channel.close()
            return
        try:
            while True:
                message = channel.receive(self._job.node_timeout_s)
                with self._lock:
                    self._hear(number, message)
        except (ChannelError, ValueError) as error:
            with self._lock:
                if not self._members[number].has_ended and self._over_at is None:
                    self._members[number].has_ended = True
                    text = f"{self._job.nodes[number]} was lost: {error}. The same command goes on from the last"
                    self._fail(Failure(f"{text} checkpoint.", EXIT_FAILURE))

    def _join(self, channel: Channel, hello: dict[str, Any]) -> int | None:
        with self._lock:
            number = self._index(str(hello.get("node")))
            if number is None or number in self._members:
                who = f"{hello['facts'].get('host')} calls itself {hello.get('node')}"
                names = ", ".join(self._job.nodes)
                why = "which is no node of this run" if number is None else "which has come already"
                self._fail(Failure(f"{who}, {why} ({names}): name each node once, by its own name.", EXIT_USER))
                with contextlib.suppress(ChannelError):
                    channel.send({"kind": "over", "status": EXIT_USER})
                return None
            offset = float(hello["facts"]["clock"]) - time.time()
            self._members[number] = _Member(channel, hello["facts"], offset)
            if self._over_at is not None:
                with contextlib.suppress(ChannelError):
                    channel.send({"kind": "over", "status": EXIT_FAILURE})
            elif self._failure is not None or self._asked is not None:
                self._end(0)
            elif len(self._members) == len(self._job.nodes):
                self._start()
            return number

    def _hear(self, number: int, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "alive":
            with contextlib.suppress(ChannelError):
                self._members[number].channel.send({"kind": "alive"})
        elif kind == "ended":
            self._members[number].has_ended = True
        elif kind == "asked":
            if self._asked is None:
                self.signalled(int(message["number"]))
        elif kind == "failed" and self._asked is not None:
            self._is_cut_short = True
        elif kind == "failed":
            self._rank_failed(number, message)

    def _rank_failed(self, number: int, message: dict[str, Any]) -> None:
        status, rank = int(message["status"]), message["rank"]
        node = self._job.nodes[number]
        who = f"rank {rank} on {node}" if rank is not None else f"a rank on {node}"
        if len(self._job.nodes) == 1:
            who = f"rank {rank}" if rank is not None else "a rank"
        last = "\n".join(f"    {line}" for line in message["lines"])
        text = f"{who} {_how(status)}. Its last lines:\n{last}" if last else f"{who} {_how(status)}, without a word."
        self._fail(Failure(text, status), is_killed=status > _KILLED and status != _ABORTED)

    def _start(self) -> None:
        """All are here: compares them, then tells each what to run."""
        job = self._job
        told = {
            node: {**self._members[number].facts, "clock": self._members[number].clock_offset_s}
            for number, node in enumerate(job.nodes)
        }
        report = preflight.compare(told, processes=job.processes, device=job.device)
        if report.table and len(job.nodes) > 1:
            print(f"nodes differ:\n{report.table}", flush=True)
        for note in report.notes if len(job.nodes) > 1 else ():
            print(f"note: {note}", flush=True)
        if report.problems:
            if job.refuses_differences:
                told_ = "\n".join(report.problems)
                self._fail(Failure(f"{told_}\n--preflight warn starts all the same.", self._node_fault))
                return
            for problem in report.problems:
                print(f"warning: {problem}", flush=True)
        master = self._members[0]
        addresses = [member.channel.peer for _, member in sorted(self._members.items())]
        order = {
            "argv": list(job.argv),
            "environment": {**job.environment, **job.secrets, start_times.BEGAN_VARIABLE: start_times.own_birth()},
            "processes": job.processes,
            "nodes": len(job.nodes),
            "master_address": master.facts.get("interface_address") or addresses[0],
            "master_port": master.facts["free_port"],
            "starter": job.starter,
            "is_distributed": job.is_distributed,
            "interface": job.interface,
            "working_dir": str(job.working_dir),
        }
        self._has_started = True
        for number, member in sorted(self._members.items()):
            peer = None if len(addresses) == 1 else addresses[1 if number == 0 else 0]
            message = {"kind": "start", "order": {**order, "node_rank": number, "peer": peer}}
            with contextlib.suppress(ChannelError):  # its own thread tells that it is lost
                member.channel.send(message)

    def _fail(self, failure: Failure, *, is_killed: bool = False) -> None:
        """Keeps the first failure, and ends the run everywhere."""
        now = time.monotonic()
        is_cause = is_killed and not self._killed and now - self._failed_at < _ECHO_S
        if self._failure is None or is_cause:
            self._failure, self._killed = failure, is_killed
            self._failed_at = self._failed_at or now
        self._end(_ECHO_GRACE_S)

    def _end(self, grace_s: float) -> None:
        self._broadcast({"kind": "end", "grace_s": grace_s})
        # an agent that is cut off cannot say that it has ended; it ends by itself
        self._give_up_at = self._give_up_at or time.monotonic() + grace_s + _TRANSPORT_GRACE_S

    def _all_ended(self) -> bool:
        """Whether nothing runs any more: on all nodes, or, when the run is being ended, on those that have come."""
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            return True
        is_complete = len(self._members) == len(self._job.nodes) or self._give_up_at is not None
        return is_complete and all(member.has_ended for member in self._members.values())

    def _tell_over(self) -> None:
        if self._over_at is None:
            self._over_at = time.monotonic()
        status = self._failure.exit_status if self._failure else _KILLED + self._asked if self._asked else EXIT_OK
        self._broadcast({"kind": "over", "status": status})

    def _broadcast(self, message: dict[str, Any]) -> None:
        for member in self._members.values():
            with contextlib.suppress(ChannelError):
                member.channel.send(message)

    def _check_joined(self, now: float) -> None:
        if now - self._began > self._job.join_timeout_s:
            missing = [node for number, node in enumerate(self._job.nodes) if number not in self._members]
            waited = f"no answer in {self._job.join_timeout_s:g} s (--join_timeout_s)"
            self._fail(Failure(self._not_come_text(missing, waited), EXIT_FAILURE))

    # Words.

    def _index(self, name: str) -> int | None:
        """The node that goes by this name or number."""
        nodes = self._job.nodes
        if name in nodes:
            return nodes.index(name)
        if name.isdigit() and int(name) < len(nodes):
            return int(name)
        short = [node.partition(".")[0] for node in nodes]
        return short.index(name.partition(".")[0]) if short.count(name.partition(".")[0]) == 1 else None

    def _has_ended(self, host: str) -> bool:
        number = self._index(host)
        return number is None or (number in self._members and self._members[number].has_ended)

    def _lost_text(self, host: str, status: int, has_come: bool) -> str:
        said = self._words_of([host])
        if has_come:
            return f"{host} was lost: what reached it ended with status {status}.{said}"
        hint = f" Does it see {self._launch_dir}? All nodes must share it." if status == 127 else ""
        return f"{host} could not be started (status {status}).{hint}{said}"

    def _not_come_text(self, missing: list[str], why: str) -> str:
        names = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return f"{names} did not come: {why}.{self._words_of(missing)}"

    def _words_of(self, hosts: list[str]) -> str:
        """What the transport printed about these hosts, or its last lines."""
        lines = [line for line in self._lines if line.strip() and "Permanently added" not in line]
        about = [line for line in lines if any(host in line for host in hosts)] or lines
        return "".join(f"\n    {line}" for line in about[-6:])

    def _addresses(self) -> list[str]:
        job = self._job
        chosen = network.interface_address(job.interface) if job.interface else None
        return [chosen] if chosen else network.own_addresses(job.nodes)


def _status(status: int) -> int:
    return status if 0 < status < 256 else EXIT_FAILURE


def _how(status: int) -> str:
    if status <= _KILLED:
        return f"ended with status {status}"
    try:
        name = signal.Signals(status - _KILLED).name
    except ValueError:
        name = f"signal {status - _KILLED}"
    hint = "; if nobody did that, the node was out of memory (dmesg on it tells)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
