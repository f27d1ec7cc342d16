"""Content-Encoding undone: gzip (RFC 1952) and zstd (RFC 8878), in steps, so that a small body
cannot become a large one.

    compressed, whole ──▶ FEED_BYTES in ──▶ at most STEP_BYTES out ──▶ too large? ──▶ next step
                                                                        │
                                                                        ▼ stop: nothing more is made

In memory: what came out so far, never more than `bytes_max` and one step, and the decoder's window
(gzip 32 KiB, zstd what the frame asks for, at most `WINDOW_BYTES_MAX`, touched no further than it
is used). One member of gzip, one frame of zstd: a second one, padding or anything else behind it is
an error, and so are a frame that needs a dictionary and a body that ends too early. Otherwise two
readers of one body could disagree about what is in it."""

import io
import zlib
from typing import Any, Final

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from gateway.errors import NUMBER

FEED_BYTES: Final = 16 * 1024
STEP_BYTES: Final = 64 * 1024
RATIO_ABOVE_BYTES: Final = 64 * 1024
"""Below this size no ratio is too high: a few events that are alike compress well."""
WINDOW_BYTES_MAX: Final = 8 << 20
"""What RFC 9659 lets a sender of the coding zstd use, and asks a receiver to have."""
_GZIP_ONLY: Final = zlib.MAX_WBITS + 16
_WINDOW: Final[dict[int, int]] = {
    DecompressionParameter.window_log_max: WINDOW_BYTES_MAX.bit_length() - 1
}

BAD_ENCODING: Final = NUMBER["bad_encoding"]
BATCH_TOO_LARGE: Final = NUMBER["batch_too_large"]

CODINGS: Final = ("gzip", "zstd")
"""What `inflate` knows."""


def inflate(coding: str, body: bytes, bytes_max: int, ratio_max: int) -> tuple[int, bytes]:
    """What `body` was before `coding` (one of CODINGS), as (0, bytes).

    Refused: (BAD_ENCODING, b"") when it is not one whole member or frame of that coding;
    (BATCH_TOO_LARGE, the beginning) when it holds more than `bytes_max` bytes, or more than
    RATIO_ABOVE_BYTES and `ratio_max` times its own size."""
    stream: Any = (
        zlib.decompressobj(_GZIP_ONLY) if coding == "gzip" else ZstdDecompressor(options=_WINDOW)
    )
    size_max = min(bytes_max, max(RATIO_ABOVE_BYTES, ratio_max * len(body)))
    whole = io.BytesIO()  # its `getvalue` hands its buffer over and copies nothing
    size = 0
    try:
        for at in range(0, len(body), FEED_BYTES):
            piece = body[at : at + FEED_BYTES]
            while True:
                most = min(STEP_BYTES, size_max + 1 - size)
                made = stream.decompress(piece, most)
                size += whole.write(made)
                if size > size_max:
                    return BATCH_TOO_LARGE, whole.getvalue()
                if stream.eof:
                    if stream.unused_data or at + FEED_BYTES < len(body):
                        return BAD_ENCODING, b""
                    return 0, whole.getvalue()
                # zlib gives back what it did not take; zstd keeps it
                piece = getattr(stream, "unconsumed_tail", b"")
                if not piece and len(made) < most:
                    break
    except (zlib.error, ZstdError):
        return BAD_ENCODING, b""
    return BAD_ENCODING, b""
