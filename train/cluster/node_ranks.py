"""The ranks of one node: started, watched, ended. `train.cluster.agent` serves the launcher with it."""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from train import process
from train.cluster.steady_output import SteadyOutput

_TAIL_LINES = 25
_LAST_WORDS_S = 2.0
_MOMENT_S = 0.05
_LONGEST_LINE_BYTES = 1 << 16  # what is longer is cut: a rank may never end a line
_PIPE_READS = 16  # a pipe holds 1 MiB at most, 64 KiB as a rule
_OTHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_")  # what mpirun says of its own processes; the ranks are others


@dataclass(frozen=True)
class Order:
    """What a node is told to start.

    Attributes:
        argv: a rank's program and arguments.
        environment: variables of every rank, secrets among them.
        processes: ranks on this node.
        node_rank: this node's number.
        nodes: how many nodes there are.
        master_address: where rank 0 listens.
        master_port: its port.
        starter: "own", "torchrun" or "deepspeed".
        is_distributed: False for one plain process that knows of no ranks.
        peer: another node, to whom the route shows the interface; None on a single node.
        interface: the interface to use instead.
        working_dir: where ranks start.
    """

    argv: list[str]
    environment: dict[str, str]
    processes: int
    node_rank: int
    nodes: int
    master_address: str
    master_port: int
    starter: str = "own"
    is_distributed: bool = True
    peer: str | None = None
    interface: str | None = None
    working_dir: str | None = None


def build_argv(order: Order) -> list[str]:
    """What the node starts: each rank's own command, or one launcher that starts them all."""
    if order.starter == "own" or not order.is_distributed:
        return list(order.argv)
    python, *rest = order.argv
    place = ["--master_addr", order.master_address, "--master_port", str(order.master_port)]
    if order.starter == "torchrun":
        count = ["--nnodes", str(order.nodes), "--node_rank", str(order.node_rank)]
        count += ["--nproc_per_node", str(order.processes)]
        return [python, "-m", "torch.distributed.run", *count, *place, *rest]
    # it numbers the GPUs anew; those that a user has chosen stay chosen
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = [int(word) for word in visible] if all(word.isdigit() for word in visible) else range(order.processes)
    world = {str(node): list(devices)[: order.processes] for node in range(order.nodes)}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    words = [python, "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={order.node_rank}"]
    return [*words, *place, "--no_local_rank", "--module", *rest[1:]]  # rest begins with -m


def build_environment(
    order: Order, local_rank: int, interface: str | None, inherited: Mapping[str, str]
) -> dict[str, str]:
    """A rank's whole environment: the node's, the run's, and what PyTorch and DeepSpeed read, as torchrun sets it.

    Args:
        order: what the node was told to start.
        local_rank: the rank's number on this node.
        interface: the interface that leads to the other nodes, where it is known; what the user has set stands.
        inherited: the node's own variables.
    """
    environment = {name: value for name, value in inherited.items() if not name.startswith(_OTHERS)}
    environment |= order.environment
    if order.nodes == 1 and sys.platform == "linux":
        interface = "lo"  # a host name that leads nowhere does no harm then
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        environment.setdefault("TP_SOCKET_IFNAME", interface)
        if order.nodes > 1:
            environment.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # exactly this one, not all that begin so
    if not order.is_distributed or order.starter != "own":
        return environment
    rank = order.node_rank * order.processes + local_rank
    return environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(order.nodes * order.processes),
        "LOCAL_WORLD_SIZE": str(order.processes),
        "GROUP_RANK": str(order.node_rank),
        "MASTER_ADDR": order.master_address,
        "MASTER_PORT": str(order.master_port),
    }


@dataclass
class _Process:
    child: process.Child
    local_rank: int
    rest: bytes = b""
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_TAIL_LINES))
    is_told: bool = False


