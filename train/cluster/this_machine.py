"""Which of a run's hosts is the machine that asks: hostfiles use short names, long names, addresses and aliases."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from train.cluster.nodes import short


def name_among(hosts: Sequence[str], *, own_name: str | None = None) -> str | None:
    """The name among `hosts` that means this machine, or None.

    Args:
        hosts: host names or addresses.
        own_name: how the scheduler calls this machine, when it says so.
    """
    if own_name in hosts:
        return own_name
    named = own_name or socket.gethostname()
    for host in hosts:
        if _same_name(host, named):
            return host
    if own_name:  # a scheduler that names this machine leaves nothing to be looked up
        return None
    return next((host for host in hosts if _has_address_here(host)), None)


def _same_name(host: str, other: str) -> bool:
    if "." in host and "." in other:  # node1.east and node1.west are two
        return host.lower() == other.lower()
    return short(host) == short(other)


def _has_address_here(host: str) -> bool:
    """Whether `host` resolves to an address of this machine, which is one that a socket can be bound to."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind((address[0], 0))
            return True
    return False
