"""The load test: fleets of devices against gateway and Mosquitto, judged by `slo.toml`.

    .venv/bin/python -m loadtest [--quick] [--attempts N]        (make loadtest [LOAD=quick])

    __main__    the command: phases, findings, report, exit code
    run         starts broker, subscriber, gateway and locust; takes the broker away and back
    locustfile  the fleets and the shape; runs inside locust, gevent stays there
    subscriber  counts what the broker delivers, in a process of its own
    plan        who sends how much in which phase
    accounts    events as sets of (device, boot, seq)
    verdict     the SLOs against what client, subscriber and gateway recorded
    slo.toml    the SLOs: the one place where they are written

One run is judged from three sides, each with records of its own: the client knows what it sent and
how it was answered, the subscriber knows what arrived, and the gateway's books (/metrics) must say
the same. Events are accounted for one by one: an event that was accepted and never arrives is not
made good by another one that arrives twice.

The load is an open loop. Each device has a schedule in absolute time; when an answer is late, the
requests behind it are late as well, and that counts as their latency. When locust itself is late,
nothing was measured: such a run is void, which is neither good nor bad.
"""
