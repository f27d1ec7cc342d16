"""The Dockerfile, the compose file and what they name; `make test-image` builds and uses it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from gateway.settings import SETTINGS, HttpConfig
from gateway.supervisor import DELIVERY_KILL_S, WORKER_KILL_S
from tests import dockerfile
from tests.gateway_process import ROOT

STAGES = dockerfile.stages((ROOT / "Dockerfile").read_text())
IMAGE = STAGES[-1]
COMPOSE = ROOT / "deploy" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
VARIABLES = {setting.variable for setting in SETTINGS.values()}


# ---- the image ----------------------------------------------------------------------------------


def test_each_base_is_one_dated_tag() -> None:
    bases = {stage.base for stage in STAGES}
    assert len(bases) == 1
    assert re.fullmatch(r"debian:bookworm-20\d{6}-slim(@sha256:[0-9a-f]{64})?", bases.pop())


def test_what_it_runs_are_scripts_of_the_repository() -> None:
    runs = [one for stage in STAGES for one in stage.instructions if one.name == "RUN"]
    scripts = [
        re.fullmatch(r"sh (?:/usr/local/sbin|scripts)/([a-z-]+)( .*)?", r.text) for r in runs
    ]
    assert all(scripts)
    assert all((ROOT / "scripts" / match[1]).exists() for match in scripts if match)


def test_it_runs_as_a_number_that_is_not_root_and_can_write_one_place() -> None:
    user, group = IMAGE.last("USER").text.split(":")
    assert int(user) == int(group) >= 10000
    volume = IMAGE.last("VOLUME").text
    installs = [one.text for one in IMAGE.instructions if one.name == "RUN"]
    assert installs == [f"sh /usr/local/sbin/image-install {user} {volume}"]
    assert IMAGE.merged("ENV")["GATEWAY_LOG_DIRECTORY"] == f"{volume}/log"


def test_its_health_is_the_gateway_s_own_word() -> None:
    assert IMAGE.last("HEALTHCHECK").text == 'CMD ["gateway", "health"]'
    assert IMAGE.last("ENTRYPOINT").words == ["gateway"]
    assert IMAGE.last("CMD").words == ["serve"]
    assert IMAGE.last("STOPSIGNAL").text == "SIGTERM"


def test_its_variables_are_settings() -> None:
    named = {name for name in IMAGE.merged("ENV") if name.startswith("GATEWAY_")}
    assert named
    assert named <= VARIABLES


def test_its_labels_say_what_it_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = IMAGE.merged("LABEL")
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert labels["org.opencontainers.image.description"] == project["description"]
    assert labels["org.opencontainers.image.base.name"].endswith(IMAGE.base.partition("@")[0])
    assert {"title", "version", "revision"} <= {name.rsplit(".", 1)[1] for name in labels}


def test_the_context_has_the_package_and_nothing_else() -> None:
    taken = dockerfile.context(ROOT, ["."])
    tops = {path.split("/")[0] for path in taken}
    assert tops == {
        *("LICENSE", "THIRD_PARTY.md", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"),
        *("_native", "gateway", "scripts"),
    }
    assert [path for path in taken if path.endswith((".so", ".pyc"))] == []
    assert {path for path in taken if path.startswith("scripts/")} == {
        f"scripts/{name}" for name in ("bootstrap", "image-build", "image-install")
    }


@pytest.mark.parametrize(
    "text",
    [
        "FROM debian\nADD x y",
        "FROM debian\nRUN --mount=type=bind true",
        "FROM debian\nCMD gateway serve",
        "COPY a b",
        "FROM debian AS",
    ],
)
def test_the_interpreter_passes_over_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="Dockerfile, line"):
        dockerfile.stages(text)


def test_the_interpreter_joins_lines() -> None:
    (stage,) = dockerfile.stages('FROM a AS b\n# c\nENV X=1 \\\n# d\n    Y="2 3"\nUSER 1:1\n')
    assert (stage.name, stage.base, stage.merged("ENV")) == ("b", "a", {"X": "1", "Y": "2 3"})


@pytest.mark.parametrize(
    ("path", "ignored"),
    [("a", True), ("keep", False), ("keep/x/y.c", False), ("keep/x/y.so", True), ("keep.c", True)],
)
def test_the_last_pattern_decides(path: str, ignored: bool) -> None:
    assert (path in dockerfile.Ignored("# c\n*\n!keep\n**/*.so\n")) is ignored


# ---- compose ------------------------------------------------------------------------------------


def check_schema(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", file),
        ],
        capture_output=True,
        text=True,
    )


def test_compose_fits_the_schema() -> None:
    done = check_schema(COMPOSE)
    assert done.returncode == 0, done.stdout


def test_the_schema_says_no_to_a_misspelt_key(tmp_path: Path) -> None:
    """The control."""
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE.read_text().replace("read_only:", "readonly:"))
    assert "readonly" in check_schema(file).stdout


def test_compose_names_settings() -> None:
    named = set(SERVICES["gateway"]["environment"])
    assert "GATEWAY_MQTT_URL" in named
    assert named <= VARIABLES


@pytest.mark.parametrize("service", SERVICES)
def test_compose_gives_no_privileges(service: str) -> None:
    given = SERVICES[service]
    assert given["read_only"] is True
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges:true"]
    assert int(given["user"].split(":")[0]) > 0
    assert given["healthcheck"]["test"][0] == "CMD"
    assert "build" in given or re.fullmatch(r"[\w-]+:\d+\.\d+\.\d+", given["image"])


def test_compose_and_image_agree() -> None:
    gateway = SERVICES["gateway"]
    assert gateway["user"] == IMAGE.last("USER").text
    assert gateway["volumes"] == [f"gateway:{IMAGE.last('VOLUME').text}"]
    assert ["CMD", *gateway["healthcheck"]["test"][1:]] == ["CMD", "gateway", "health"]
    assert gateway["ports"] == [f"127.0.0.1:8000:{IMAGE.last('EXPOSE').text}"]
    drain_s = HttpConfig().drain_deadline_ms / 1000 + DELIVERY_KILL_S + WORKER_KILL_S
    assert int(gateway["stop_grace_period"].removesuffix("s")) > drain_s


def test_mosquitto_takes_its_configuration(tmp_path: Path) -> None:
    """It listens, keeps what it has, and knows each word."""
    from tests.gateway_process import free_port, wait_for

    text = (ROOT / "deploy" / "mosquitto" / "mosquitto.conf").read_text()
    port = free_port()
    file = tmp_path / "mosquitto.conf"
    file.write_text(
        text.replace("listener 1883", f"listener {port} 127.0.0.1").replace(
            "/mosquitto/data/", f"{tmp_path}/"
        )
        + "user root\n"
    )
    (_, *check) = SERVICES["mosquitto"]["healthcheck"]["test"]
    check = [word.replace("$$", "$") for word in check] + ["-p", str(port)]
    process = subprocess.Popen(
        ["mosquitto", "-c", file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(
            lambda: (
                process.poll() is not None
                or subprocess.run(check, capture_output=True).returncode == 0
            )
        )
        assert process.poll() is None
    finally:
        process.terminate()
        said = process.communicate(timeout=10)[0]
    assert "Error" not in said
    assert (tmp_path / "mosquitto.db").exists()
