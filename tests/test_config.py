"""Settings: sources and their order, strict decoding, messages, limits."""

import os
import pickle
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import config
from gateway.config import Config, ConfigError, Loaded, effective, example, load
from gateway.mqtt_settings import parse_url
from gateway.settings import SETTINGS, Setting

ROOT = Path(__file__).parent.parent
NUMBERS = [setting for setting in SETTINGS.values() if setting.kind == "int"]


def read(*sets: str, path: Path | None = None, **environment: str) -> Loaded:
    return load(None if path is None else str(path), environment, sets)


def value(loaded: Loaded, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(loaded.config, section), name)


def problem(*sets: str, path: Path | None = None, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*sets, path=path, **environment)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "gateway.toml"


# ---- sources ----------------------------------------------------------------------------------


def test_without_sources_everything_is_default() -> None:
    loaded = read()
    assert loaded.config == Config()
    assert set(loaded.origin.values()) == {"default"}
    assert set(loaded.origin) == set(SETTINGS)


def test_later_sources_win(toml: Path) -> None:
    toml.write_text("[http]\nport = 8001\nworkers = 1\nbody_deadline_ms = 100\n")
    loaded = read("http.port=8003", path=toml, GATEWAY_HTTP_PORT="8002", GATEWAY_HTTP_WORKERS="2")
    assert loaded.config.http.port == 8003
    assert loaded.config.http.workers == 2
    assert loaded.config.http.body_deadline_ms == 100
    assert loaded.origin["http.port"] == "--set"
    assert loaded.origin["http.workers"] == "environment GATEWAY_HTTP_WORKERS"
    assert loaded.origin["http.body_deadline_ms"] == f"{toml} line 4"
    assert loaded.origin["http.host"] == "default"


def test_the_last_set_wins() -> None:
    assert read("mqtt.url=embedded", "mqtt.url=mqtt://other").config.mqtt.url == "mqtt://other"


def test_the_file_may_be_named_by_the_environment(toml: Path) -> None:
    toml.write_text("http.port = 8001\n")
    assert read(GATEWAY_CONFIG=str(toml)).config.http.port == 8001


def test_a_named_file_outranks_the_environment(toml: Path) -> None:
    toml.write_text("http.port = 8001\n")
    assert read(path=toml, GATEWAY_CONFIG="/nowhere").config.http.port == 8001


def test_an_empty_text_unsets_what_may_be_unset() -> None:
    assert read("mqtt.url=", GATEWAY_MQTT_URL="embedded").config.mqtt.url is None


def test_an_empty_text_in_the_file_unsets_as_in_the_example(toml: Path) -> None:
    toml.write_text('[mqtt]\nurl = ""\n')
    assert read(path=toml).config.mqtt.url is None


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.key)
def test_each_setting_can_come_from_the_environment(setting: Setting, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    needs = {
        "mqtt.cert_file": {"GATEWAY_MQTT_KEY_FILE": str(secret)},
        "mqtt.key_file": {"GATEWAY_MQTT_CERT_FILE": str(secret)},
    }.get(setting.key, {"GATEWAY_MQTT_MODE": "packed"} if "pack_" in setting.name else {})
    text = {
        "http.host": "::1",
        "log.capacity_bytes": "64 MiB",
        "mqtt.url": "mqtts://broker.example",
        "mqtt.backoff_max_ms": "300",
    }.get(setting.key)
    if text is None and setting.name.endswith("_file"):
        text = str(secret)
    elif text is None and setting.kind == "int":
        text = str(max(setting.default - 1, 1))
    elif text is None and setting.kind == "number":
        text = str(setting.default - 0.01)
    elif text is None and setting.choices:
        text = setting.choices[-1]
    elif text is None:
        text = "true" if setting.kind == "bool" else "other"
    loaded = load(
        None,
        {"GATEWAY_MQTT_URL": "mqtts://broker", **needs, setting.variable: text},
    )
    expected = {"64 MiB": 1 << 26, "true": True}.get(text, text)
    assert str(value(loaded, setting.key)) == str(expected)
    assert loaded.origin[setting.key] == f"environment {setting.variable}"


# ---- strictness -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("http.prot", "http.port"),
        ("mqtt.toppic", "mqtt.topic"),
        ("log.capacity", "log.capacity_bytes"),
        ("htpp.port", "http.port"),
        ("port", "http.port"),
        ("HTTP.PORT", "http.port"),
    ],
)
def test_an_unknown_key_names_the_closest_right_one(wrong: str, right: str) -> None:
    assert problem(f"{wrong}=1") == (
        f"{wrong}: no such setting; did you mean {right}? (from --set, given '1')"
    )


