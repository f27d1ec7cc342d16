"""Content-Encoding undone: whole or refused, never more memory than the limit and a step (guarantee
17)."""

import gzip
import random
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from typing import Final

import pytest
from backports import zstd

from gateway import inflate as module
from gateway.errors import NUMBER
from gateway.inflate import (
    CODINGS,
    FEED_BYTES,
    RATIO_ABOVE_BYTES,
    STEP_BYTES,
    WINDOW_BYTES_MAX,
    inflate,
)
from tests.gateway_process import ROOT

COMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip": gzip.compress,
    "zstd": zstd.compress,
}
NO_RATIO: Final = 1 << 40
BAD: Final = (NUMBER["bad_encoding"], b"")
TOO_LARGE: Final = NUMBER["batch_too_large"]


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    "size",
    [0, 1, 100, *(n + d for n in (FEED_BYTES, STEP_BYTES, 3 * STEP_BYTES) for d in (-1, 0, 1))],
)
@pytest.mark.parametrize("kind", ["noise", "alike"])
def test_what_was_compressed_comes_back_at_every_size_of_a_step(
    coding: str, size: int, kind: str
) -> None:
    data = noise(size, 1) if kind == "noise" else (b'{"metrics":{}}\n' * size)[:size]
    body = COMPRESS[coding](data)
    assert inflate(coding, body, size, NO_RATIO) == (0, data)
    if size:
        code, made = inflate(coding, body, size - 1, NO_RATIO)
        assert code == TOO_LARGE
        assert data.startswith(made)
        assert len(made) == size


@pytest.mark.parametrize("coding", CODINGS)
def test_the_ratio_counts_above_its_size_only(coding: str) -> None:
    small = COMPRESS[coding](bytes(RATIO_ABOVE_BYTES))
    assert inflate(coding, small, 1 << 20, 1)[0] == 0
    one_more = COMPRESS[coding](bytes(RATIO_ABOVE_BYTES + 1))
    assert inflate(coding, one_more, 1 << 20, 1)[0] == TOO_LARGE
    data = bytes(500_000)
    body = COMPRESS[coding](data)
    ratio = -(-len(data) // len(body))
    assert inflate(coding, body, 1 << 20, ratio) == (0, data)
    assert inflate(coding, body, 1 << 20, ratio - 1)[0] == TOO_LARGE


@pytest.mark.parametrize("coding", CODINGS)
def test_a_body_that_ends_at_any_byte_is_refused(coding: str) -> None:
    body = COMPRESS[coding](b'{"metrics":{"temp_c":21.5}}' * 3)
    assert [n for n in range(len(body)) if inflate(coding, body[:n], 1 << 20, 100) != BAD] == []


SKIPPABLE: Final = struct.pack("<II", 0x184D2A50, 4) + b"none"


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [10, FEED_BYTES, 5 * FEED_BYTES])
def test_anything_behind_the_end_is_refused(coding: str, size: int) -> None:
    body = COMPRESS[coding](noise(size, 2))
    for behind in (b"\0", b"\n", b"x" * FEED_BYTES, body, SKIPPABLE):
        assert inflate(coding, body + behind, 1 << 20, 100) == BAD


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_behind_an_end_at_the_end_of_a_step_is_refused(coding: str) -> None:
    sizes = range(FEED_BYTES - 100, FEED_BYTES)
    bodies = (COMPRESS[coding](noise(size, 3)) for size in sizes)
    body = next(body for body in bodies if len(body) == FEED_BYTES)
    assert inflate(coding, body, 1 << 20, 100)[0] == 0
    assert inflate(coding, body + b"x", 1 << 20, 100) == BAD


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_not_that_coding_is_refused(coding: str) -> None:
    data = b'{"metrics":{}}'
    other = next(name for name in CODINGS if name != coding)
    deflate = zlib.compressobj(wbits=-15)
    raw = deflate.compress(data) + deflate.flush()
    for body in (data, b"", COMPRESS[other](data), raw, zlib.compress(data), SKIPPABLE + b"x"):
        assert inflate(coding, body, 1 << 20, 100) == BAD


@pytest.mark.parametrize("coding", CODINGS)
def test_a_flipped_byte_never_makes_other_data(coding: str) -> None:
    data = b"".join(b'{"seq":%d,"metrics":{"a":%d}}\n' % (i, i * i) for i in range(40))
    checksum = {zstd.CompressionParameter.checksum_flag: 1}
    body = gzip.compress(data) if coding == "gzip" else zstd.compress(data, options=checksum)
    for i in range(len(body)):
        code, made = inflate(coding, body[:i] + bytes([body[i] ^ 0x41]) + body[i + 1 :], 4096, 100)
        assert code or made == data, f"byte {i}"