class NodeRanks:
    """The running ranks of this node."""

    def __init__(self, order: Order, interface: str | None) -> None:
        self._order = order
        self._kill_at: float | None = None
        self._dead_since: float | None = None
        self._output = SteadyOutput(1)
        self._mark = f"{os.environ.get(process.MARK, '')}/{uuid.uuid4()}"
        inherited = {"OMP_NUM_THREADS": str(_threads(order.processes)), **os.environ, process.MARK: self._mark}
        count = order.processes if order.starter == "own" and order.is_distributed else 1
        self._processes: list[_Process] = []
        try:
            for local in range(count):
                environment = build_environment(order, local, interface, inherited)
                child = process.start(build_argv(order), environment, order.working_dir)
                self._processes.append(_Process(child, local))
        except OSError:
            self.kill()
            raise

    def pipes(self) -> list[Any]:
        """What the ranks print to, while it is open and somebody takes what they print."""
        if self._output.is_behind() and not self._output.finish(_MOMENT_S):
            return []
        return [item.child.stdout for item in self._processes if item.child.stdout and not item.child.stdout.closed]

    def copy_output(self, ready: Collection[Any]) -> None:
        """Copies what ranks have printed to this process's own output, whole lines or states of a progress bar."""
        for item in self._processes:
            pipe = item.child.stdout
            if pipe is None or pipe.closed or pipe not in ready:
                continue
            chunk = os.read(pipe.fileno(), 65536)
            data = item.rest + chunk
            size = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            if not chunk:
                pipe.close()
                data += b"\n" if data else b""
            if not chunk or len(data) - size > _LONGEST_LINE_BYTES:
                size = len(data)
            lines, item.rest = data[:size], data[size:]
            item.tail.extend(_readable(lines))
            self._output.write(lines)

    def new_failures(self) -> Iterator[dict[str, Any]]:
        """Ranks that have ended with an error and were not told yet: rank, status as a shell has it, last lines."""
        for item in self._processes:
            status = item.child.poll()
            if not status or item.is_told:
                continue
            item.is_told = True
            self._drain(item)
            rank = self._order.node_rank * self._order.processes + item.local_rank
            yield {
                "rank": rank if self._order.starter == "own" else None,
                "status": status if status > 0 else 128 - status,
                "lines": [*item.tail, *_readable(item.rest)],
            }

    def are_running(self) -> bool:
        """Whether a rank lives or has something left to print; kills those whose time has come."""
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self.kill()
        if any(item.child.poll() is None for item in self._processes):
            return True
        if self._dead_since is None:
            self._dead_since = now
            self.kill()  # what ranks leave behind
        if self._kill_at is None and self._output.is_waiting():  # the reader stands still: nothing is lost by waiting
            self._dead_since = now
            return True
        if now - self._dead_since > _LAST_WORDS_S:  # somebody else holds the pipe open
            return False
        return bool(self.pipes())

    def signal(self, number: int) -> None:
        """Passes a signal to every rank that lives, not to what the ranks have started."""
        for item in self._processes:
            if item.child.poll() is None:
                item.child.send_signal(number)

    def end_within(self, grace_s: float) -> None:
        """Lets the ranks end by themselves for a moment, then kills them."""
        self._kill_at = min(self._kill_at or float("inf"), time.monotonic() + grace_s)

    def kill(self) -> None:
        """Kills the ranks and what they have started, also in sessions of its own."""
        for item in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(item.child.pid, signal.SIGKILL)
        process.kill_marked(self._mark)

    def close(self) -> None:
        """Kills what is left, and waits for a moment until what was printed is told."""
        self.kill()
        self._output.finish(_LAST_WORDS_S)

    def _drain(self, item: _Process) -> None:
        """Takes what a dead rank has left in its pipe; a child of it may hold the other end open."""
        pipe = item.child.stdout
        if pipe is None or pipe.closed:
            return
        os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(_PIPE_READS):  # a child of it may go on printing, too
                if not pipe.closed:
                    self.copy_output([pipe])


def _threads(processes: int) -> int:
    """OpenMP threads for each of this node's ranks: all cores for each would be too many, and one would crawl.

    Counted are the cores that the job was given here: a few of the node's, maybe, and other ones than the launcher's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def _readable(lines: bytes) -> list[str]:
    return [line for line in lines.decode(errors="replace").splitlines() if line.strip()]