def test_an_unknown_key_in_the_file_names_its_line(toml: Path) -> None:
    toml.write_text("# first\n[http]\nhost = '127.0.0.1'\nprot = 8000\n")
    assert problem(path=toml).startswith(
        f"http.prot: no such setting; did you mean http.port? (from {toml} line 4, given 8000)"
    )


def test_an_unknown_section_is_refused(toml: Path) -> None:
    toml.write_text("[htpp]\n")
    assert "htpp: no such setting" in problem(path=toml)


def test_an_unknown_variable_names_the_closest_right_one() -> None:
    text = problem(GATEWAY_MQTT_URI="x")
    assert "did you mean mqtt.url?" in text
    assert "from environment GATEWAY_MQTT_URI" in text


def test_variables_of_kubernetes_service_links_are_not_ours() -> None:
    read(
        GATEWAY_SERVICE_HOST="10.0.0.1",
        GATEWAY_SERVICE_PORT="8000",
        GATEWAY_SERVICE_PORT_HTTP="8000",
        GATEWAY_PORT="tcp://10.0.0.1:8000",
        GATEWAY_PORT_8000_TCP="tcp://10.0.0.1:8000",
        GATEWAY_PORT_8000_TCP_ADDR="10.0.0.1",
    )


@pytest.mark.parametrize(
    ("variable", "meant"),
    [("GATEWAY_HTP_PORT", "http.port"), ("GATEWAY_MQTT_EMBEDED_PORT", "mqtt.embedded_port")],
)
def test_a_misspelt_port_is_no_service_link(variable: str, meant: str) -> None:
    assert f"did you mean {meant}?" in problem(**{variable: "9000"})


def test_a_service_link_in_the_place_of_a_setting_is_explained() -> None:
    assert "enableServiceLinks" in problem(GATEWAY_HTTP_PORT="tcp://10.0.0.1:8000")


def test_the_second_door_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert f"pip install '{config.ROBYN}'" in problem("http.server=robyn")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["robyn"] == [config.ROBYN]


def test_all_problems_are_reported_at_once() -> None:
    text = problem("http.port=0", "mqtt.urll=x", GATEWAY_LOG_LEVEL="loud")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("key", "toml_value"),
    [
        ("port", '"8000"'),
        ("port", "8000.0"),
        ("port", "true"),
        ("port", "[8000]"),
        ("host", "127"),
        ("body_bytes_max", '"many"'),
        ("body_bytes_max", '"64 MB"'),
    ],
)
def test_a_value_of_another_type_is_refused(toml: Path, key: str, toml_value: str) -> None:
    toml.write_text(f"[http]\n{key} = {toml_value}\n")
    assert f"http.{key}: must be " in problem(path=toml)


@pytest.mark.parametrize("text", ["1", "True", "yes", ""])
def test_a_bool_is_true_or_false(text: str) -> None:
    assert "must be true or false" in problem(f"auth.allow_anonymous={text}")


def test_secrets_are_not_in_messages() -> None:
    assert "hunter2" not in problem("mqtt.pasword=hunter2", "mqtt.password_=hunter2")
    assert "hunter2" not in problem("mqtt.password=hunter2", "mqtt.password_file=/nowhere")
    assert "hunter2" not in problem("mqtt.url=mqtt://me:hunter2@broker")
    assert "hunter2" not in problem("mqtt.url=me:hunter2@broker")
    assert "hunter2" not in problem("mqtt.url=mqtt://me:hunter2 'x@broker")
    assert "hunter2" not in problem("mqtt.url=mqtt:me:hunter2@broker")


def test_secrets_in_a_section_of_the_wrong_form_are_not_in_messages(toml: Path) -> None:
    toml.write_text('[[mqtt]]\npassword = "hunter2"\n')
    with pytest.raises(ConfigError) as failure:
        load(str(toml), {}, [])
    assert "hunter2" not in str(failure.value)


def test_a_broken_file_is_named_with_the_line(toml: Path) -> None:
    toml.write_text("[http\n")
    assert str(toml) in problem(path=toml)
    assert "line 1" in problem(path=toml)


def test_a_missing_file_is_named() -> None:
    assert problem(path=Path("/nowhere.toml")) == (
        "configuration file /nowhere.toml: No such file or directory"
    )


@given(st.text(), st.text())
def test_any_set_is_read_or_refused(key: str, text: str) -> None:
    try:
        read(f"{key}={text}")
    except ConfigError:
        pass