def zstd_with(window_log: int) -> bytes:
    options = {zstd.CompressionParameter.window_log: window_log}
    compressor = zstd.ZstdCompressor(options=options)  # streamed: the size is not in the header
    return compressor.compress(b"{}" * 100) + compressor.flush()


def test_a_window_larger_than_the_coding_allows_is_refused() -> None:
    log = WINDOW_BYTES_MAX.bit_length() - 1
    assert inflate("zstd", zstd_with(log), 4096, 100) == (0, b"{}" * 100)
    for larger in range(log + 1, 32):
        assert inflate("zstd", zstd_with(larger), 4096, 100) == BAD


def test_a_frame_that_needs_a_dictionary_is_refused() -> None:
    samples = [b'{"seq":%d,"metrics":{"temp_c":%d}}' % (i, i % 7) for i in range(2000)]
    body = zstd.compress(samples[0], zstd_dict=zstd.train_dict(samples, 4096))
    assert zstd.get_frame_info(body).dictionary_id
    assert inflate("zstd", body, 4096, 100) == BAD


def test_frames_of_random_bytes_are_refused() -> None:
    seed = random.randrange(1 << 30)
    source = random.Random(seed)
    for start, coding in ((b"\x1f\x8b\x08\0\0\0\0\0\0\xff", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        for _ in range(2000):
            body = start + source.randbytes(source.randrange(200))
            code, made = inflate(coding, body, 1 << 16, 100)
            assert code or len(made) <= 1 << 16, f"seed {seed}"


# ---- bombs ---------------------------------------------------------------------------------------

BOMB = """
    import sys, time
    from gateway.inflate import inflate

    def high_kib():
        return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

    coding, most = sys.argv[1], int(sys.argv[2])
    body = sys.stdin.buffer.read()
    inflate(coding, body[:1000], most, 1 << 40)  # what it needs once
    open("/proc/self/clear_refs", "w").write("5")  # the high mark begins again, at what is in use
    before = high_kib()
    began = time.process_time()
    code, made = inflate(coding, body, most, 1 << 40)
    took_ms = 1000 * (time.process_time() - began)
    print(code, len(made), high_kib() - before, took_ms)
"""


def ten_gib_of_zeros() -> bytes:
    """Gzipped. A full flush makes blocks that can stand anywhere, so one is made and repeated."""
    stream = zlib.compressobj(9, wbits=31)
    head = stream.compress(b"") + stream.flush(zlib.Z_FULL_FLUSH)
    block = stream.compress(bytes(64 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    return head + block * 160


def explode(coding: str, body: bytes, most: int) -> tuple[int, int, int, float]:
    """Code, bytes, growth of the process in KiB, CPU in ms; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOMB), coding, str(most)],
        input=body,
        capture_output=True,
        cwd=ROOT,
        check=True,
    )
    code, size, kib, took_ms = done.stdout.split()
    return int(code), int(size), int(kib), float(took_ms)


@pytest.fixture(scope="module")
def bombs() -> dict[str, tuple[str, bytes]]:
    gigabytes = ten_gib_of_zeros()
    return {
        "10 GiB": ("gzip", gigabytes),
        "10 GiB in two layers": ("gzip", gzip.compress(gigabytes)),
        "10 GiB in zstd": ("zstd", zstd.compress(gigabytes)),
        "1 GiB of zstd": ("zstd", zstd.compress(bytes(1 << 28)) * 4),
    }


@pytest.mark.parametrize(
    "name", ["10 GiB", "10 GiB in two layers", "10 GiB in zstd", "1 GiB of zstd"]
)
def test_a_bomb_costs_the_limit_and_little_more(
    bombs: dict[str, tuple[str, bytes]], name: str
) -> None:
    code, size, kib, took_ms = explode(*bombs[name], 1 << 20)
    assert (code, size) == (TOO_LARGE, (1 << 20) + 1)
    copies = 2 if bombs[name][0] == "zstd" else 1  # the other one is its window
    assert kib < copies * 1024 + 768, "1 MiB and some steps"
    assert took_ms < 100


def test_the_measurement_sees_a_limit_that_is_too_high(bombs: dict[str, tuple[str, bytes]]) -> None:
    _, _, kib, _ = explode(*bombs["10 GiB"], 64 << 20)
    assert kib > 60 << 10


def test_without_the_ratio_a_small_bomb_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    body = gzip.compress(bytes(1 << 20))
    assert inflate("gzip", body, 1 << 20, 100)[0] == TOO_LARGE
    monkeypatch.setattr(module, "RATIO_ABOVE_BYTES", 1 << 30)
    assert inflate("gzip", body, 1 << 20, 100)[0] == 0
