"""Builds the native core: C11 from _native/gw_*.c, bound by thin Cython modules.

Environment switches: GW_SANITIZE=address|thread|undefined, GW_FAILPOINTS=1 (fail points for the
tests), GW_DEBUG=1 (-O1 -g). They change what is compiled, so each wants its own build directory.
"""

import copy
import os
import platform
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HEADERS = sorted(str(p) for p in Path("_native").glob("*.h"))
VALIDATOR = sorted(str(p) for p in Path("_native").glob("gw_validator*.c"))
INGEST = ["_native/gw_batch.c", "_native/gw_ingest.c"]
MQTT = sorted(str(p) for p in Path("_native").glob("gw_mqtt*.c"))
LOG = ["_native/gw_crc32c.c", *sorted(str(p) for p in Path("_native").glob("gw_log*.c"))]

cflags = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-fvisibility=hidden",
]
ldflags: list[str] = []
macros: list[tuple[str, str | None]] = [("_GNU_SOURCE", None)]
if platform.machine() == "x86_64":
    cflags += ["-mprfchw"]  # a hint; processors without it take it for nothing
if os.environ.get("GW_DEBUG"):
    cflags += ["-O1"]
if sanitize := os.environ.get("GW_SANITIZE"):
    cflags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
    ldflags += [f"-fsanitize={sanitize}"]
if os.environ.get("GW_FAILPOINTS"):
    macros += [("GW_FAILPOINTS", "1")]
if platform.system() != "Linux":
    raise SystemExit(
        "gateway runs on Linux only: it needs memfd, futex, pidfd and the parent-death signal"
    )


def extension(name: str, source: str, parts: list[str]) -> Extension:
    return Extension(
        f"gateway.{name}",
        [source, *parts],
        include_dirs=["_native"],
        depends=HEADERS,
        define_macros=macros,
        extra_compile_args=cflags,
        extra_link_args=ldflags,
    )


class BuildExt(build_ext):
    """Builds the modules side by side, each with its own objects: they share sources."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        build_ext.build_extension(own, ext)


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize(
        [
            extension("_validator", "_native/validator.pyx", VALIDATOR),
            extension("_log", "_native/log.pyx", [*LOG, *INGEST, *VALIDATOR]),
            extension("_waiting", "_native/waiting.pyx", ["_native/gw_waiting.c", *LOG]),
            extension("_mqtt", "_native/mqtt.pyx", [*MQTT, *LOG]),
            extension("_lines", "_native/lines.pyx", ["_native/gw_lines.c", *LOG]),
        ],
        build_dir="build/cython",
        language_level=3,
    ),
)
