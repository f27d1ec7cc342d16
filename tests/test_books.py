"""The books of a whole gateway (guarantee 5): a build that loses one record shows exactly that."""

import subprocess
import sysconfig
from pathlib import Path

from tests.gateway_process import ROOT, GatewayProcess, wait_for
from tests.mosquitto import Mosquitto

EVENTS = 20


def unexplained_after_publishing(root: Path, folder: Path) -> dict[str, float]:
    """/metrics of the gateway in `root` once everything it took is behind the cursor."""
    with Mosquitto(folder / "mosquitto") as broker:
        gateway = GatewayProcess(
            folder / "gateway", {"mqtt.url": f"mqtt://127.0.0.1:{broker.port}"}
        )
        gateway.root = root
        with gateway:
            for _ in range(EVENTS):
                assert gateway.post() == 202
            wait_for(lambda: gateway.metric("gateway_events_waiting") == 0)
            return gateway.metrics()


def build_that_skips(ordinal: int, folder: Path) -> Path:
    """The package with a `_mqtt` that passes over one record without publishing it."""
    package = folder / "gateway"
    package.mkdir(parents=True)
    for path in (ROOT / "gateway").iterdir():
        if not path.name.startswith(("_mqtt.c", "__pycache__")):
            (package / path.name).symlink_to(path)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    patterns = ("gw_mqtt*.c", "gw_crc32c.c", "gw_log*.c")
    sources = sorted(path for pattern in patterns for path in (ROOT / "_native").glob(pattern))
    subprocess.run(
        [
            *("gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-w", "-D_GNU_SOURCE"),
            *("-I_native", f"-I{sysconfig.get_path('include')}", f"-DGW_MUTANT_SKIP={ordinal}"),
            "build/cython/_native/mqtt.c",
            *sources,
            *("-o", package / f"_mqtt{suffix}"),
        ],
        cwd=ROOT,
        check=True,
    )
    return folder


def test_the_books_balance(tmp_path):
    books = unexplained_after_publishing(ROOT, tmp_path)
    assert books["gateway_events_accepted_total"] == EVENTS
    assert books["gateway_events_published_total"] == EVENTS
    assert books["gateway_unexplained_events"] == 0


def test_a_build_that_skips_one_record_shows_one_unexplained_event(tmp_path):
    books = unexplained_after_publishing(build_that_skips(5, tmp_path / "mutant"), tmp_path)
    assert books["gateway_events_accepted_total"] == EVENTS
    assert books["gateway_events_published_total"] == EVENTS - 1
    assert books["gateway_unexplained_events"] == 1
