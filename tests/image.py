"""The container image without a container engine: builds what the Dockerfile says, then uses it.

    python -m tests.image [--fresh]      by scripts/test-image, in name spaces of its own

    FROM      debootstrap's minimal system of the suite that the tag names, with this machine's
              package settings (where apt and pip look, and whom they trust)
    RUN,      a layer each: an overlay, kept under build/image by what went into it, as an engine
    COPY      does
    the run   the last stage's layers and no others, read-only, with a volume; own mounts, pids and
              network; the numeric user, no capabilities, no new privileges

Only the standard library: it runs beside the checkout, not in its environment."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests import dockerfile
from tests.dockerfile import Instruction, Stage

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "build" / "image"
BASE_VERSION = "1"
"""Counts changes of how the base is made."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "PIP_TRUSTED_HOST")
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
AUTHORITIES_INSIDE = "/etc/ssl/build-machine.crt"
EVENT = '{"seq":1,"metrics":{"temp_c":21.5}}'

say_began = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - say_began:6.1f} s] {text}", flush=True)


def sh(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run to its end; raises RuntimeError with its words when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(  # type: ignore[call-overload]
        words, **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options}
    )
    if done.returncode != 0:
        said = f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{said}")
    return done  # type: ignore[no-any-return]


# ---- building -----------------------------------------------------------------------------------


class Built(NamedTuple):
    """A stage: its layers, the lowest first, and what was said about processes."""

    layers: tuple[Path, ...]
    env: dict[str, str]
    workdir: str
    user: str
    stage: Stage


def digest(*parts: str | bytes) -> str:
    mixed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        mixed.update(len(data).to_bytes(8, "little") + data)
    return mixed.hexdigest()[:24]


in_use: set[str] = set()
"""Names of the layers of this run; the others are of older sources."""


def layer(key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """The folder that `make` fills, and whether it was there already. It appears whole or not at
    all."""
    place = STORE / "layers" / key
    in_use.add(key)
    if place.exists():
        return place, True
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=place.parent))
    unfinished.chmod(0o755)
    try:
        make(unfinished)
        unfinished.rename(place)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return place, False


@contextmanager
def mounted(layers: tuple[Path, ...], upper: Path | None = None) -> Iterator[Path]:
    """The layers as one root; changes go to `upper`, without it the root is read-only."""
    with tempfile.TemporaryDirectory(prefix="mount-", dir=STORE) as scratch:
        root, work = Path(scratch) / "root", Path(scratch) / "work"
        root.mkdir()
        work.mkdir()
        options = "lowerdir=" + ":".join(str(one) for one in reversed(layers))
        if upper is not None:
            options += f",upperdir={upper},workdir={work}"
        elif len(layers) == 1:
            options += f":{work}"  # an overlay without an upper folder wants two
        sh("mount", "-t", "overlay", "-o", options, "overlay", root)
        try:
            yield root
        finally:
            sh("umount", "--recursive", root)


def mount_devices(root: Path) -> None:
    """A /dev of its own with the harmless devices."""
    dev = root / "dev"
    sh("mount", "-t", "tmpfs", "-o", "mode=755,nosuid,noexec", "tmpfs", dev)
    for name in DEVICES:
        (dev / name).touch()
        sh("mount", "--bind", f"/dev/{name}", dev / name)
    (dev / "fd").symlink_to("/proc/self/fd")
    sh("mount", "-o", "remount,ro", dev)


def debian(image: str) -> Path:
    """The base: the minimal system of the suite in the tag."""
    name, _, tag = image.partition("@")[0].partition(":")
    suite = tag.partition("-")[0]
    if name != "debian" or not suite.isalpha():
        raise RuntimeError(f"FROM {image}: only debian:SUITE[-...] can be made here")

    def make(folder: Path) -> None:
        sh("debootstrap", "--variant=minbase", suite, folder, mirror())
        shutil.rmtree(folder / "var/cache/apt/archives")
        copy_package_settings(folder)

    place, kept = layer(digest("debian", suite, mirror(), BASE_VERSION), make)
    say(f"FROM {image}{' (kept)' if kept else ''}")
    return place


