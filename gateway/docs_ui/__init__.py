"""The docs page: Swagger UI from files beside this one, so that it works with no other network.

    /docs, /docs/ ──▶ index.html ──▶ swagger-ui.css, page.css, swagger-ui-bundle.js, init.js
                                     init.js ──▶ /docs/openapi.json (gateway.openapi)

What is Swagger UI's comes unchanged from its npm package swagger-ui-dist, `VERSION`; SHA256SUMS has
the sums of those files, LICENSE and NOTICE are its own. To take another version: copy these files
from its package, renew the sums (`sha256sum`), change `VERSION`.

A file is read for each request and not kept: few ask, and the bundle is 1.7 MB that each worker
would hold. Browsers ask once a version, since the version is in the address."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway.http import Answer

VERSION: Final = "5.35.0"
"""Of swagger-ui-dist."""
FOLDER: Final = Path(__file__).parent

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # icons in the style sheet
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy (CSP level 3) of everything here: nothing inline, nobody else's, in no
frame."""
_SAFE: Final = (
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
)
_PINNED: Final = ("cache-control", "public, max-age=31536000, immutable")
_OURS: Final = ("cache-control", "no-cache")
"""Asked for again each time: these are small, and must fit the gateway that answers."""

_HTML: Final = "text/html; charset=utf-8"
_CSS: Final = "text/css; charset=utf-8"
_SCRIPT: Final = "text/javascript; charset=utf-8"
ASSETS: Final = {
    "swagger-ui.css": (_CSS, _PINNED),
    "swagger-ui-bundle.js": (_SCRIPT, _PINNED),
    "page.css": (_CSS, _OURS),
    "init.js": (_SCRIPT, _OURS),
    "icon.svg": ("image/svg+xml", _OURS),
}
"""Files by name: media type and how long a browser keeps them."""


def pages() -> dict[str, Callable[[str | None], Answer]]:
    """GET pages by path, as `gateway.worker.App.pages` has them. Nothing is read before the first
    request for it; a file that is gone is an OSError then."""
    return {
        "/docs": _index,
        "/docs/": _index,
        **{f"/docs/{name}": _asset(name) for name in ASSETS},
    }


def _asset(name: str) -> Callable[[str | None], Answer]:
    media_type, kept = ASSETS[name]
    return lambda accept: _answer(media_type, kept, (FOLDER / name).read_bytes())


def _index(accept: str | None) -> Answer:
    text = (FOLDER / "index.html").read_text()
    return _answer(_HTML, _OURS, text.replace("@VERSION@", VERSION).encode())


def _answer(media_type: str, kept: tuple[str, str], body: bytes) -> Answer:
    return Answer(200, [("content-type", media_type), kept, *_SAFE], body)
