"""HTTP over raw sockets for tests: any bytes out, and an answer whose framing is checked."""

import json
import socket
from typing import Any

from tests.gateway_process import EVENT


class Answer:
    """One response as it came over the wire."""

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, (name, values)
        return values[0] if values else None

    @property
    def json(self) -> dict[str, Any]:
        """The body."""
        body: dict[str, Any] = json.loads(self.body)
        return body

    @property
    def code(self) -> str:
        return str(self.json["code"])


class Client:
    """A raw connection that checks the framing of every answer."""

    def __init__(self, port: int, timeout_s: float = 5.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._left = b""
        self.closed = False

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        self._left += data
        self.closed = self.closed or not data
        return bool(data)

    def answer(self, head_only: bool = False) -> Answer | None:
        """The next response; None: the server closed the connection."""
        while b"\r\n\r\n" not in self._left:
            if not self._more():
                assert not self._left, f"half an answer: {self._left!r}"
                return None
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0")
        headers = []
        for line in lines:
            key, _, value = line.partition(": ")
            headers.append((key.lower(), value))
        answer = Answer(int(status), headers, b"")
        if answer.status == 100:
            return self.answer()
        length = int(answer.header("content-length") or 0)
        assert answer.header("transfer-encoding") is None
        while not head_only and len(self._left) < length:
            assert self._more(), "the body of the answer is cut"
        answer.body, self._left = self._left[:length], self._left[length:]
        return answer

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for that long."""
        before = self.socket.gettimeout()
        self.socket.settimeout(seconds)
        try:
            return not self._left and not self.closed and not self._more() and not self.closed
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(before)

    def is_closed(self, within_s: float = 3.0) -> bool:
        """Whether the server ends the connection, and says nothing more before it."""
        self.socket.settimeout(within_s)
        try:
            while self._more():
                pass
        except TimeoutError:
            return False
        assert not self._left, f"a second answer: {self._left!r}"
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request(
    body: bytes = EVENT,
    *headers: str,
    path: str = "/v1/ingest/dev-1",
    method: str = "POST",
    host: str | None = "Host: h",
    length: str | None = "",
    media: str | None = "Content-Type: application/json",
    version: str = "HTTP/1.1",
) -> bytes:
    """A request's bytes; `length` "" means the right one, None none."""
    lines = [f"{method} {path} {version}"]
    lines += [line for line in (host, media) if line is not None]
    if length is not None:
        lines.append(length or f"Content-Length: {len(body)}")
    lines += headers
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(
    body: bytes, *headers: str, end: bytes = b"0\r\n\r\n", length: str | None = None
) -> bytes:
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    return request(chunk + end, "Transfer-Encoding: chunked", *headers, length=length)