def apt_sources() -> list[Path]:
    """This machine's, of Debian itself: what the base image would have."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    return [f for f in files if f.is_file() and "debian-archive" in f.read_text()] or [
        f for f in files if f.is_file() and "/debian" in f.read_text()
    ]


def mirror() -> str:
    """Where Debian's packages come from on this machine."""
    for file in apt_sources():
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        for word in " ".join(lines).split():
            if word.startswith(("http://", "https://", "file:")) and "security" not in word:
                return word
    return "http://deb.debian.org/debian"


def copy_package_settings(root: Path) -> None:
    """Mirrors, the way to them, and whom to trust."""
    if files := apt_sources():
        (root / "etc/apt/sources.list").unlink(missing_ok=True)
        for file in files:
            target = root / file.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for file in Path("/etc/apt/apt.conf.d").glob("*"):
        if "Acquire::" in file.read_text():
            shutil.copy(file, root / "etc/apt/apt.conf.d")
    if Path(AUTHORITIES).exists():
        (root / AUTHORITIES_INSIDE[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(AUTHORITIES, root / AUTHORITIES_INSIDE[1:])


def build_environment() -> dict[str, str]:
    """What an engine passes by --build-arg: the way to the package indexes."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if Path(AUTHORITIES).exists():
        passed["PIP_CERT"] = AUTHORITIES_INSIDE
    return passed


def run_step(one: Instruction, built: Built) -> Path:
    def make(upper: Path) -> None:
        with mounted(built.layers, upper) as root:
            mount_devices(root)
            sh("mount", "-t", "proc", "proc", root / "proc")
            for name in ("resolv.conf", "hosts"):  # an engine lays them over, too
                (root / "etc" / name).touch()
                sh("mount", "--bind", f"/etc/{name}", root / "etc" / name)
            sh(
                *("chroot", root, "sh", "-c", f"cd {built.workdir} && {one.text}"),
                env={**built.env, **build_environment(), "HOME": "/root"},
            )

    place, kept = layer(digest("run", built.layers[-1].name, one.text, repr(built.env)), make)
    say(f"  RUN {one.text}{' (kept)' if kept else ''}")
    return place


def copy_step(one: Instruction, built: Built, stages: dict[str, Built]) -> Path:
    *sources, target = one.words
    below = os.path.normpath(os.path.join(built.workdir, target))[1:]
    if "from" in one.flags:
        other = stages[one.flags["from"]]

        def make(upper: Path) -> None:
            with mounted(other.layers) as root:
                (upper / below).parent.mkdir(parents=True, exist_ok=True)
                for source in sources:  # a folder: its contents, as an engine does
                    sh("cp", "-a", root / source[1:], upper / below)

        key = digest("copy", built.layers[-1].name, other.layers[-1].name, one.text)
    else:
        files = dockerfile.context(ROOT, sources)
        whole = len(sources) == 1 and (ROOT / sources[0]).is_dir()

        def make(upper: Path) -> None:
            for file in files:
                to = upper / below / file if whole else upper / below
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, to)

        content = [
            part
            for file in files
            for part in (file, (ROOT / file).read_bytes(), str((ROOT / file).stat().st_mode))
        ]
        key = digest("copy", built.layers[-1].name, one.text, *content)
    place, kept = layer(key, make)
    say(f"  COPY {one.text}{' (kept)' if kept else ''}")
    return place


def build(stages: list[Stage]) -> Built:
    """The last stage."""
    done: dict[str, Built] = {}
    for stage in stages:
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        built = Built((debian(stage.base),), {"PATH": path}, "/", "0:0", stage)
        for one in stage.instructions:
            match one.name:
                case "RUN":
                    built = built._replace(layers=(*built.layers, run_step(one, built)))
                case "COPY":
                    built = built._replace(layers=(*built.layers, copy_step(one, built, done)))
                case "ENV":
                    built = built._replace(env={**built.env, **one.pairs})
                case "WORKDIR":
                    place, _ = layer(
                        digest("workdir", built.layers[-1].name, one.text),
                        lambda upper, text=one.text: None,  # type: ignore[misc]
                    )
                    built = built._replace(workdir=one.text)
                    if not any((below / one.text[1:]).is_dir() for below in built.layers):
                        (place / one.text[1:]).mkdir(parents=True, exist_ok=True)
                        built = built._replace(layers=(*built.layers, place))
                case "USER":
                    built = built._replace(user=one.text)
        done[stage.name] = built
    return built


# ---- using --------------------------------------------------------------------------------------


class Container:
    """The image with a volume, as `docker run --read-only --cap-drop ALL
    --security-opt no-new-privileges` would run it, in a network of its own."""

    def __init__(self, image: Built, root: Path) -> None:
        self.image, self.root = image, root
        uid, gid = image.user.split(":")
        self._as_user = (
            *("setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--no-new-privs"),
            *("--bounding-set=-all", "--inh-caps=-all"),
        )
        self.env = {**image.env, "GATEWAY_MQTT_URL": "embedded", "HOME": "/"}
        self.output = STORE / "output.txt"
        self._unshare: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self, *command: str) -> None:
        """Its process 1 is the gateway itself; a command replaces ENTRYPOINT and CMD."""
        stage = self.image.stage
        words = command or (*stage.last("ENTRYPOINT").words, *stage.last("CMD").words)
        script = (
            'ip link set lo up && mount -t proc proc "$1/proc" && root=$1 && shift'
            ' && exec chroot "$root" sh -c \'cd "$0" && exec "$@"\' "$@"'
        )
        with self.output.open("ab") as output:
            self._unshare = subprocess.Popen(
                [
                    *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--"),
                    *("sh", "-e", "-c", script, "container", str(self.root), self.image.workdir),
                    *self._as_user,
                    *words,
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        root = str(self.root)

        def process() -> int:
            if self._unshare is None or self._unshare.poll() is not None:
                return -1
            for pid in children.read_text().split():
                if os.readlink(f"/proc/{pid}/root") == root:
                    return int(pid)
            return 0

        self.pid = wait_for(process, 10, "the container starts")

    def wait(self, within_s: float) -> int:
        """Its exit code."""
        assert self._unshare is not None
        return self._unshare.wait(within_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """STOPSIGNAL to its process 1, and the exit code."""
        os.kill(self.pid, number)
        return self.wait(20)

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`docker exec`; whatever its exit code is."""
        return subprocess.run(
            [
                *("nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--root"),
                *("--", "sh", "-c", 'cd "$0" && exec "$@"', self.image.workdir),
                *(*self._as_user, *command),
            ],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def beside(self, *command: str) -> list[str]:
        """A program of this machine in the container's network."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *command]

    def post(self, device: str) -> str:
        """Status line and headers of one event."""
        url = f"http://127.0.0.1:8000/v1/ingest/{device}?ack=sink"
        return sh(
            *self.beside("curl", "--silent", "--show-error", "--include", "--max-time", "15"),
            *("-H", "Content-Type: application/json", "-d", EVENT, url),
        ).stdout


def wait_for(condition: Callable[[], int], within_s: float, what: str = "") -> int:
    until = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > until:
            raise RuntimeError(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)
    return int(value)


def claim(holds: object, text: str, said: object = "") -> None:
    """Say that it holds, or end."""
    if not holds:
        raise RuntimeError(f"NOT so: {text}\n{said}")
    say(f"  {text}")


def use(image: Built, root: Path, volume: Path) -> None:
    """Everything that an operator relies on."""
    container = Container(image, root)
    health = image.stage.last("HEALTHCHECK").text.removeprefix("CMD ")
    check = dockerfile.Instruction(0, "CMD", {}, health).words

    say("refuses to serve without being told whom it may trust")
    container.start()
    code = container.wait(20)
    said = container.output.read_text()
    claim(
        code == 2 and "auth.allow_anonymous" in said, "exit code 2, and it names the setting", said
    )
    container.env["GATEWAY_AUTH_ALLOW_ANONYMOUS"] = "true"

    say("runs")
    container.start(*check)
    code = container.wait(20)
    said = container.output.read_text().splitlines()[-1]
    claim(code == 1 and "not ready" in said, f"unhealthy while nothing runs: {said}", code)
    container.start()
    wait_for(lambda: container.inside(*check).returncode == 0, 30, container.output.read_text())
    claim(True, f"healthy then: {container.inside(*check).stdout.strip()}")
    status = Path(f"/proc/{container.pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    uid, gid = image.user.split(":")
    claim(fields["Uid"].split() == [uid] * 4 != ["0"] * 4, f"process 1 is user {uid}", fields)
    claim(fields["Gid"].split() == [gid] * 4 and not fields["Groups"].strip(), f"group {gid} alone")
    claim(int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, "no capabilities", fields)
    claim(fields["NoNewPrivs"] == "1", "no new privileges")
    tried = subprocess.run(["touch", root / "written"], capture_output=True, text=True)
    claim("Read-only file system" in tried.stderr, "its root is read-only, for root as well", tried)
    tried = container.inside("touch", "/tmp/written", "/dev/written", "/etc/written")
    claim(tried.stderr.count("cannot touch") == 3, "so are /tmp and /dev", tried)
    tried = container.inside(
        "sh", "-c", "command -v gcc pip python3-config; test -e /src && echo /src"
    )
    claim(not tried.stdout, "no compiler, no pip, no source", tried)

    say("takes an event")
    subscriber = subprocess.Popen(
        container.beside(
            *(
                "stdbuf",
                "-oL",
                "mosquitto_sub",
                "-V",
                "mqttv5",
                "-h",
                "127.0.0.1",
                "-t",
                "telemetry/#",
                "-C",
                "1",
            ),
            *("-W", "20", "-q", "1", "-F", "%t %p", "-d"),
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert subscriber.stdout is not None
    heard = iter(subscriber.stdout.readline, "")
    for line in heard:
        if "SUBACK" in line or "Subscribed" in line:
            break
    answer = container.post("boiler-7")
    claim(
        answer.startswith("HTTP/1.1 200"), "acknowledged by the broker: 200 with ack=sink", answer
    )
    arrived = "".join(heard)
    claim(
        'telemetry/boiler-7 {"ts":' in arrived and '"temp_c":21.5' in arrived, "it arrived", arrived
    )
    subscriber.wait(20)
    owners = {path.stat().st_uid for path in volume.rglob("*")}
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (volume, volume / "log")]
    names = sorted(str(p.relative_to(volume)) for p in volume.rglob("*") if p.is_file())
    claim("log/gateway.log" in names, f"written to the volume: {', '.join(names)}")
    claim(owners == {int(uid)} and modes == [0o700] * 2, "for that user alone", (owners, modes))

    say("stops, starts, keeps its log")
    claim(container.stop() == 0, "SIGTERM: exit code 0", container.output.read_text())
    container.start()
    wait_for(lambda: container.inside(*check).returncode == 0, 30, container.output.read_text())
    answer = container.post("boiler-7")
    claim("x-duplicate: true" in answer.lower(), "the same event again is recognised", answer)
    code = container.stop(signal.SIGKILL)
    claim(code != 0, "SIGKILL", code)
    container.start()
    wait_for(lambda: container.inside(*check).returncode == 0, 30, container.output.read_text())
    answer = container.post("boiler-7")
    claim("x-duplicate: true" in answer.lower(), "recognised after that, too", answer)
    claim(container.post("boiler-8").startswith("HTTP/1.1 200"), "a new one is taken")
    claim(container.stop() == 0, "SIGTERM: exit code 0", container.output.read_text())


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--fresh"]):
        print("usage: scripts/test-image [--fresh]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for old in [
        *STORE.glob("layers/unfinished-*"),
        *STORE.glob("mount-*"),
        *STORE.glob("volume-*"),
    ]:
        shutil.rmtree(old)  # of a run that was killed
    if arguments:
        shutil.rmtree(STORE / "layers", ignore_errors=True)
    (STORE / "output.txt").unlink(missing_ok=True)
    image = build(dockerfile.stages((ROOT / "Dockerfile").read_text()))
    with (
        mounted(image.layers) as root,
        tempfile.TemporaryDirectory(dir=STORE, prefix="volume-") as at,
    ):
        place = root / image.stage.last("VOLUME").text[1:]
        here = place.stat()
        volume = Path(at)
        os.chown(volume, here.st_uid, here.st_gid)  # as an engine makes a new volume
        volume.chmod(stat.S_IMODE(here.st_mode))
        sh("mount", "--bind", volume, place)
        mount_devices(root)
        use(image, root, volume)
    for old in (STORE / "layers").iterdir():
        if old.name not in in_use:
            shutil.rmtree(old)
    size = sum(int(sh("du", "-sk", one).stdout.split()[0]) for one in image.layers) >> 10
    say(f"test-image: passed; {size} MiB in {len(image.layers)} layers, the base among them")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"test-image: {error}", file=sys.stderr)
        sys.exit(1)
