"""Messages arrive whole, from those alone who know the key; strangers are turned away and hold nobody up."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from train.cluster import channel as channels
from train.cluster.channel import Channel, ChannelError, connect, welcome

KEY = "k" * 64


class Launcher:
    """Accepts one connection in a thread of its own and keeps what came of it."""

    def __init__(self, serve: Callable[[socket.socket], Any]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, args=(serve,), daemon=True)
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket], Any]) -> None:
        connection, _ = self._listener.accept()
        try:
            self.result = serve(connection)
        except Exception as error:
            self.result = error

    def wait(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the launcher's side hangs"
        self._listener.close()
        return self.result


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    """An agent's and the launcher's end of a connection."""
    launcher = Launcher(lambda connection: welcome(connection, KEY))
    agent = connect(["127.0.0.1"], launcher.port, KEY)
    yield agent, launcher.wait()
    agent.close()
    launcher.result.close()


def framed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def stranger(data: bytes) -> Any:
    """What the launcher makes of somebody who answers its challenge with `data`."""
    launcher = Launcher(lambda connection: welcome(connection, KEY))
    with socket.create_connection(("127.0.0.1", launcher.port), timeout=10) as connection:
        connection.sendall(data)
        return launcher.wait()


def test_messages_arrive_whole_and_in_order_in_both_directions(pair):
    agent, launcher = pair
    sent = [
        {"kind": "x", "text": "日本語", "number": number, "more": "y" * 100_000 * (number == 1)} for number in range(3)
    ]
    sender = threading.Thread(target=lambda: [agent.send(message) for message in sent])
    sender.start()
    assert [launcher.receive(10) for _ in sent] == sent
    sender.join()
    launcher.send({"kind": "alive"})
    assert agent.receive(10) == {"kind": "alive"}
    assert launcher.peer == "127.0.0.1"


def test_many_threads_may_send_at_once(pair):
    agent, launcher = pair

    def send(number: int) -> None:
        for _ in range(20):
            launcher.send({"n": number, "pad": "z" * 5000})

    senders = [threading.Thread(target=send, args=(number,)) for number in range(5)]
    for sender in senders:
        sender.start()
    assert sorted(agent.receive(10)["n"] for _ in range(100)) == [number for number in range(5) for _ in range(20)]
    for sender in senders:
        sender.join()


def test_silence_is_told_with_its_time_and_a_closed_connection_at_once(pair):
    agent, launcher = pair
    with pytest.raises(ChannelError, match=r"^no sign for 0.2 s$"):
        launcher.receive(0.2)
    agent.close()
    with pytest.raises(ChannelError, match=r"^the connection was closed$"):
        launcher.receive(10)


def test_a_thread_that_sends_does_not_shorten_the_patience_of_one_that_receives(pair):
    """Both set the one time-out that a socket has."""
    agent, launcher = pair
    set_timeout = socket.socket.settimeout
    answered = threading.Timer(0.5, lambda: agent.send({"kind": "late"}))

    class Meddled(socket.socket):
        def settimeout(self, value: float | None) -> None:
            set_timeout(self, 0.1)

    launcher._socket = Meddled(fileno=launcher._socket.detach())
    answered.start()
    assert launcher.receive(10) == {"kind": "late"}
    answered.join()


@pytest.mark.parametrize(
    "data",
    [
        framed(json.dumps({"proof": "0" * 64, "number": "1"}).encode()),
        framed(json.dumps({"proof": "é", "number": "1"}).encode()),
        framed(json.dumps({}).encode()),
        framed(b"[]"),
        framed(b"\xff\xfe\x00"),
        framed(b"not JSON"),
        framed(b"[" * 1000),
        framed(b"[" * 200_000),
        b"GET / HTTP/1.1\r\nHost: node1\r\n\r\n",
        b"\xff\xff\xff\xff",
        struct.pack(">I", 1 << 20),
    ],
)
def test_a_stranger_is_turned_away_at_once_whatever_it_sends(data):
    assert isinstance(stranger(data), ChannelError)


def test_a_stranger_who_says_nothing_is_turned_away(monkeypatch):
    monkeypatch.setattr(channels, "_HANDSHAKE_S", 0.3)
    launcher = Launcher(lambda connection: welcome(connection, KEY))
    with socket.create_connection(("127.0.0.1", launcher.port), timeout=10):
        assert isinstance(launcher.wait(), ChannelError)


def test_a_stranger_who_sends_a_byte_now_and_then_does_not_prolong_its_time(monkeypatch):
    monkeypatch.setattr(channels, "_HANDSHAKE_S", 0.5)
    launcher = Launcher(lambda connection: welcome(connection, KEY))
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", launcher.port), timeout=10) as connection:
        while launcher.result is None and time.monotonic() - began < 15:
            with contextlib.suppress(OSError):
                connection.sendall(b"\0")
            time.sleep(0.2)
    assert isinstance(launcher.wait(), ChannelError)


def test_an_agent_does_not_serve_a_launcher_without_the_key():
    """Somebody else listens there by now, and would have programs started."""

    def pretend(connection: socket.socket) -> Any:
        other = Channel(connection)
        other.send({"number": "1"})
        answer = other.receive(10)
        other.send({"proof": answer["proof"]})  # its own proof, sent back
        return answer

    launcher = Launcher(pretend)
    with pytest.raises(ChannelError, match="it is not this run's launcher"):
        connect(["127.0.0.1"], launcher.port, KEY)
    assert KEY not in json.dumps(launcher.wait())


def test_a_wrong_key_on_the_agents_side():
    launcher = Launcher(lambda connection: welcome(connection, KEY))
    with pytest.raises(ChannelError, match="cannot be reached"):
        connect(["127.0.0.1"], launcher.port, "another")
    assert isinstance(launcher.wait(), ChannelError)


def test_the_first_address_that_answers_is_taken_and_all_that_do_not_are_told():
    launcher = Launcher(lambda connection: welcome(connection, KEY))
    agent = connect(["127.0.0.2", "no-such-host.invalid", "127.0.0.1"], launcher.port, KEY)
    launcher.wait().close()
    agent.close()
    with pytest.raises(ChannelError, match=r"port 9 .*127.0.0.2: .*refused; no-such-host.invalid: "):
        connect(["127.0.0.2", "no-such-host.invalid"], 9, KEY)


def test_the_address_of_one_who_broke_off_stays_known(pair):
    """The order for all nodes is made of every agent's address, also when one has been reset a moment before."""
    agent, launcher = pair
    agent._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    agent._socket.close()
    with pytest.raises(ChannelError):
        launcher.receive(10)
    with pytest.raises(OSError):
        launcher._socket.getpeername()
    assert launcher.peer == "127.0.0.1"
