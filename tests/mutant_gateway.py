"""Other builds of the gateway for tests: with a fault put in, or with fail points.

    root = package(folder, python={"waiting.py": [(old, new)]})
    root = package(folder, native={"_log": Native({"gw_ingest.c": [(old, new)]})})
    GatewayProcess.root = root

What is not changed is a link to the real thing. A text to be replaced must stand in its file
exactly once, so that a control whose place has moved fails and says so."""

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.gateway_process import ROOT
from tests.native_build import CACHE, NATIVE, _digest, _headers, _make

Edits = Sequence[tuple[str, str]]
SOURCES = {
    "_log": (
        "log.c",
        ("gw_crc32c.c", "gw_log*.c", "gw_ingest.c", "gw_batch.c", "gw_validator*.c"),
    ),
    "_waiting": ("waiting.c", ("gw_crc32c.c", "gw_log*.c", "gw_waiting.c")),
    "_mqtt": ("mqtt.c", ("gw_crc32c.c", "gw_log*.c", "gw_mqtt*.c")),
}


@dataclass(frozen=True)
class Native:
    """How a compiled module differs."""

    edits: Mapping[str, Edits] = field(default_factory=dict)
    flags: Sequence[str] = ()


def edited(path: Path, edits: Edits) -> str:
    """The text of a file with each edit made."""
    text = path.read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{path.name} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def compiled(module: str, native: Native) -> Path:
    """The shared object of `gateway.<module>`, built without optimisation: it is quick to make."""
    binding, patterns = SOURCES[module]
    sources = [ROOT / "build" / "cython" / "_native" / binding]
    sources += sorted(path for pattern in patterns for path in NATIVE.glob(pattern))
    texts = {path: edited(path, native.edits.get(path.name, ())) for path in sources}
    assert set(native.edits) <= {path.name for path in sources}
    digest = _digest(_headers(), *native.flags, *texts.values())
    folder = CACHE / "gateways" / f"{module}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = []
    for path, text in texts.items():
        inputs.append(folder / path.name if path.name in native.edits else path)
        if path.name in native.edits:
            inputs[-1].write_text(text)
    include = ("-I_native", f"-I{sysconfig.get_path('include')}")
    gcc = ("gcc", "-std=gnu11", "-O0", "-shared", "-fPIC", "-w", "-D_GNU_SOURCE")
    return _make(folder / f"{module}.so", [*gcc, *native.flags, *include, *inputs])


def package(
    folder: Path,
    python: Mapping[str, Edits] | None = None,
    native: Mapping[str, Native] | None = None,
) -> Path:
    """A folder whose `gateway` differs from the real one."""
    root = folder / "gateway"
    root.mkdir(parents=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for path in (ROOT / "gateway").iterdir():
        if path.name == "__pycache__":
            continue
        edits = (python or {}).get(path.name)
        build = (native or {}).get(path.name.removesuffix(suffix))
        if edits:
            (root / path.name).write_text(edited(path, edits))
        else:
            module = path.name.removesuffix(suffix)
            (root / path.name).symlink_to(compiled(module, build) if build else path)
    return folder
