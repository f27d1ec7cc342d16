"""`gateway health`: its exit code is the health of a container."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway import health_check
from gateway.__main__ import main
from gateway.settings import HttpConfig
from tests.gateway_process import GatewayProcess, free_port, wait_for


@contextmanager
def answering(data: bytes | None) -> Iterator[str]:
    """A server that says `data` to one client; None: it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            client = server.accept()[0]
            held.append(client)
            if data is not None:
                client.recv(4096)
                client.sendall(data)
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()
        for client in held:
            client.close()


def health(*arguments: str) -> int:
    return main(["health", *arguments])


def test_a_gateway_is_ready_then_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with GatewayProcess(tmp_path) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        assert health("--url", url) == 0
        assert capsys.readouterr().out == "ready: running\n"
        assert health("--set", f"http.port={gateway.port}") == 0  # where the settings say it is
        gateway.post()  # so that draining takes its time: there is no broker
        assert gateway.process is not None
        gateway.process.terminate()
        wait_for(lambda: health("--url", url) == 1)
        assert "not ready: " in capsys.readouterr().err

    def refused() -> bool:  # a dying process may hold its socket a moment longer
        code = health("--url", url)
        said = capsys.readouterr().err
        return code == 1 and "Connection refused; is the gateway running there?" in said

    wait_for(refused)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "no answer in 1 s"),
        (b"", "closed connection without response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "not as a gateway does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[1, 2, 3]", "not as a gateway does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{", "not as a gateway does"),
        (
            b'HTTP/1.1 503 No\r\nContent-Length: 34\r\n\r\n{"ready":false,"state":"draining"} ',
            "draining (503)",
        ),
    ],
)
def test_anything_but_a_ready_gateway_is_a_no(
    said: bytes | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(said) as url:
        assert health("--url", url, "--timeout", "1") == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("gateway.example", "http://gateway.example:8000"),
    ],
)
def test_who_listens_everywhere_is_asked_on_loopback(host: str, url: str) -> None:
    assert health_check.url_of(HttpConfig(host=host)) == url


def test_a_wrong_url_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert health("--url", f"127.0.0.1:{free_port()}") == 2
    assert "write http://HOST:PORT" in capsys.readouterr().err
