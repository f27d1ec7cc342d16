"""Telemetry gateway: HTTP in, validated and logged in compiled code, MQTT out."""

__version__ = "0.1.0"
