"""The SLOs against what client, subscriber and gateway wrote down.

    MET      within the limit
    MISSED   beyond it
    VOID     not measured: the client could not send, or the outage was none

A run whose events are lost, refused and delivered, or not in the books has missed its SLOs however
it was sent. Times are another matter: a client that was late took times of its own making, so a
void run has no verdict on them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from loadtest import accounts
from loadtest.plan import Plan, Slo
from loadtest.subscriber import Arrivals

SHED: Final = "503 with Retry-After"
LAST_EVENTS: Final = 1
"""Events that the run itself sends, at the end."""
BACKLOG_SHARE_MIN: Final = 0.5
"""Of what was accepted during the outage; with less waiting, the broker was not away."""

Verdict = Literal["MET", "MISSED", "VOID"]
MET, MISSED, VOID = 0, 3, 4
"""Exit codes."""


class Finding(NamedTuple):
    """One line of the result."""

    slo: str
    verdict: Verdict
    found: float
    limit: float
    detail: str = ""
    timed: bool = False
    """A time or a rate, which means nothing when the client was late."""

    def __str__(self) -> str:
        bound = ">=" if self.slo.endswith("_min") else "<="
        text = f"{self.verdict:6} {self.slo:32} {self.found:>10,.6g} {bound} {self.limit:g}"
        return f"{text}   {self.detail}" if self.detail else text


class Drain(NamedTuple):
    """How the backlog of an outage went."""

    backlog: int
    seconds: float
    events: int
    """That arrived meanwhile."""


def percentile(numbers: Iterable[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; infinite for no values."""
    ordered = sorted(numbers)
    if not ordered:
        return math.inf
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def drain(times: Sequence[tuple[int, int]], back_ns: int) -> Drain | None:
    """The backlog's way out: from the first arrival after the broker is back, until the last of the
    events that were sent before that arrival is there. None when nothing arrives.
    """
    after = [(arrived, sent) for sent, arrived in times if arrived >= back_ns]
    if not after:
        return None
    first = min(arrived for arrived, _ in after)
    waited = [arrived for arrived, sent in after if sent < first]
    end = max(waited)
    return Drain(len(waited), (end - first) / 1e9, sum(1 for arrived, _ in after if arrived <= end))


def most(slo: str, found: float, limit: float, detail: str = "", timed: bool = False) -> Finding:
    """A limit from above."""
    return Finding(slo, "MET" if found <= limit else "MISSED", found, limit, detail, timed)


def _failures(client: Mapping[str, Any], phases: Iterable[str], shed: bool) -> dict[str, int]:
    """Failed requests of all fleets by "fleet: what"; `shed`: 503 with Retry-After is none."""
    found: dict[str, int] = {}
    for name, row in client["stats"].items():
        phase, _, fleet = name.partition(": ")
        if phase in phases:
            for what, number in row["failures"].items():
                if not (shed and what == SHED):
                    found[f"{fleet}: {what}"] = found.get(f"{fleet}: {what}", 0) + number
    return found


def _say(failures: Mapping[str, int]) -> str:
    return "; ".join(f"{number} x {what}" for what, number in failures.items())


def client_findings(slo: Slo, client: Mapping[str, Any]) -> list[Finding]:
    """What was not sent when it was due, and by whose doing."""
    findings = []
    for phase, due in client["due"].items():
        row = client["requests"].get(phase, {"sent": 0, "in_time": 0, "late": 0})
        share, late = row["in_time"] / due, row["late"] / max(1, row["sent"])
        verdict: Verdict = "MET"
        detail = f"{phase}: {row['in_time']} of {due} requests"
        if share < slo.client.sent_share_min:
            own = late > slo.client.late_share_max or not row["sent"]
            verdict = "VOID" if own else "MISSED"
            detail += "; locust was late" if own else "; late answers held the rest back"
        limit = slo.client.sent_share_min
        findings.append(Finding("client.sent_share_min", verdict, share, limit, detail, timed=True))
    steady = client["requests"].get("steady", {"sent": 0, "late": 0})
    late = steady["late"] / max(1, steady["sent"])
    verdict = "MET" if late <= slo.client.late_share_max and steady["sent"] else "VOID"
    detail = f"{steady['late']} of {steady['sent']} sent more than {slo.client.late_ms:g} ms late"
    limit = slo.client.late_share_max
    return [*findings, Finding("client.late_share_max", verdict, late, limit, detail, timed=True)]


def steady_findings(slo: Slo, client: Mapping[str, Any], arrivals: Arrivals) -> list[Finding]:
    """One event a request, at a fixed rate."""
    failures = _failures(client, ["steady"], shed=False)
    begin, end = (at * 1e9 for at in client["windows"]["steady"])
    took = [(arrived - sent) / 1e9 for sent, arrived in arrivals.times if begin <= sent < end]
    own = client["stats"].get("steady: steady", {"ms_p50": math.inf, "ms_p99": math.inf})
    limits = slo.steady
    return [
        most("steady.failures_max", sum(failures.values()), limits.failures_max, _say(failures)),
        most("steady.enqueue_ms_p50_max", own["ms_p50"], limits.enqueue_ms_p50_max, timed=True),
        most("steady.enqueue_ms_p99_max", own["ms_p99"], limits.enqueue_ms_p99_max, timed=True),
        most(
            "steady.delivery_s_p99_max",
            percentile(took, 99),
            limits.delivery_s_p99_max,
            f"{len(took)} events, p50 {percentile(took, 50) * 1000:.3g} ms",
            timed=True,
        ),
    ]


