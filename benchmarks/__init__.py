"""Benchmarks: each figure of the gateway beside a named reference, measured in the same run.

    .venv/bin/python -m benchmarks [--quick] [--only NAME ...] [--gate]

One file answers one question; its docstring says which one and how. The order of a run:

    __main__   which benchmarks, machine and versions, table, results/latest.json, exit code
    harness    interleaved rounds, medians, and what becomes of a failure
    gates      the thresholds, all in one table
    validator, ingest, pipeline, ...   the questions
    peers/     what the figures are compared with

Three rules hold everywhere. Ratios of interleaved runs (A B A B ...) are compared, never absolute
numbers of two days. A run that failed, or that is only part of one, raises: it has no figure, not a
bad one. And no figure may depend on the bytes of one event: every event has a new seq and its own
values.
"""
