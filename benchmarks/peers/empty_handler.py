"""An RSGI handler that reads the body and answers 202: what Granian itself costs."""

from typing import Any

RECEIPT = "8f2b6c1d9e0a4375-1-10c0ffe8-1d7e5a90b3c84f26"
"""As long as one of the gateway's."""
HEADERS = [
    ("content-type", "application/json"),
    ("x-receipt", RECEIPT),
    ("x-ack", "enqueue"),
]
BODY = b'{"ack":"enqueue"}'


async def app(scope: Any, proto: Any) -> None:
    """The same answer as the gateway's, but for what the receipt says."""
    await proto()
    proto.response_bytes(202, HEADERS, BODY)