@given(st.sampled_from(sorted(SETTINGS)), st.text())
def test_any_text_for_a_setting_is_read_or_refused(key: str, text: str) -> None:
    try:
        read(f"{key}={text}")
    except ConfigError as error:
        assert key in str(error)


# ---- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.key)
def test_a_number_is_accepted_at_its_limits(setting: Setting) -> None:
    with_it = {
        "http.body_bytes_max": ["log.capacity_bytes=8 MiB"],
        "http.batch_bytes_max": ["http.body_bytes_max=64"],
        "mqtt.backoff_base_ms": ["mqtt.backoff_max_ms=3600000"],
        "mqtt.backoff_max_ms": ["mqtt.backoff_base_ms=10"],
        "mqtt.pack_bytes_max": ["mqtt.mode=packed"],
        "mqtt.pack_linger_ms": ["mqtt.mode=packed"],
    }.get(setting.key, [])
    for limit in (setting.low, setting.high):
        assert value(read(*with_it, f"{setting.key}={limit}"), setting.key) == limit


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.key)
def test_a_number_is_refused_one_past_its_limits(setting: Setting) -> None:
    assert setting.low is not None
    assert setting.high is not None
    for number in (setting.low - 1, setting.high + 1):
        assert f"from {setting.low} to {setting.high}" in problem(f"{setting.key}={number}")


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (
            ["pack_compression=zstd"],
            'mqtt.pack_compression: is for packed messages only: set mqtt.mode = "packed"',
        ),
        (["pack_bytes_max=5120"], "mqtt.pack_bytes_max: is for packed messages only"),
        (
            ["mode=packed", "pack_linger_ms=5000", "http.sink_deadline_ms=5000"],
            "mqtt.pack_linger_ms: not below http.sink_deadline_ms = 5000",
        ),
        (["client_id=" + "x" * 129], "mqtt.client_id: must be at most 128 bytes (from"),
        (
            ["client_id=" + "x" * 127, "connections=2"],
            "at most 126 bytes with mqtt.connections = 2",
        ),
        (
            ["client_id=" + "x" * 126, "connections=11"],
            "at most 125 bytes with mqtt.connections = 11",
        ),
        (["connections=0"], "mqtt.connections: must be an integer from 1 to 64"),
        (["mode=packet"], "mqtt.mode: must be event or packed"),
    ],
)
def test_pool_and_packs_that_cannot_work_are_refused(sets: list[str], says: str) -> None:
    assert says in problem(*(text if "." in text else f"mqtt.{text}" for text in sets))


def test_a_pool_of_the_longest_client_id_is_accepted() -> None:
    read("mqtt.client_id=" + "x" * 126, "mqtt.connections=10")


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.key)
def test_a_number_has_a_unit_in_its_name(setting: Setting) -> None:
    counts = {"workers", "connections", "inflight_max", "poison_attempts", "files_max"}
    plain = {"port", "embedded_port", "inflate_ratio_max", "batch_events_max", *counts}
    assert setting.name in plain or setting.name.endswith(
        ("_ms", "_s", "_bytes", "_bytes_max", "_per_second_max")
    )


SHARES = [setting for setting in SETTINGS.values() if setting.kind == "number"]


@pytest.mark.parametrize("setting", SHARES, ids=lambda setting: setting.key)
@pytest.mark.parametrize("text", ["0", "-0.5", "1.01", "1e-3", "nan", "inf", "many", "", "50%"])
def test_a_share_is_refused_outside_its_limits(setting: Setting, text: str) -> None:
    assert "must be a number above 0, at most 1" in problem(f"{setting.key}={text}")


@pytest.mark.parametrize("toml_value", ["0.0", "nan", "inf", '"0.5"', "true"])
def test_a_share_in_the_file_is_refused_outside_its_limits(toml: Path, toml_value: str) -> None:
    toml.write_text(f"[log]\nhigh_water = {toml_value}\n")
    assert "must be a number above 0, at most 1" in problem(path=toml)


def test_the_whole_log_may_be_used(toml: Path) -> None:
    toml.write_text("[log]\nhigh_water = 1\nlow_water = 1.0\n")
    log = read(path=toml).config.log
    assert (log.high_water, log.low_water) == (1, 1)


def test_limits_of_batches_hold_what_is_in_them() -> None:
    small = "http.body_bytes_max=100", "http.batch_bytes_max=100", "http.batches_bytes_max=1 MiB"
    read(*small)
    assert "less than http.body_bytes_max = 101" in problem(*small, "http.body_bytes_max=101")
    one_more = "http.batch_bytes_max=1048577"
    assert "less than http.batch_bytes_max = 1048577" in problem(*small, one_more)


