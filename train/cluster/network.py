"""Addresses, interfaces and ports, asked of the kernel instead of guessed: eth0 here may be eno1 there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterable
from contextlib import closing

_ATTEMPTS = 5
_PORTS = range(20000, 32000)  # below what the kernel hands out for outgoing connections


def source_address(peer: str) -> str | None:
    """This machine's address on the route to `peer`, a name or an address; None when there is no route or name."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with closing(socket.socket(family, kind)) as probe:
            probe.connect(address)  # of a datagram socket: picks a route and sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address; None when none has."""
    import psutil

    for name, found in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == address for item in found):
            return name
    return None


def interface_address(interface: str) -> str | None:
    """The IPv4 address of an interface; None when it has none or is not there."""
    import psutil

    found = psutil.net_if_addrs().get(interface, [])
    return next((item.address for item in found if item.family == socket.AF_INET), None)


def interface_to(peer: str) -> str | None:
    """The interface that leads to `peer`; None when nothing does."""
    address = source_address(peer)
    return None if address is None else interface_of(address)


def own_addresses(peers: Iterable[str]) -> list[str]:
    """Where `peers` may reach this machine: the addresses on the routes to them first, then all others it has.

    Those of the loopback come last. Debian's /etc/hosts gives a machine's own name 127.0.1.1, and one of the peers may
    be this machine: it would show itself there, and be what the others take for the master's address.
    """
    import psutil

    routed = [address for peer in peers if (address := source_address(peer)) is not None]
    others = [
        item.address for found in psutil.net_if_addrs().values() for item in found if item.family == socket.AF_INET
    ]
    return sorted(dict.fromkeys([*routed, *others]), key=_is_loopback)


def _is_loopback(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def network_of(address: str) -> str | None:
    """The network of one of this machine's addresses as 10.1.2.0/24; None when no interface has the address."""
    import ipaddress

    import psutil

    for found in psutil.net_if_addrs().values():
        for item in found:
            if item.address == address and item.netmask:
                return str(ipaddress.ip_network(f"{address}/{item.netmask}", strict=False))
    return None


def listen(name: str, *, host: str, backlog: int) -> socket.socket:
    """A listening socket in the range of `free_port`, which an administrator can open between the nodes.

    Raises:
        OSError: not one port is free.
    """
    for attempt in range(_ATTEMPTS):
        with contextlib.suppress(OSError):  # somebody took it in between
            return socket.create_server((host, free_port(f"{name} {attempt}", host=host)), backlog=backlog)
    return socket.create_server((host, free_port(name, host=host)), backlog=backlog)


def free_port(job: str, *, host: str = "") -> int:
    """A free port that follows from the job's name: two jobs on a node seldom try the same one.

    Args:
        job: what tells the job from others, such as the scheduler's job id.
        host: the address to bind to, all by default.

    Raises:
        OSError: not one port is free.
    """
    start = int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big")
    for step in range(len(_PORTS)):
        port = _PORTS[(start + step * 17) % len(_PORTS)]
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"{os.uname().nodename}: no port from {_PORTS.start} to {_PORTS.stop - 1} is free")
