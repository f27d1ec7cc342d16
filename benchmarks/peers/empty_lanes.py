"""The empty handler once more, as ASGI and as WSGI application: reads the body and answers 202."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from benchmarks.peers.empty_handler import BODY, HEADERS

_ASGI_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS]


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """ASGI."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 202, "headers": _ASGI_HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def wsgi(
    environ: dict[str, Any], start: Callable[[str, list[tuple[str, str]]], Any]
) -> Iterable[bytes]:
    """WSGI."""
    environ["wsgi.input"].read()
    start("202 Accepted", HEADERS)
    return [BODY]
