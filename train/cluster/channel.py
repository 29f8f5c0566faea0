"""Messages between the launcher and its agents: JSON objects over TCP, for those who know the run's key.

    channel = connect(addresses, port, key)        # an agent
    channel = welcome(accepted_socket, key)        # the launcher
    channel.send({"kind": "alive"}); message = channel.receive(timeout_s=20)

Each side proves with HMAC-SHA256 over the other's random number that it holds the key, before anything is read.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct(">I")
_LARGEST_BYTES = 1 << 24
_LARGEST_UNPROVEN_BYTES = 1 << 10  # from somebody who may be anybody
_HANDSHAKE_S = 10.0


class ChannelError(Exception):
    """The other side is gone, is silent, or is not one of ours."""


class Channel:
    """One connection, by which both sides have proven who they are. Sending is safe from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        try:
            self._peer = str(connection.getpeername()[0])
        except OSError as error:  # gone already
            raise ChannelError(str(error)) from None

    @property
    def peer(self) -> str:
        """The other side's address; it stays known when that side is gone."""
        return self._peer

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message.

        Raises:
            ChannelError: the other side is gone, or takes nothing for ten seconds.
        """
        data = json.dumps(message).encode()
        with self._lock:
            try:
                self._socket.settimeout(_HANDSHAKE_S)
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
            except OSError as error:
                raise ChannelError(str(error)) from None

    def receive(self, timeout_s: float, *, largest_bytes: int = _LARGEST_BYTES) -> dict[str, Any]:
        """The next message.

        Raises:
            ChannelError: none came in time, it is none of ours, or the other side is gone.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, timeout_s))
        if length > largest_bytes:
            raise ChannelError(f"a message of {length} bytes is none of ours")
        try:
            message: Any = json.loads(self._read(length, timeout_s))
        except (ValueError, RecursionError):
            raise ChannelError("a message that is no JSON is none of ours") from None
        if not isinstance(message, dict):
            raise ChannelError("a message that is no JSON object is none of ours")
        return message

    def close(self) -> None:
        """Ends the connection; the other side sees it at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        data = b""
        while len(data) < size:
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                chunk = self._socket.recv(size - len(data))
            except TimeoutError:
                if time.monotonic() < deadline:  # a thread that sends has set the socket's time-out to its own
                    continue
                raise ChannelError(f"no sign for {timeout_s:g} s") from None
            except OSError as error:
                raise ChannelError(str(error)) from None
            if not chunk:
                raise ChannelError("the connection was closed")
            data += chunk
        return data


def welcome(connection: socket.socket, key: str) -> Channel:
    """The launcher's half of the handshake with a connection it has accepted.

    Raises:
        ChannelError: the other side does not know the key.
    """
    channel, number = Channel(connection), secrets.token_hex(16)
    channel.send({"number": number})
    answer = channel.receive(_HANDSHAKE_S, largest_bytes=_LARGEST_UNPROVEN_BYTES)
    if not _is_proof(answer, key, "agent", number):
        channel.close()
        raise ChannelError("somebody without the run's key")
    channel.send({"proof": _proof(key, "launcher", str(answer.get("number")))})
    return channel


def connect(addresses: Sequence[str], port: int, key: str) -> Channel:
    """The agent's half, on the first of the launcher's addresses that answers.

    Raises:
        ChannelError: none answers, or what answers is not the launcher.
    """
    tried = []
    for address in addresses:
        try:
            channel = Channel(socket.create_connection((address, port), timeout=5))
            number = secrets.token_hex(16)
            challenge = channel.receive(_HANDSHAKE_S, largest_bytes=_LARGEST_UNPROVEN_BYTES)
            channel.send({"proof": _proof(key, "agent", str(challenge.get("number"))), "number": number})
            answer = channel.receive(_HANDSHAKE_S, largest_bytes=_LARGEST_UNPROVEN_BYTES)
            if _is_proof(answer, key, "launcher", number):
                return channel
            channel.close()
            tried.append(f"{address}: it is not this run's launcher")
        except (OSError, ChannelError, ValueError) as error:
            tried.append(f"{address}: {error}")
    raise ChannelError(f"port {port} of the launcher cannot be reached ({'; '.join(tried)})")


def _is_proof(answer: dict[str, Any], key: str, who: str, number: str) -> bool:
    return hmac.compare_digest(str(answer.get("proof")).encode(), _proof(key, who, number).encode())


def _proof(key: str, who: str, number: str) -> str:
    return hmac.new(key.encode(), f"{who} {number}".encode(), "sha256").hexdigest()
