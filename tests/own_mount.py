"""A file system of one's own for a moment: small, or read-only. Needs no root: a user namespace."""

import os
import subprocess
import sys
from pathlib import Path

from tests.native_build import ROOT


def on_tmpfs(mount: Path, script: str, size: str = "64m") -> subprocess.CompletedProcess[str]:
    """Run `script` (sh) where a tmpfs lies on the folder `mount`, which is made. It finds it in
    $MOUNT, and `$GATEWAY` is the command line; nobody else sees the mount."""
    mount.mkdir()
    gateway = mount.parent / "gateway-command"
    gateway.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gateway "$@"\n')
    gateway.chmod(0o700)
    return subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-e", "-c"),
            f'mount -t tmpfs -o size={size} none "$MOUNT"\n{script}',
        ],
        cwd=ROOT,
        env={**os.environ, "MOUNT": str(mount), "GATEWAY": str(gateway)},
        capture_output=True,
        text=True,
        timeout=60,
    )
