"""The log's file, read and written a second time: from the drawing in _native/gw_log.h alone.

`python -m tests.log_tools` writes tests/golden/log_v1.bin.gz again.
"""

import gzip
import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

PAGE = 4096
RING = 4 * PAGE
FIRST_LSN = PAGE
RECORD_MIN = 64
DATA, VOID, PAD = 0, 1, 2
LOG_MAGIC, SLOT_MAGIC, VERSION = b"GATWLOG1", b"GTWSLOT1", 1
PAD_LOST = 1
PAD_SEED = 0x50414421
EPOCHS_MAX, SINKS_MAX = 32, 8
GOLDEN = Path(__file__).parent / "golden" / "log_v1.bin.gz"
MASK = (1 << 64) - 1

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(data: bytes, crc: int = 0) -> int:
    """Castagnoli, a byte at a time (RFC 3720, B.4)."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def siphash13(key: tuple[int, int], data: bytes) -> int:
    """SipHash with one round a word and three at the end (Aumasson, Bernstein)."""

    def turn(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & MASK

    def rounds(n: int) -> None:
        for _ in range(n):
            v[0] = (v[0] + v[1]) & MASK
            v[2] = (v[2] + v[3]) & MASK
            v[1] = turn(v[1], 13) ^ v[0]
            v[3] = turn(v[3], 16) ^ v[2]
            v[0] = turn(v[0], 32)
            v[2] = (v[2] + v[1]) & MASK
            v[0] = (v[0] + v[3]) & MASK
            v[1] = turn(v[1], 17) ^ v[2]
            v[3] = turn(v[3], 21) ^ v[0]
            v[2] = turn(v[2], 32)

    text = b"somepseudorandomlygeneratedbytes"
    v = [int.from_bytes(text[i : i + 8]) ^ key[i // 8 % 2] for i in range(0, 32, 8)]
    whole = len(data) // 8 * 8
    last = data[whole:].ljust(7, b"\0") + bytes([len(data) & 0xFF])
    for i in range(0, whole + 8, 8):
        word = int.from_bytes((data[:whole] + last)[i : i + 8], "little")
        v[3] ^= word
        rounds(1)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(3)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def mix(secret: tuple[int, int], epoch: int) -> int:
    return siphash13(secret, struct.pack("<Q", epoch))


@dataclass(frozen=True)
class Identity:
    capacity: int
    record_bytes_max: int
    identity: int
    secret: tuple[int, int]
    created_at_ns: int

    def encode(self) -> bytes:
        fields = (self.capacity, self.record_bytes_max, self.identity, *self.secret)
        rest = struct.pack("<6Q", *fields, self.created_at_ns)
        rest = rest.ljust(PAGE - 16, b"\0")
        head = LOG_MAGIC + struct.pack("<I", VERSION)
        return head + struct.pack("<I", crc32c(head + bytes(4) + rest)) + rest

    @classmethod
    def decode(cls, page: bytes) -> "Identity":
        capacity, most, identity, a, b, created = struct.unpack_from("<6Q", page, 16)
        found = cls(capacity, most, identity, (a, b), created)
        assert found.encode() == page
        return found


@dataclass(frozen=True)
class SlotCursor:
    name: str
    lsn: int
    ordinal: int
    published: int
    dead_lettered: int
    base: int
    skipped: int = 0


@dataclass(frozen=True)
class Slot:
    sequence: int
    watermark: int
    epoch: int
    ranges: tuple[tuple[int, int], ...]
    """(first lsn, epoch), oldest first."""
    cursors: tuple[SlotCursor, ...]
    lost_from: tuple[int, ...] = ()
    """Of each range: the first hole that recovery found in it; 0: none."""
    optional: int = 0
    """Bit i: reclaim was allowed to pass cursors[i]."""

    def encode(self) -> bytes:
        rest = struct.pack("<QQ", self.sequence, self.watermark)
        rest += struct.pack("<IIII", self.epoch, len(self.ranges), len(self.cursors), self.optional)
        rest += b"".join(struct.pack("<QQ", *r) for r in self.ranges)
        rest = rest.ljust(32 + 16 * EPOCHS_MAX, b"\0")
        for c in self.cursors:
            rest += c.name.encode().ljust(16, b"\0")
            rest += struct.pack("<6Q", *astuple(c)[1:])
        rest = rest.ljust(32 + 16 * EPOCHS_MAX + 64 * SINKS_MAX, b"\0")
        rest += struct.pack(f"<{len(self.lost_from)}Q", *self.lost_from)
        rest = rest.ljust(PAGE - 16, b"\0")
        head = SLOT_MAGIC + struct.pack("<I", VERSION)
        return head + struct.pack("<I", crc32c(head + bytes(4) + rest)) + rest

    @classmethod
    def decode(cls, page: bytes) -> "Slot | None":
        sequence, watermark, epoch, ranges, sinks, optional = struct.unpack_from(
            "<QQIIII", page, 16
        )
        if page[:8] != SLOT_MAGIC or ranges > EPOCHS_MAX or sinks > SINKS_MAX:
            return None
        cursors = []
        for i in range(sinks):
            at = 48 + 16 * EPOCHS_MAX + 64 * i
            name = page[at : at + 16].rstrip(b"\0").decode()
            cursors.append(SlotCursor(name, *struct.unpack_from("<6Q", page, at + 16)))
        table = tuple(struct.unpack_from("<QQ", page, 48 + 16 * i) for i in range(ranges))
        lost = struct.unpack_from(f"<{ranges}Q", page, 48 + 16 * EPOCHS_MAX + 64 * SINKS_MAX)
        losses = lost if any(lost) else ()
        found = cls(sequence, watermark, epoch, table, tuple(cursors), losses, optional)
        return found if found.encode() == page else None


@dataclass(frozen=True)
class LogRecord:
    lsn: int
    kind: int
    epoch: int
    received_at_ns: int = 0
    seq: int = 0
    boot: int = 0
    flags: int = 0
    splice: int = 0
    device_id: bytes = b""
    body: bytes = b""
    pad_size: int = 0

    @property
    def size(self) -> int:
        used = RECORD_MIN + len(self.device_id) + len(self.body)
        return self.pad_size if self.kind == PAD else (used + 7) // 8 * 8

    def encode(self, secret: tuple[int, int]) -> bytes:
        """All of it; of a PAD its header."""
        rest = struct.pack("<I", self.epoch)
        rest += struct.pack("<QQQQ", self.size, self.received_at_ns, self.seq, self.boot)
        rest += struct.pack(
            "<IBBBB", len(self.body), len(self.device_id), self.flags, self.kind, self.splice
        )
        rest += bytes(8) + self.device_id + self.body
        crc = crc32c(rest + struct.pack("<Q", self.lsn), PAD_SEED if self.kind == PAD else 0)
        marker = (self.lsn | self.kind) ^ mix(secret, self.epoch)
        whole = struct.pack("<QI", marker, crc) + rest
        return whole.ljust(RECORD_MIN if self.kind == PAD else self.size, b"\0")

    @classmethod
    def decode(cls, lsn: int, data: bytes) -> "LogRecord":
        """From its bytes and whatever follows; `Image.record` checks it by encoding it again."""
        epoch, size, received, seq, boot, body, device, flags, kind, splice = struct.unpack_from(
            "<IQQQQIBBBB", data, 12
        )
        at = RECORD_MIN + device
        return cls(
            lsn, kind, epoch, received, seq, boot, flags, splice, data[RECORD_MIN:at],
            data[at : at + body], size if kind == PAD else 0,
        )  # fmt: skip


@dataclass
class Image:
    """A log file as bytes."""

    data: bytearray
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        self.identity = Identity.decode(bytes(self.data[:PAGE]))
        assert len(self.data) == RING + self.identity.capacity
        assert not any(self.data[3 * PAGE : RING])

    @classmethod
    def new(cls, identity: Identity) -> "Image":
        return cls(bytearray(identity.encode()) + bytes(RING - PAGE + identity.capacity))

    def get(self, lsn: int, size: int) -> bytes:
        at = lsn % self.identity.capacity
        ring = self.data[RING:]
        return bytes((ring[at:] + ring[:at])[:size])

    def put(self, lsn: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            self.data[RING + (lsn + i) % self.identity.capacity] = byte

    def slots(self) -> tuple[Slot | None, Slot | None]:
        a, b = (bytes(self.data[PAGE * i : PAGE * (i + 1)]) for i in (1, 2))
        return Slot.decode(a), Slot.decode(b)

    def slot(self) -> Slot:
        return max((slot for slot in self.slots() if slot), key=lambda slot: slot.sequence)

    def put_slot(self, slot: Slot) -> None:
        at = PAGE * (1 + slot.sequence % 2)
        self.data[at : at + PAGE] = slot.encode()

    def record(self, lsn: int) -> LogRecord | None:
        """The record at lsn, if every one of its bytes is as the drawing has it."""
        head = self.get(lsn, RECORD_MIN)
        body, device = struct.unpack_from("<IB", head, 48)
        if RECORD_MIN + body + device > self.identity.record_bytes_max:
            return None
        found = LogRecord.decode(lsn, self.get(lsn, RECORD_MIN + body + device))
        encoded = found.encode(self.identity.secret)
        return found if self.get(lsn, len(encoded)) == encoded else None

    def records(self, lsn: int) -> Iterator[LogRecord]:
        while record := self.record(lsn):
            yield record
            lsn += record.size


def golden() -> tuple[Image, list[LogRecord]]:
    """All there is: laps, epochs, sinks, VOID, PADs, a record over the ring's end, a torn one."""
    capacity = 1 << 20
    identity = Identity(
        capacity, capacity // 8, 0x1122334455667788, (0x0706050403020100, 0x0F0E0D0C0B0A0908),
        1758626321123456789,
    )  # fmt: skip
    image = Image.new(identity)
    lsn = start = 3 * capacity - 600
    records: list[LogRecord] = []

    def add(record: LogRecord) -> None:
        nonlocal lsn
        image.put(lsn, record.encode(identity.secret))
        records.append(record)
        lsn += record.size

    def event(n: int, epoch: int, kind: int = DATA, payload: int = 0) -> LogRecord:
        body = b'{"seq":%d,"boot":%d,"metrics":{"t":%d.5}%s}' % (n, n // 2, n, b" " * payload)
        return LogRecord(
            lsn, kind, epoch, 1758626321000000000 + n, n, n // 2, 6, 1, b"dev-%d" % n, body
        )

    for n in range(1, 4):
        add(event(n, 2))
    add(event(4, 2, VOID))
    add(event(5, 2, payload=200))  # over the ring's end
    assert records[-1].lsn < 3 * capacity < lsn
    middle = lsn
    add(event(6, 2))
    add(LogRecord(lsn, PAD, 2, pad_size=1000))
    add(LogRecord(lsn, PAD, 2, pad_size=64))
    epoch_3 = lsn
    add(event(7, 3))
    add(LogRecord(lsn, DATA, 3, 1, 0, 0, 0, 0, b"d", b"{}"))
    watermark = lsn
    add(event(8, 3, payload=1))
    torn = event(9, 3, payload=600)
    image.put(lsn, torn.encode(identity.secret)[:300])
    lsn += torn.size
    add(event(10, 3))
    # a former lap's record stands behind the end, whole
    former = replace(event(11, 2), lsn=lsn - capacity)
    image.put(former.lsn, former.encode(identity.secret))
    ranges = ((FIRST_LSN, 1), (2 * capacity, 2), (epoch_3, 3))
    sinks = (
        SlotCursor("mqtt", start, 5000, 4000, 10, 990),
        SlotCursor("file", middle, 5004, 5004, 0, 0),
    )
    image.put_slot(
        Slot(
            40,
            start,
            3,
            ranges,
            (sinks[0], replace(sinks[1], lsn=start, ordinal=5000, published=5000)),
        )
    )
    image.put_slot(Slot(41, watermark, 3, ranges, sinks))
    return image, records


if __name__ == "__main__":
    GOLDEN.write_bytes(gzip.compress(bytes(golden()[0].data), mtime=0))
