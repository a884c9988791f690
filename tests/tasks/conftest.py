"""No test of the tasks may use a network."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Every connection is refused, but those between processes of this machine."""
    patch = pytest.MonkeyPatch()
    connect = socket.socket.connect

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"network used: {args}")

    def local_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            refuse(address)
        connect(self, address)

    patch.setattr(socket.socket, "connect", local_only)
    patch.setattr(socket, "getaddrinfo", refuse)
    yield
    patch.undo()
