"""Fixtures that several test files use. Keep it small: what one file uses stands in that file."""

import os
import socket
from collections.abc import Callable

import pytest

_given_out: set[int] = set()


def find_free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on and that no other call was given."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_out:
            _given_out.add(port)
            return port


@pytest.fixture
def free_port() -> Callable[[], int]:
    """`find_free_port`, which a test may call as often as it needs ports."""
    return find_free_port


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests sets nothing."""
    for name in [name for name in os.environ if name.startswith("GATEWAY_")]:
        monkeypatch.delenv(name)