def test_low_water_above_high_water_is_refused() -> None:
    assert "log.low_water: must not be above log.high_water = 0.5" in problem("log.high_water=0.5")
    read("log.high_water=0.5", "log.low_water=0.5")


@pytest.mark.parametrize("ack", ["enqueue", "durable", "sink"])
def test_every_acknowledgement_may_be_the_default(ack: str) -> None:
    assert read(f"http.ack={ack}").config.http.ack == ack


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("1048576", 1 << 20), ("1 MiB", 1 << 20), ("2GiB", 1 << 31), ("1_024 kib", 1 << 20)],
)
def test_sizes_may_have_units(text: str, bytes_: int) -> None:
    assert read(f"log.capacity_bytes={text}").config.log.capacity_bytes == bytes_


@pytest.mark.parametrize("capacity", [(1 << 20) + 1, 300 << 20, (1 << 21) - 1])
def test_a_capacity_between_powers_of_two_names_both_neighbours(capacity: int) -> None:
    below = 1 << (capacity.bit_length() - 1)
    assert f"must be a power of two: {below} or {2 * below}" in problem(
        f"log.capacity_bytes={capacity}"
    )


def test_a_body_must_fit_a_record_of_the_log() -> None:
    most = (1 << 20) // 8 - 192
    read("log.capacity_bytes=1 MiB", f"http.body_bytes_max={most}")
    text = problem("log.capacity_bytes=1 MiB", f"http.body_bytes_max={most + 1}")
    assert f"http.body_bytes_max: at most {most} with log.capacity_bytes = 1048576" in text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert read(f"http.host={host}").config.http.host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example", "127.0.0.1.x"])
def test_other_addresses_need_anonymous_access_allowed(host: str) -> None:
    assert "auth.allow_anonymous" in problem(f"http.host={host}")
    read(f"http.host={host}", "auth.allow_anonymous=true")


@pytest.mark.parametrize(
    "topic", ["t", "telemetry/{device_id}", "{device_id}", "a/{device_id}/b", "/a"]
)
def test_these_topics_are_accepted(topic: str) -> None:
    assert read(f"mqtt.topic={topic}").config.mqtt.topic == topic


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", "must not be empty"),
        ("a/+/b", "wildcards"),
        ("a/#", "wildcards"),
        ("$SYS/a", "must not start with $"),
        ("a\0", "control characters"),
        ("a/{device}", "only {device_id}"),
        ("a/{device_id", "only {device_id}"),
        ("a/{{device_id}}", "only {device_id}"),
        ("{device_id}/{device_id}", "once"),
        ("a" * 65472 + "{device_id}", "longer than 65535"),
    ],
)
def test_these_topics_are_refused(topic: str, reason: str) -> None:
    assert reason in problem(f"mqtt.topic={topic}")


def test_the_longest_topic_is_accepted() -> None:
    read("mqtt.topic=" + "a" * 65471 + "{device_id}")


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("mqtt://broker", ("broker", 1883, False, False)),
        ("mqtt://broker/", ("broker", 1883, False, False)),
        ("mqtts://broker", ("broker", 8883, True, False)),
        ("mqtts://broker:443", ("broker", 443, True, False)),
        ("mqtt://[::1]:1884", ("::1", 1884, False, False)),
        ("embedded", ("127.0.0.1", 1883, False, True)),
    ],
)
def test_urls_name_brokers(url: str, broker: tuple[str, int, bool, bool]) -> None:
    assert read(f"mqtt.url={url}").config.mqtt.broker == broker


