"""ThingsBoard IoT Gateway with its REST connector, publishing into any broker.

    python -m benchmarks.peers.thingsboard_peer FOLDER

Writes its configuration into FOLDER and runs there, in the environment of
requirements/thingsboard.txt. Environment: PEER_HTTP_PORT, PEER_MQTT_PORT. Its 200 means that the
event stands in a queue of the process. It has no rules for an event, picks the values that the
configuration names, and publishes them on v1/gateway/telemetry (QoS 1), often many events in one
message: neither topic nor form can be chosen. Events of one device with equal ts become one.
Storage and messages may be larger than by default, and the rate limits, which are those of the
vendor's cloud, are lifted.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

PAYLOAD_BYTES_MAX: Final = 65536
NO_LIMIT: Final = "0:0,"
VALUES: Final = {
    "seq": "${seq}",
    "temp_c": "${metrics.temp_c}",
    "hum": "${metrics.hum}",
    "rpm": "${metrics.rpm}",
}


def gateway(mqtt_port: int) -> dict[str, Any]:
    """tb_gateway.json."""
    limits = ("rateLimits", "dpRateLimits", "messagesRateLimits", "deviceMessagesRateLimits")
    return {
        "thingsboard": {
            "host": "127.0.0.1",
            "port": mqtt_port,
            "remoteShell": False,
            "remoteConfiguration": False,
            "statistics": {"enable": False},
            "maxPayloadSizeBytes": PAYLOAD_BYTES_MAX,
            "minPackSendDelayMS": 10,
            "minPackSizeToSend": 500,
            "handleDeviceRenaming": False,
            "security": {"type": "accessToken", "accessToken": "peer"},
            "qos": 1,
            "reportStrategy": {"type": "ON_RECEIVED"},
            **dict.fromkeys((*limits, "deviceRateLimits", "deviceDpRateLimits"), NO_LIMIT),
        },
        "storage": {"type": "memory", "read_records_count": 1000, "max_records_count": 1_000_000},
        "grpc": {"enabled": False},
        "connectors": [{"type": "rest", "name": "rest", "configuration": "rest.json"}],
    }


def rest(http_port: int) -> dict[str, Any]:
    """rest.json."""
    return {
        "name": "rest",
        "logLevel": "ERROR",
        "server": {"host": "127.0.0.1", "port": str(http_port), "SSL": False},
        "mapping": [
            {
                "endpoint": "/v1/ingest/{device_id}",
                "HTTPMethods": ["POST"],
                "response": {"responseExpected": False},
                "security": {"type": "anonymous"},
                "converter": {
                    "type": "json",
                    "deviceInfo": {
                        "deviceNameExpressionSource": "request",
                        "deviceNameExpression": "${device_id}",
                        "deviceProfileExpressionSource": "constant",
                        "deviceProfileExpression": "default",
                    },
                    "attributes": [],
                    "timeseries": [
                        {"type": "double", "key": key, "value": value}
                        for key, value in VALUES.items()
                    ],
                },
            }
        ],
        "requestsMapping": {},  # without it the file is taken for one of an older version
    }


def logs() -> dict[str, Any]:
    """logs.json: errors only, on the console."""
    names = ("service", "connector", "converter", "tb_connection", "storage", "extension")
    console = {"class": "logging.StreamHandler", "level": "ERROR", "stream": "ext://sys.stderr"}
    logger = {"handlers": ["console"], "level": "ERROR", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"console": console},
        "loggers": dict.fromkeys((*names, "database"), logger),
        "root": {"level": "ERROR", "handlers": ["console"]},
    }


def session_limits(_: Any, callback: Callable[[Any, dict[str, Any]], None]) -> None:
    """What the vendor's server answers in a session without limits; no other broker answers, and
    until then nothing is published.
    """
    limits: dict[str, Any] = {"rateLimits": {}, "gatewayRateLimits": {}}
    callback(None, limits | {"maxInflightMessages": 100, "maxPayloadSize": PAYLOAD_BYTES_MAX})


def main() -> None:
    """Runs until it is killed."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    http_port, mqtt_port = (int(os.environ[f"PEER_{name}_PORT"]) for name in ("HTTP", "MQTT"))
    files = {"tb_gateway": gateway(mqtt_port), "rest": rest(http_port), "logs": logs()}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    os.chdir(folder)  # where it makes the folders of its logs and data
    os.environ["TB_GW_CONFIG_DIR"] = str(folder)
    del sys.argv[1:]  # a first argument means "reload when files change" to it
    from tb_device_mqtt import TBDeviceMqttClient
    from thingsboard_gateway.tb_gateway import main as run

    TBDeviceMqttClient.request_service_configuration = session_limits
    run()


if __name__ == "__main__":
    main()
