"""The compiled validator: see `_native/gw_validator.h`."""

from typing import Final, NamedTuple

CODES: Final[tuple[str, ...]]
"""Names of all refusal codes; index 0 is "" (accepted), then the order of `_native/gw_codes.h`."""

class Verdict(NamedTuple):
    code: str  # "" when valid
    field: str | None  # "metrics", "tags.site", "seq" ... as the error body shows it
    offset: int  # byte offset of the first byte that broke the rule
    has_ts: bool
    seq: int | None
    boot: int | None
    ts: bytes | None  # as written
    object_offset: int

def validate(body: bytes) -> Verdict:
    """Check one event."""

def check(body: bytes) -> int:
    """Like `validate`, but returns only the code's number (0: valid): for benches and fuzzing."""

def device_id_ok(device_id: bytes) -> bool: ...
def scan_paths() -> tuple[str, ...]:
    """Names of the scan paths that this machine can run, best first, "portable" last."""

def select_scan_path(name: str) -> None:
    """Use another scan path from now on. Raises ValueError when it cannot run here."""