@pytest.mark.parametrize(
    "url",
    [
        "broker",
        "tcp://broker",
        "mqtt:broker",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://a:b@c",
        "mqtt://broker/path",
        "mqtt://broker?x=1",
        "mqtt://broker#x",
        "mqtt://broker:0",
        "mqtt://broker:",
        "mqtt://broker:65536",
        "mqtt://bro ker",
        "mqtt://[::1",
        "Embedded",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_url(url, 1883)
    assert problem(f"mqtt.url={url}").startswith("mqtt.url: ")


def test_the_embedded_broker_has_another_port_than_http() -> None:
    assert "is also http.port" in problem("mqtt.url=embedded", "mqtt.embedded_port=8000")


def test_backoff_must_not_shrink() -> None:
    assert "less than mqtt.backoff_base_ms" in problem("mqtt.backoff_max_ms=100")


@pytest.mark.parametrize("name", ["ca_file", "alpn", "server_name"])
def test_settings_of_tls_need_tls(name: str) -> None:
    assert "mqtts://" in problem(f"mqtt.{name}={__file__}", "mqtt.url=mqtt://broker")
    read(f"mqtt.{name}={__file__}", "mqtt.url=mqtts://broker")


def test_a_certificate_needs_its_key() -> None:
    assert "needs mqtt.key_file" in problem(f"mqtt.cert_file={__file__}", "mqtt.url=mqtts://broker")


# ---- files with secrets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "password"), [(b"abc\n", b"abc"), (b"abc\r\n", b"abc"), (b"a \n\n", b"a \n")]
)
def test_a_password_file_is_read_at_each_use(
    tmp_path: Path, content: bytes, password: bytes
) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    config = read(f"mqtt.password_file={file}").config
    file.write_bytes(content)
    assert config.mqtt.read_password() == password


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_a_password_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "password"
    file.write_text("abc")
    file.chmod(0o600)
    config = read(f"mqtt.password_file={file}").config
    file.chmod(mode)
    assert f"mode {mode:04o}" in problem(f"mqtt.password_file={file}")
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        config.mqtt.read_password()


def test_a_missing_password_file_is_refused() -> None:
    assert "No such file" in problem("mqtt.password_file=/nowhere")


def test_password_and_password_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "p").touch(0o600)
    text = problem("mqtt.password=abc", f"mqtt.password_file={tmp_path / 'p'}")
    assert "use one of them" in text


@pytest.mark.parametrize(("mode", "fine"), [(0o600, True), (0o640, True), (0o644, False)])
def test_a_key_that_everyone_can_read_is_refused(tmp_path: Path, mode: int, fine: bool) -> None:
    key = tmp_path / "key.pem"
    key.touch(0o600)
    key.chmod(mode)
    sets = (f"mqtt.cert_file={__file__}", f"mqtt.key_file={key}", "mqtt.url=mqtts://broker")
    if fine:
        read(*sets)
    else:
        assert "chmod 600" in problem(*sets)


# ---- what is made from the table --------------------------------------------------------------


def test_the_committed_example_is_current() -> None:
    assert (ROOT / "gateway.example.toml").read_text() == example()


def test_the_example_with_all_lines_active_is_the_default(toml: Path) -> None:
    lines = [
        line[1:] if line.startswith("#") and not line.startswith("# ") else line
        for line in example().splitlines()
    ]
    toml.write_text("\n".join(lines))
    loaded = read(f"http.workers={os.cpu_count()}", path=toml)
    plain = read(f"http.workers={os.cpu_count()}")
    assert loaded.config == plain.config


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.key)
def test_each_setting_says_why(setting: Setting) -> None:
    assert setting.doc.endswith(".")


def test_effective_hides_secrets() -> None:
    rows = {key: shown for key, shown, _ in effective(read("mqtt.password=hunter2"))}
    assert rows["mqtt.password"] == "(hidden)"
    assert "hunter2" not in str(rows)


def test_a_config_survives_the_way_to_a_child() -> None:
    config = read("mqtt.url=embedded", "http.workers=3").config
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Config().http.port = 1  # type: ignore[misc]


# ---- sinks ------------------------------------------------------------------------------------


def test_sinks_are_what_has_a_place_to_deliver_to() -> None:
    assert read().config.sinks == ()
    assert read("mqtt.url=embedded").config.sinks == ("mqtt",)
    assert read("file.directory=x").config.sinks == ("file",)
    both = read("file.directory=x", "mqtt.url=embedded", "mqtt.required=false").config
    assert (both.sinks, both.required) == (("mqtt", "file"), (False, True))


def test_one_sink_must_be_required() -> None:
    read("mqtt.required=false")  # is not configured
    said = problem("mqtt.url=embedded", "mqtt.required=false")
    assert said.startswith("mqtt.required: no sink would be required")
    assert "mqtt.required must be true (from --set, given false)" in said
    said = problem(
        "mqtt.url=embedded", "mqtt.required=false", "file.directory=x", "file.required=false"
    )
    assert "at least one of mqtt.required and file.required must be true" in said


def test_a_sink_that_is_configured_cannot_be_forgotten() -> None:
    assert read("mqtt.url=embedded", "log.forget_sink=file").config.log.forget_sink == "file"
    said = problem("file.directory=x", "log.forget_sink=file")
    assert "it is configured: file.directory is set" in said
