"""A writer of YAML 1.2, as much as documents of JSON values need: mappings and lists in blocks,
texts in double quotes as in JSON, which every reader of YAML takes."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final


def encode(document: Any) -> str:
    """A JSON value as YAML."""
    return "".join(_lines(document, ""))


_PLAIN: Final = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[A-Za-z$_][\w-]*", re.I)
"""A key that YAML 1.1 and 1.2 read as text without quotes."""


def _lines(node: Any, indent: str) -> Iterator[str]:
    if not isinstance(node, dict | list) or not node:
        yield f"{json.dumps(node, ensure_ascii=False)}\n"
        return
    if indent:
        yield "\n"
    items = node.items() if isinstance(node, dict) else ((None, item) for item in node)
    for key, value in items:
        if key is None:
            yield f"{indent}-"
        else:
            yield f"{indent}{key if _PLAIN.fullmatch(key) else json.dumps(key)}:"
        yield "" if isinstance(value, dict | list) and value else " "
        yield from _lines(value, indent + "  ")
