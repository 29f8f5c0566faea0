"""Addresses and ports, asked of this machine's kernel."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from train.cluster import network, this_machine


def test_the_way_to_this_machine_is_its_loopback():
    assert network.source_address("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == network.interface_to("127.0.0.1") == "lo"
    assert network.interface_address("lo") == "127.0.0.1"
    assert network.network_of("127.0.0.1") == "127.0.0.0/8"


def test_what_is_not_there_is_none():
    assert network.source_address("no-such-host.invalid") is None
    assert network.interface_to("no-such-host.invalid") is None
    assert network.interface_of("192.0.2.1") is None
    assert network.interface_address("no_such_interface0") is None
    assert network.network_of("192.0.2.1") is None


def test_the_loopback_is_what_peers_are_told_last(monkeypatch):
    """On Debian a machine's own name is 127.0.1.1: rank 0's own node would call itself 127.0.0.1 to all others."""
    routes = {"node1": "127.0.0.1", "node2": "10.0.0.1"}
    monkeypatch.setattr(network, "source_address", routes.get)
    found = network.own_addresses(["node1", "node2", "unknown"])
    assert found[0] == "10.0.0.1"
    assert found[-1] == "127.0.0.1" and len(set(found)) == len(found)


def test_this_machine_is_known_by_its_names_and_addresses(monkeypatch):
    for name in ("localhost", "127.0.0.1", socket.gethostname(), f"{socket.gethostname()}.somewhere.example"):
        assert this_machine.name_among([name]) == name
    assert this_machine.name_among(["192.0.2.1"]) is None
    assert this_machine.name_among(["no-such-host.invalid"]) is None


def test_the_port_follows_from_the_job_and_a_taken_one_is_passed_over():
    port = network.free_port("job 1", host="127.0.0.1")
    assert 20000 <= port < 32000
    assert network.free_port("job 1", host="127.0.0.1") == port
    with contextlib.closing(socket.create_server(("127.0.0.1", port))):
        other = network.free_port("job 1", host="127.0.0.1")
    assert other != port and 20000 <= other < 32000


def test_no_free_port_is_told_with_the_node(monkeypatch):
    monkeypatch.setattr(network, "_PORTS", range(20000, 20001))
    with (
        contextlib.closing(socket.create_server(("127.0.0.1", 20000))),
        pytest.raises(OSError, match="no port from 20000 to 20000 is free") as caught,
    ):
        network.free_port("job", host="127.0.0.1")
    assert os.uname().nodename in str(caught.value)