def outage_findings(slo: Slo, client: Mapping[str, Any], arrivals: Arrivals) -> list[Finding]:
    """How fast the backlog went."""
    begin, end = (round(at * 1e9) for at in client["windows"]["outage"])
    came = sum(1 for sent, _ in arrivals.times if begin <= sent < end)
    gone = drain(arrivals.times, end)
    limit = slo.outage.drain_factor_min
    name = "outage.drain_factor_min"
    if gone is None:
        return [Finding(name, "MISSED", 0.0, limit, "nothing arrived after the outage", True)]
    if gone.backlog < BACKLOG_SHARE_MIN * came or not came:
        detail = f"{gone.backlog} events waited, {came} came in: the broker was not away"
        return [Finding(name, "VOID", 0.0, limit, detail)]
    rate = came / ((end - begin) / 1e9)
    drained = gone.events / max(gone.seconds, 1e-3)
    detail = (
        f"{gone.backlog:,} waiting events in {gone.seconds:.2f} s: {drained:,.0f}/s, {rate:,.0f}/s"
        f" came in"
    )
    verdict: Verdict = "MET" if drained >= limit * rate else "MISSED"
    return [Finding(name, verdict, drained / rate, limit, detail, timed=True)]


def event_findings(
    slo: Slo, client: Mapping[str, Any], arrivals: Arrivals, books: Mapping[str, float]
) -> list[Finding]:
    """Every event, from both sides; then whether the gateway's books say the same."""
    accepted, refused, unknown = (
        accounts.unpack(client[name]) for name in ("accepted", "refused", "unknown")
    )
    lost = accounts.minus(accepted, arrivals.arrived)
    detail = f"of {accounts.count(accepted):,} accepted"
    if lost:
        detail += ": " + accounts.some(lost)
    if not arrivals.complete:
        detail += "; the last event of the run did not arrive"
    ghosts = accounts.both(refused, arrivals.arrived)
    known = (accepted, refused, unknown)
    strange = arrivals.arrived
    for account in known:
        strange = accounts.minus(strange, account)
    words = []
    if arrivals.foreign or strange:
        words.append(
            f"{accounts.count(strange) + arrivals.foreign} events arrived that nobody sent"
            f" {accounts.some(strange)}"
        )
    unexplained = float(accounts.count(strange) + arrivals.foreign)
    came = accounts.count(accounts.both(unknown, arrivals.arrived))
    sure, more = accounts.count(accepted) + came, accounts.count(unknown) - came
    for name, found, least, above in books_against(client, books, sure, more):
        if not least <= found <= least + above:
            unexplained += abs(found - least)
            upto = f" to {least + above:,.0f}" if above else ""
            words.append(f"{name} is {found:,.0f}, the client says {least:,.0f}{upto}")
    return [
        most(
            "events.lost_max",
            accounts.count(lost) + (not arrivals.complete),
            slo.events.lost_max,
            detail,
        ),
        most(
            "events.refused_arrived_max",
            accounts.count(ghosts),
            slo.events.refused_arrived_max,
            f"of {accounts.count(refused):,} refused {accounts.some(ghosts)}".rstrip(),
        ),
        most("events.unexplained_max", unexplained, slo.events.unexplained_max, "; ".join(words)),
    ]


def books_against(
    client: Mapping[str, Any], books: Mapping[str, float], accepted: int, more: int
) -> list[tuple[str, float, float, float]]:
    """Name, what the gateway says, the least that it must be, and how much more it may be.

    `accepted` events are in by what client and subscriber know, `more` perhaps.
    """
    rows = [
        ("gateway_unexplained_events", 0.0, 0.0),
        ("gateway_events_waiting", 0.0, 0.0),
        ("gateway_events_accepted_total", float(accepted + LAST_EVENTS), float(more)),
        ("gateway_events_published_total", float(accepted + LAST_EVENTS), float(more)),
        ("gateway_events_duplicates_total", float(client["repeats_told"]), 0.0),
    ]
    found = [(name, books.get(name, math.nan), least, above) for name, least, above in rows]
    if not client["sheds"]:  # the log may refuse a batch as one
        refused = sum(
            value for name, value in books.items() if name.startswith("gateway_events_refused_")
        )
        found.append(("gateway_events_refused_total", refused, float(client["refusals_due"]), 0.0))
    return found


def judge(
    slo: Slo, plan: Plan, client: Mapping[str, Any], arrivals: Arrivals, books: Mapping[str, float]
) -> list[Finding]:
    """All findings of a run, in the order of slo.toml."""
    findings = steady_findings(slo, client, arrivals)
    if plan.has("burst"):
        failures = _failures(client, ["burst"], shed=True)
        found, limit = sum(failures.values()), slo.burst.failures_max
        findings.append(most("burst.failures_max", found, limit, _say(failures)))
    others = [name for name, _ in plan.phases if name not in ("steady", "burst")]
    failures = _failures(client, others, shed=True)
    found, limit = sum(failures.values()), slo.outage.failures_max
    findings.append(most("outage.failures_max", found, limit, _say(failures)))
    if plan.has("outage"):
        findings += outage_findings(slo, client, arrivals)
    return [
        *findings,
        *event_findings(slo, client, arrivals, books),
        *client_findings(slo, client),
    ]


def exit_code(findings: Iterable[Finding]) -> int:
    """MISSED when anything was missed that a late client does not excuse; else VOID; else MET."""
    missed = [finding for finding in findings if finding.verdict == "MISSED"]
    if any(not finding.timed for finding in missed):
        return MISSED
    if any(finding.verdict == "VOID" for finding in findings):
        return VOID
    return MISSED if missed else MET
