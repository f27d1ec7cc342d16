"""Which figure is good enough? The one table of thresholds.

`--gate` makes the exit code 3 when a figure falls short, or when a row that has a gate has no
figure. A quick run is short and noisy, and other programs run beside it: there a ratio holds with
its slack, one without slack is shown but not enforced, and so is every absolute time or rate. What
a quick run enforces without noise are the counts of instructions.
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from benchmarks.harness import Figure, Row


class Gate(NamedTuple):
    """`of` is compared with `limit`; `±`: it may be so far from 1. `quick_slack` is the share of
    the limit that a quick run may miss, None: all.
    """

    of: Literal["value", "ratio"]
    comparison: Literal["<=", ">=", "±"]
    limit: float
    quick_slack: float | None

    def __str__(self) -> str:
        if self.comparison == "±":
            return f"{self.of} 1 ± {self.limit:g}"
        return f"{self.of} {'≤' if self.comparison == '<=' else '≥'} {self.limit:g}"

    def allowed(self, quick: bool) -> float | None:
        """The limit that holds in this run; None: not enforced."""
        if not quick:
            return self.limit
        if self.quick_slack is None:
            return None
        sign = -1 if self.comparison == ">=" else 1
        return self.limit * (1 + sign * self.quick_slack)

    def holds(self, figure: Figure, limit: float) -> bool:
        """Whether the figure is on the right side of `limit`."""
        found = getattr(figure, self.of)
        if found is None:
            return False
        if self.comparison == "±":
            return bool(abs(found - 1) <= limit)
        return bool(found <= limit if self.comparison == "<=" else found >= limit)


GATES: Final[dict[str, Gate]] = {
    "instructions_validate": Gate("ratio", "±", 0.02, 0.0),
    "instructions_ingest": Gate("ratio", "±", 0.02, 0.0),
    "instructions_batch": Gate("ratio", "±", 0.02, 0.0),
    "instructions_window": Gate("ratio", "±", 0.02, 0.0),
    "instructions_packed": Gate("ratio", "±", 0.02, 0.0),
    "validator_vs_msgspec": Gate("ratio", "<=", 0.10, 0.30),
    "ingest_ns": Gate("value", "<=", 400, None),
    "native_batch_ns": Gate("value", "<=", 350, None),
    "native_batch_ns_array": Gate("value", "<=", 350, None),
    "native_batch_ns_million_devices": Gate("value", "<=", 350, None),
    "native_batch_ns_array_million_devices": Gate("value", "<=", 350, None),
    "pipeline_vs_empty_handler": Gate("ratio", ">=", 0.90, 0.15),
    "single_vs_nginx": Gate("ratio", ">=", 0.50, 0.50),
    "batch_events_per_second_core": Gate("value", ">=", 1_500_000, None),
    "batch_vs_bytes_alone": Gate("ratio", ">=", 0.12, 0.30),
    "rate_by_batch_size": Gate("ratio", ">=", 10, 0.30),
    "rate_by_devices": Gate("ratio", ">=", 0.70, 0.30),
    "rate_by_log_fill": Gate("ratio", ">=", 0.80, 0.30),
    "rate_by_connections": Gate("ratio", ">=", 0.80, 0.25),
    "end_to_end_vs_gmqtt_peer": Gate("ratio", ">=", 1.15, None),
    "publisher_vs_raw_socket": Gate("ratio", ">=", 0.80, None),
    "publisher_vs_raw_socket_stock": Gate("ratio", ">=", 0.80, None),
    "packed_events_per_second": Gate("value", ">=", 500_000, None),
    "file_sink_mib_per_second": Gate("value", ">=", 200, None),
    "two_sinks_vs_one": Gate("ratio", ">=", 0.85, 0.15),
    "latency_ms_p50": Gate("value", "<=", 2, None),
    "latency_ms_p99": Gate("value", "<=", 15, None),
    "recovery_mib_per_second": Gate("value", ">=", 500, None),
    "durable_vs_enqueue": Gate("ratio", ">=", 0.70, 0.30),
    "sink_vs_enqueue": Gate("ratio", ">=", 0.50, 0.20),
    "durable_latency_ms": Gate("ratio", "<=", 2, 0.25),
    "dedupe_cost_ns": Gate("value", "<=", 150, None),
    "dedupe_cost_ns_million_devices": Gate("value", "<=", 150, None),
    "dedupe_devices_ratio": Gate("ratio", "<=", 1.5, None),
    "restart_s": Gate("value", "<=", 2, None),
    "vs_fastapi": Gate("ratio", ">=", 8, 0.25),
    "vs_best_peer": Gate("ratio", ">=", 1.5, 0.25),
    "sink_vs_aiomqtt_peer": Gate("ratio", ">=", 1.5, 0.25),
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
