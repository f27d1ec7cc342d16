"""Granian RSGI, msgspec with the same rules, aiomqtt with QoS 1: the fastest ordinary way to an
answer that means something.

A 202 is sent after the PUBACK. Run by Granian in the environment of requirements/granian.txt.
Environment: PEER_MQTT_PORT.
"""

import asyncio
import logging
import os
import re
from typing import Any

import aiomqtt
import msgspec

from benchmarks.peers.msgspec_rules import decode

INGEST = "/v1/ingest/"
HEADERS = [("content-type", "application/json"), ("x-ack", "sink")]
BODY = b'{"ack":"sink"}'
device_id_at = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch


class App:
    """One worker."""

    def __init__(self) -> None:
        self._client: Any = None

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        logging.getLogger("mqtt").setLevel(logging.ERROR)  # warns of each publish beyond ten
        asyncio.set_event_loop(loop)
        loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        client = aiomqtt.Client("127.0.0.1", int(os.environ["PEER_MQTT_PORT"]))
        self._client = await client.__aenter__()

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        path = scope.path
        if not (path.startswith(INGEST) and scope.method == "POST"):
            proto.response_str(404, [], "")
            return
        device_id = path[len(INGEST) :]
        if not device_id_at(device_id):
            proto.response_str(400, [], "device id")
            return
        body = await proto()
        try:
            decode(body)
        except msgspec.DecodeError as error:
            proto.response_str(400, [], str(error))
            return
        await self._client.publish("telemetry/" + device_id, body, qos=1)
        proto.response_bytes(202, HEADERS, BODY)


app = App()
