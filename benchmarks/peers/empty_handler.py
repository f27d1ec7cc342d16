"""An RSGI handler that reads the body and answers 202: what Granian itself costs."""

from typing import Any

HEADERS = [("content-type", "application/json"), ("x-ack", "enqueue")]
BODY = b'{"ack":"enqueue"}'


async def app(scope: Any, proto: Any) -> None:
    """The same answer as the gateway's, byte for byte."""
    await proto()
    proto.response_bytes(202, HEADERS, BODY)
