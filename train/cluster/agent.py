"""What runs once on each node: it reports for duty, starts the node's ranks, watches them, and ends with the run.

    bash RUN/launch/node.sh --node node2      ->      python -m train.cluster.agent --launch_dir RUN/launch --node node2

The launcher's half is `train.cluster.coordinator`. Whoever dies - a rank, an agent, the launcher, the network between
them - the others know within seconds and nothing is left running.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.cluster import network
from train.cluster.channel import Channel, ChannelError, connect
from train.cluster.node_ranks import NodeRanks, Order
from train.errors import EXIT_FAILURE, EXIT_USER

INVITATION = "invitation.json"
_ALIVE_EVERY_S = 1.0
_POLL_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Serves one run on this node; returns the run's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launch_dir", type=Path, required=True)
    parser.add_argument("--node", help="this node's name or number among the run's nodes")
    own = parser.parse_args(argv)
    name = os.uname().nodename
    try:
        invitation = json.loads((own.launch_dir / INVITATION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {name}: {own.launch_dir / INVITATION}: {error}: the run has ended, or its folder is not shared")
        return EXIT_USER
    try:
        channel = connect(invitation["addresses"], invitation["port"], invitation["key"])
    except ChannelError as error:
        print(f"error: {name}: {error}: open the launcher's ports to this node, or set --network_interface", flush=True)
        return EXIT_FAILURE
    agent = _Agent(channel, float(invitation["node_timeout_s"]))
    return agent.serve(own.node or _own_name(invitation["nodes"]), invitation)


def _own_name(nodes: Sequence[str]) -> str:
    """This node's name among the run's nodes, or its number as mpirun tells it, where its own name is none of them.

    Numbers come last: mpirun and srun need not count the nodes in the order in which they were given.
    """
    name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    known = {node.partition(".")[0] for node in nodes}
    return name if name.partition(".")[0] in known else os.environ.get("OMPI_COMM_WORLD_RANK", name)


class _Agent:
    def __init__(self, channel: Channel, node_timeout_s: float) -> None:
        self._channel = channel
        self._node_timeout_s = node_timeout_s
        self._signals: list[int] = []
        self._ranks: NodeRanks | None = None
        self._has_ended = False
        self._heard = self._told = time.monotonic()

    def serve(self, node: str, invitation: dict[str, Any]) -> int:
        from train.cluster import facts

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        status = EXIT_FAILURE
        try:
            self._channel.send({"kind": "hello", "node": node, "facts": facts.collect(invitation)})
            self._heard = time.monotonic()  # nvidia-smi may take longer than a node may be silent
            answer = None
            while answer is None:
                answer = self._turn()
            status = answer
        except ChannelError as error:
            print(f"error: {os.uname().nodename}: the launcher is gone ({error})", flush=True)
        finally:
            if self._ranks is not None:
                self._ranks.close()
        return status

    def _turn(self) -> int | None:
        """One round of listening and telling; the run's exit status once it is over."""
        ranks = self._ranks
        sources: list[Any] = [self._channel, *(ranks.pipes() if ranks is not None else ())]
        ready, _, _ = select.select(sources, [], [], _POLL_S)
        if ranks is not None:
            ranks.copy_output(ready)
        if self._channel in ready:
            message = self._channel.receive(self._node_timeout_s)
            self._heard = time.monotonic()
            if message["kind"] == "over":
                return int(message["status"])
            self._obey(message)
        now = time.monotonic()
        if now - self._heard > self._node_timeout_s:
            raise ChannelError(f"no sign for {self._node_timeout_s:g} s")
        if now - self._told > min(_ALIVE_EVERY_S, self._node_timeout_s / 4):
            self._told = now
            self._channel.send({"kind": "alive"})
        while self._signals:
            number = self._signals.pop(0)
            # a session that ends on a node asks like a scheduler does; ranks know SIGTERM, and save
            number = signal.SIGTERM if number == signal.SIGHUP else number
            self._channel.send({"kind": "asked", "number": number})
        if self._ranks is not None:
            is_over = not self._ranks.are_running()  # asked first: a rank may die between the two questions
            for failure in self._ranks.new_failures():
                self._channel.send({"kind": "failed", **failure})
            if is_over and not self._has_ended:
                self._has_ended = True
                self._channel.send({"kind": "ended"})
        return None

    def _obey(self, message: dict[str, Any]) -> None:
        if message["kind"] == "start":
            self._start(Order(**message["order"]))
        elif message["kind"] == "signal" and self._ranks is not None:
            self._ranks.signal(message["number"])
        elif message["kind"] == "end":
            if self._ranks is not None:
                self._ranks.end_within(message["grace_s"])
            else:
                self._channel.send({"kind": "ended"})

    def _start(self, order: Order) -> None:
        try:
            self._ranks = NodeRanks(order, _interface(order))
        except OSError as error:  # no such program or folder on this node, or no more processes
            self._has_ended = True
            rank = order.node_rank * order.processes
            self._channel.send({"kind": "failed", "rank": rank, "status": 127, "lines": [str(error)]})
            self._channel.send({"kind": "ended"})


def _interface(order: Order) -> str | None:
    """The interface of the ranks' traffic, by this node's own name for it."""
    if order.interface is not None:
        return order.interface
    return None if order.peer is None else network.interface_to(order.peer)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    raise SystemExit(main())
