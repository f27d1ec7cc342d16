"""Robyn, msgspec with the same rules, and mqttools, whose client knows QoS 0 only.

A 202 is sent when the packet stands in mqttools' queue: it means nothing. Run in the environment of
requirements/robyn.txt. Environment: PEER_HTTP_PORT, PEER_MQTT_PORT.
"""

import os
import re
from typing import Any

import mqttools
import msgspec
from robyn import Headers, Request, Response, Robyn

from benchmarks.peers.msgspec_rules import decode

HEADERS = Headers({"content-type": "application/json"})
device_id_at = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch
client: Any = None


async def connect() -> None:
    """Before the first request."""
    global client
    client = mqttools.Client("127.0.0.1", int(os.environ["PEER_MQTT_PORT"]))
    await client.start()


async def ingest(request: Request) -> Response:
    """One event."""
    device_id = request.path_params["device_id"]
    if not device_id_at(device_id):
        return Response(400, HEADERS, '{"code":"bad_device_id"}')
    body = request.body
    data = body.encode() if isinstance(body, str) else bytes(body)
    try:
        decode(data)
    except msgspec.DecodeError:
        return Response(400, HEADERS, '{"code":"malformed_json"}')
    client.publish(mqttools.Message("telemetry/" + device_id, data))
    return Response(202, HEADERS, '{"ack":"enqueue"}')


def main() -> None:
    """Serves until it is killed; arguments are Robyn's own."""
    app = Robyn(__file__)
    app.startup_handler(connect)
    app.post("/v1/ingest/:device_id")(ingest)
    app.start(host="127.0.0.1", port=int(os.environ["PEER_HTTP_PORT"]))


if __name__ == "__main__":
    main()
