"""What `gateway log ... --help` and `gateway dead-letters ... --help` teach."""

from typing import Final

LOG: Final = """\
Look at a log, or change its capacity. Only `resize` needs the gateway to be stopped.

examples:
  gateway log ls                               what it holds and what waits
  gateway log verify                           is it damaged, and where
  gateway log dump | jq .                      the events that wait, as NDJSON
  gateway log replay --since 2025-09-23T11:00:00Z
  gateway log resize --capacity 1GiB           make it larger
"""

LS: Final = """\
Print what a log holds: positions, the cursor of each sink, what waits to be published, how far back
a repeated event is recognised.

examples:
  gateway log ls
  gateway log ls --records 10 --set log.directory=DIR
"""

VERIFY: Final = """\
Check every record that waits in a log to be published, as the next start would; exits 8 when
something that was on the disk is damaged, and says where. Nothing is ever written.

examples:
  gateway log verify
  gateway log verify --all                     also what is published and not yet written over
  gateway log verify --json | jq .damage
"""

DUMP: Final = """\
Print records as NDJSON, one line each, with positions. Without options: what waits to be published.
A position is an lsn, as `gateway log ls` and the dump itself print it. Works beside a running
gateway, on what is in the file at that moment. Nothing is ever written to the log.

examples:
  gateway log dump | jq -r .body
  gateway log dump --all --device boiler-7     all that the ring still holds of one device
  gateway log dump --from 4096 --to 8192
  gateway log dump --since 2025-09-23T11:00:00Z --until 2025-09-23T12:00:00Z
  gateway log dump --all --output dump.ndjson
"""

REPLAY: Final = """\
Publish events of a log again, to the configured broker (mqtt.*), to the same topics: subscribers
see them again. Works on the log of a gateway that is stopped or running, whose log and connection
are left alone. It says what it will do first; everything at once wants --yes.

exits 9 when the broker could not be reached or did not answer, 10 when it refused some events.

examples:
  gateway log replay --since 2025-09-23T11:00:00Z --until 2025-09-23T12:00:00Z
  gateway log replay --device boiler-7 --set mqtt.url=mqtt://other-broker.example
  gateway log replay --from 4096 --to 8192
  gateway log replay --yes                     all that the log still holds
"""

RESIZE: Final = """\
Give a log another capacity, without losing anything that waits. Stop the gateway first. The old
file is kept as gateway.log.before-resize. Receipts, the recognition of repeats and the place of
each sink survive; a smaller log recognises repeats less far back.

examples:
  gateway log resize --capacity 1GiB
  gateway log resize --capacity 64MiB --set log.directory=DIR
"""

DEAD_LETTERS: Final = """\
Dead letters are events that the broker will never take as they are: it refused them for good (a
topic that it does not allow, a payload, a size), or they broke the connection again and again. They
lie in files beside the log, each with its reason, and the other events go on without them.
All commands work beside a running gateway, and without one.

  1. gateway dead-letters ls                  how many, why, from which devices
  2. mend the reason: allow the topic at the broker, raise its limit, repair the device
  3. gateway dead-letters requeue             publish them again; what is taken leaves the files
     gateway dead-letters drop --yes          or give them up
"""

DEAD_LETTERS_SHOW: Final = """\
Print dead letters as JSON, a line each, oldest first; `body` is the event as it was sent.

examples:
  gateway dead-letters show --reason 0x87 --limit 5
  gateway dead-letters show --device boiler-7 | jq -r .body
"""

REQUEUE: Final = """\
Publish dead letters again, now, with the settings mqtt.*; the topic is made anew from mqtt.topic,
and the client id is that of the gateway with "-requeue" behind it. What the broker takes leaves
the files, what it refuses again stays: then the exit code is 10; 9 when the broker cannot be
reached. Ctrl-C ends it at any time, and keeps what was not taken.

examples:
  gateway dead-letters requeue --config gateway.toml
  gateway dead-letters requeue --reason 0x87 --device boiler-7
"""

DROP: Final = """\
Remove dead letters for good. To remove all of them, say --yes.

examples:
  gateway dead-letters drop --reason 0x99
  gateway dead-letters drop --yes
"""
