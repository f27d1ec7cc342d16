"""What is each peer known to reach? The one table of the shares of nginx's rate.

Measured when the peers were chosen, on an idle machine of 2 cores: requests a second answered 2xx
by one process of the peer, divided by those that nginx answers with `return 202` in the same
rounds (wrk -t1 -c64, one event of 142 bytes a request, QoS 1 to Mosquitto on the same machine). A
peer that falls more than VOID_BELOW under its share is not itself, and a comparison with it would
flatter: the row is void.

The share depends on the machine: where nginx, which does little but system calls, is twice as fast
as it was there, a peer that is as fast as ever has half its share. So a peer that reaches the rate
itself which it is known for is not void.
"""

from typing import Final

from benchmarks.harness import Voided

SHARES: Final[dict[str, float]] = {
    "fastapi": 0.034,
    "robyn": 0.068,
    "gmqtt": 0.198,
    "aiomqtt": 0.087,
    "node_red": 0.036,
    "thingsboard": 0.033,
}
RATES: Final[dict[str, float]] = {
    "fastapi": 4_276,
    "robyn": 9_398,
    "gmqtt": 27_100,
    "aiomqtt": 12_100,
    "node_red": 4_700,
    "thingsboard": 3_962,
}
"""2xx a second in the same measurement, beside 103 000 to 142 000 of nginx."""
VOID_BELOW: Final = 0.20


def share_min(peer: str) -> float:
    """The least share of nginx's rate with which the peer counts."""
    return (1 - VOID_BELOW) * SHARES[peer]


def judge(peer: str, rate: float, nginx: float) -> None:
    """Raises Voided when the peer is not what it is known to be."""
    share = rate / nginx
    if share < share_min(peer) and rate < RATES[peer]:
        raise Voided(
            f"{peer} reached {share:.3f} of nginx's rate ({rate:,.0f} of {nginx:,.0f}/s); below"
            f" {share_min(peer):.3f} and {RATES[peer]:,.0f}/s it is not the peer that is known to"
            f" reach {SHARES[peer]}"
        )
