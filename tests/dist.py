"""Builds sdist and wheel, compares, and uses them:  python -m tests.dist     (scripts/dist)

The time of the commit (SOURCE_DATE_EPOCH) stands for the time of all files. The sdist is packed
anew, since setuptools puts the times and owners of this machine into it. Compiled modules carry no
debug information: it names folders.

The wheel is for this machine's Linux; what is meant for a package index wants auditwheel besides.
"""

import filecmp
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

from tests.gateway_process import free_port, wait_for

ROOT = Path(__file__).resolve().parent.parent
EVENT = '{"seq":1,"metrics":{"temp_c":21.5}}'


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Its output. Raises RuntimeError with its words when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> list[str]:
    """The files of the checkout, those that are new and not ignored too."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def epoch() -> int:
    """When the commit was made, in seconds."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct"))


def checkout(folder: Path) -> Path:
    """A clean one: nothing that was built, and nothing is written to ours."""
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """`kind` is sdist or wheel; the one file that is made."""
    run(
        *(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source),
        cwd=source,
        SOURCE_DATE_EPOCH=str(epoch()),
        LDFLAGS="-Wl,--strip-debug",
    )
    (made,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made


def pack_again(sdist: Path) -> None:
    """The same files with one time, no owner, in order."""
    packed = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            member.mtime = epoch()
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    sdist.write_bytes(gzip.compress(packed.getvalue(), mtime=epoch()))


def make_sdist(source: Path, out: Path) -> Path:
    """Reproducible."""
    sdist = build("sdist", source, out)
    pack_again(sdist)
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """Its one folder."""
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since 3.11.4
        archive.extractall(folder, **safe)
    (top,) = folder.iterdir()
    return top


def smoke(wheel: Path, folder: Path) -> None:
    """Install it where nothing of ours is, serve, send, receive, end."""
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv" / "bin"
    run(bin_ / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    print(run(bin_ / "gateway", "--version", cwd=folder).strip(), "in a clean environment")
    where = run(bin_ / "python", "-c", "import gateway; print(gateway.__file__)", cwd=folder)
    assert where.startswith(str(folder)), where
    http, mqtt = free_port(), free_port()
    sets = (f"http.port={http}", f"mqtt.embedded_port={mqtt}", "log.directory=data")
    arguments = [part for one in (*sets, "mqtt.url=embedded") for part in ("--set", one)]
    said = folder / "said.txt"
    with said.open("wb") as output:
        gateway = subprocess.Popen(
            [bin_ / "gateway", "serve", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    subscriber = None
    try:
        url = f"http://127.0.0.1:{http}"
        check = [bin_ / "gateway", "health", "--url", url]
        wait_for(
            lambda: subprocess.run(check, cwd=folder, capture_output=True).returncode == 0,
            20,
            said.read_text(),
        )
        subscriber = subprocess.Popen(
            [
                *("stdbuf", "-oL", "mosquitto_sub", "-V", "mqttv5", "-h", "127.0.0.1"),
                *("-p", str(mqtt), "-t", "telemetry/#", "-C", "1", "-W", "20", "-d"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert subscriber.stdout is not None
        heard = iter(subscriber.stdout.readline, "")
        next(line for line in heard if "SUBACK" in line)
        posted = run(
            *("curl", "-sS", "-o", folder / "answer", "-w", "%{http_code}", "-d", EVENT),
            *("-H", "Content-Type: application/json", f"{url}/v1/ingest/boiler-7"),
        )
        assert posted == "202", posted
        assert '"temp_c":21.5' in "".join(heard), said.read_text()
        gateway.terminate()
        assert gateway.wait(20) == 0, said.read_text()
    finally:
        for process in (gateway, subscriber):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    print("serves: 202, arrived, exit code 0 on SIGTERM")


def main() -> int:
    dist = ROOT / "dist"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = checkout(folder / "checkout")
        sdist = make_sdist(source, folder / "sdist")
        wheel = build("wheel", unpack(sdist, folder / "unpacked"), folder / "wheel")
        again = make_sdist(checkout(folder / "other-checkout"), folder / "sdist-again")
        assert filecmp.cmp(sdist, again, shallow=False), "two sdists of one commit differ"
        direct = build("wheel", source, folder / "wheel-direct")
        assert filecmp.cmp(wheel, direct, shallow=False), "sdist and checkout give different wheels"
        print("the sdist is reproducible, and gives the very wheel that the checkout gives")
        smoke(wheel, folder)
        shutil.rmtree(dist, ignore_errors=True)
        dist.mkdir()
        for file in (sdist, wheel):
            shutil.copy(file, dist)
            print(hashlib.sha256(file.read_bytes()).hexdigest(), f"dist/{file.name}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, AssertionError) as error:
        print(f"dist: {error}", file=sys.stderr)
        sys.exit(1)
