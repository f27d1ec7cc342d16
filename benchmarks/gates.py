"""Which figure is good enough? The one table of thresholds.

`--gate` makes the exit code 3 when a figure falls short, or when a row that has a gate has no
figure. A quick run is short and noisy: there a gate holds with its slack, and one without slack is
shown but not enforced.
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from benchmarks.harness import Figure, Row


class Gate(NamedTuple):
    """`of` is compared with `limit`; `quick_slack` is the share of it that a quick run may miss,
    None: all.
    """

    of: Literal["value", "ratio"]
    comparison: Literal["<=", ">="]
    limit: float
    quick_slack: float | None

    def __str__(self) -> str:
        return f"{self.of} {'≤' if self.comparison == '<=' else '≥'} {self.limit:g}"

    def allowed(self, quick: bool) -> float | None:
        """The limit that holds in this run; None: not enforced."""
        if not quick:
            return self.limit
        if self.quick_slack is None:
            return None
        sign = 1 if self.comparison == "<=" else -1
        return self.limit * (1 + sign * self.quick_slack)

    def holds(self, figure: Figure, limit: float) -> bool:
        """Whether the figure is on the right side of `limit`."""
        found = getattr(figure, self.of)
        if found is None:
            return False
        return bool(found <= limit if self.comparison == "<=" else found >= limit)


GATES: Final[dict[str, Gate]] = {
    "validator_vs_msgspec": Gate("ratio", "<=", 0.10, 0.30),
    "ingest_ns": Gate("value", "<=", 400, 1.0),
    "pipeline_vs_empty_handler": Gate("ratio", ">=", 0.90, 0.15),
    "end_to_end_vs_gmqtt_peer": Gate("ratio", ">=", 1.15, None),
    "publisher_vs_raw_socket": Gate("ratio", ">=", 0.80, None),
    "publisher_vs_raw_socket_stock": Gate("ratio", ">=", 0.80, None),
    "latency_ms_p50": Gate("value", "<=", 2, None),
    "latency_ms_p99": Gate("value", "<=", 15, None),
    "recovery_mib_per_second": Gate("value", ">=", 500, 0.30),
    "durable_vs_enqueue": Gate("ratio", ">=", 0.70, 0.15),
    "sink_vs_enqueue": Gate("ratio", ">=", 0.50, 0.20),
    "durable_latency_ms": Gate("ratio", "<=", 2, 0.25),
    "dedupe_cost_ns": Gate("value", "<=", 150, 0.50),
    "dedupe_cost_ns_million_devices": Gate("value", "<=", 150, 0.50),
    "dedupe_devices_ratio": Gate("ratio", "<=", 1.5, None),
    "restart_s": Gate("value", "<=", 2, 0.25),
    "vs_fastapi": Gate("ratio", ">=", 8, 0.25),
    "vs_best_peer": Gate("ratio", ">=", 1.5, 0.25),
    "sink_vs_aiomqtt_peer": Gate("ratio", ">=", 1.5, 0.25),
    "single_vs_nginx": Gate("ratio", ">=", 0.5, 0.15),
    "rss_mib_worker": Gate("value", "<=", 64, 0.0),
    "rss_mib_delivery": Gate("value", "<=", 64, 0.0),
}
"""What was asked for. Names that are not here are reported beside."""


Verdict = Literal["", "met", "within slack", "short", "short, not enforced"]


def verdict(row: Row, quick: bool) -> Verdict:
    """How a row stands to its gate; "" when it has none."""
    gate = GATES.get(row.name)
    if gate is None:
        return ""
    if row.figure is not None and gate.holds(row.figure, gate.limit):
        return "met"
    allowed = gate.allowed(quick)
    if allowed is None:
        return "short, not enforced"
    if row.figure is not None and gate.holds(row.figure, allowed):
        return "within slack"
    return "short"


def short(rows: Iterable[Row], quick: bool) -> list[str]:
    """The names that fall short of a gate that is enforced in this run."""
    return [row.name for row in rows if verdict(row, quick) == "short"]
