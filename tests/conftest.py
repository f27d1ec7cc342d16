"""Fixtures that several test files use. Keep it small: what one file uses stands in that file."""

import os
import platform
import shutil
import signal
import socket
from collections.abc import Callable

import pytest

from tests import conformance

TOOLS = {"gcc", "mosquitto", "mosquitto_sub", "mosquitto_pub", "openssl", "strace", "unshare"}
TOOLS |= {"chromium", "chromedriver", "jq", "zstdcat"}
if platform.machine() == "x86_64":
    TOOLS |= {"aarch64-linux-gnu-gcc", "qemu-aarch64"}

_given_out: set[int] = set()


def pytest_configure() -> None:
    """No test is skipped for want of a program: without them nothing runs. And a shell that runs
    the tests in the background has Ctrl-C ignored, which programs would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:{os.environ.get('GW_MOSQUITTO', '')}"
    missing = sorted(tool for tool in TOOLS if shutil.which(tool, path=path) is None)
    if missing:
        pytest.exit(f"not installed: {', '.join(missing)}; run scripts/bootstrap test", 4)


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


@pytest.fixture(autouse=True)
def _difference_of_doors(request: pytest.FixtureRequest) -> None:
    conformance.expect_difference(request)
