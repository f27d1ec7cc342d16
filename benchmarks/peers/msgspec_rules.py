"""The rules of an event (docs/http.md) as far as msgspec can say them.

It cannot: refuse duplicate keys or lone surrogates, count bytes instead of characters, bound the
depth of a payload or the number of members, or refuse a leap second. So it does less than what it
is compared with.
"""

from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

Key = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")]
Tag = Annotated[str, Meta(max_length=128)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Event(msgspec.Struct, forbid_unknown_fields=True):
    """One event."""

    metrics: Annotated[dict[Key, float], Meta(max_length=32)]
    tags: Annotated[dict[Key, Tag], Meta(max_length=16)] | UnsetType = UNSET
    ts: Annotated[datetime, Meta(tz=True)] | UnsetType = UNSET
    seq: Count | UnsetType = UNSET
    boot: Count | UnsetType = UNSET
    payload: Any = UNSET


decode: Final = msgspec.json.Decoder(Event).decode
"""Raises msgspec.DecodeError, of which ValidationError is one."""
