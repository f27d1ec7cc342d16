"""The template of topics, `mqtt.topic`: what it may be, and what it becomes for a device."""

from typing import Final, NamedTuple

TOPIC_BYTES_MAX: Final = 65535
"""MQTT 5 section 1.5.4."""


class TopicTemplate(NamedTuple):
    """A topic with at most one `{device_id}`; `suffix` is None when there is none."""

    prefix: str
    suffix: str | None

    def fill(self, device_id: str) -> str:
        """The topic of one device."""
        return self.prefix if self.suffix is None else self.prefix + device_id + self.suffix


def parse_topic(template: str) -> TopicTemplate:
    """Check `mqtt.topic` (MQTT 5 section 4.7). Raises ValueError with what is wrong."""
    if problem := topic_problem(template):
        raise ValueError(f"mqtt.topic: {problem}")
    prefix, marker, suffix = template.partition("{device_id}")
    return TopicTemplate(prefix, suffix if marker else None)


def topic_problem(template: str) -> str | None:
    """Why a topic template is refused, or None."""
    if not template:
        return "must not be empty"
    parts = template.split("{device_id}")
    if len(parts) > 2:
        return "{device_id} may stand once"
    if any("{" in part or "}" in part for part in parts):
        return "only {device_id} may stand in braces"
    if "+" in template or "#" in template:
        return "must not have the wildcards + and #"
    if not template.isprintable():
        return "must not have control characters or lone surrogates"
    if template.startswith("$"):
        return "must not start with $: such topics belong to the broker"
    if len(template.replace("{device_id}", "x" * 64).encode()) > TOPIC_BYTES_MAX:
        return f"longer than {TOPIC_BYTES_MAX} bytes when filled"
    return None
