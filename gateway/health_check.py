"""`gateway health`: asks a running gateway for /readyz; for the health check of a container, which
has no curl, and for scripts.

Ready is what /readyz says: the log takes events. A broker that is away does not make a gateway
unready, since events wait in the log; `GET /healthz` tells about it."""

import contextlib
import http.client
import json
import sys
from typing import Final

from gateway.demo import address
from gateway.errors import Exit
from gateway.settings import HttpConfig

ANSWER_BYTES_MAX: Final = 64 * 1024
_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Who listens on every address is asked on loopback."""


def url_of(settings: HttpConfig) -> str:
    """Where a gateway with these settings answers this machine."""
    host = _ANY.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def run(url: str, timeout_s: float) -> int:
    """Print whether the gateway at `url` is ready; OK when it is, else ERROR. No answer within
    `timeout_s` is a no. Raises ConfigError (url)."""
    host, port = address(url)
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        text = answer.read(ANSWER_BYTES_MAX)
    except TimeoutError:
        return _no(f"{url}: no answer in {timeout_s:g} s")
    except (OSError, http.client.HTTPException) as error:
        return _no(f"{url}: {str(error) or type(error).__name__}; is the gateway running there?")
    finally:
        connection.close()
    state = None
    with contextlib.suppress(ValueError, AttributeError):
        state = json.loads(text).get("state")
    if not isinstance(state, str):
        return _no(f"{url}: answered {answer.status}, but not as a gateway does")
    if answer.status != 200:
        return _no(f"{url}: {state} ({answer.status}); its own lines and {url}/healthz say why")
    print(f"ready: {state}")
    return Exit.OK


def _no(why: str) -> int:
    print(f"not ready: {why}", file=sys.stderr)
    return Exit.ERROR
