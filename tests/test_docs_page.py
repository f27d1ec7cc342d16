"""The docs page as people use it: Swagger UI in headless Chromium, which reaches nothing but
127.0.0.1. Screenshots are left in build/docs-page."""

import hashlib
import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from gateway import docs_ui
from tests import mosquitto
from tests.gateway_process import ROOT, GatewayProcess, wait_for

SHOTS = ROOT / "build" / "docs-page"
EVENT_MAX = 2048
INGEST = "ingest"
"""operationId and tag of POST /v1/ingest/{device_id}."""
SHOWN_S = 10.0
EVENT = '{"seq":7,"metrics":{"temp_c":21.5},"tags":{"from":"the docs page"}}'


class Chromium:
    """A browser with a profile of its own; what its console said and what it asked for."""

    def __init__(self, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for switch in (
            *("headless=new", "window-size=1280,1500", f"user-data-dir={folder}"),
            "no-sandbox",  # its sandbox does not work for root
            "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *("disable-dev-shm-usage", "disable-background-networking", "no-first-run"),
        ):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = Service(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.origin = ""

    def open(self, gateway: GatewayProcess, path: str = "/docs") -> None:
        """Show the page and wait for its operations. What was logged before is dropped."""
        self.driver.get("about:blank")
        self.errors()
        self.asked()
        self.origin = f"http://127.0.0.1:{gateway.port}"
        self.driver.get(self.origin + path)
        self.find(f"#operations-{INGEST}-{INGEST}")

    def find(self, selector: str) -> WebElement:
        """The first visible element, as soon as there is one."""

        def visible(driver: webdriver.Chrome) -> WebElement | None:
            found = driver.find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in found if element.is_displayed()), None)

        element = WebDriverWait(self.driver, SHOWN_S, 0.05).until(visible, selector)
        assert element
        return element

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block:'center'})", element)
        element.click()

    def type(self, selector: str, text: str) -> None:
        """Put `text` into a field as React sees it; keys are too slow for a large body."""
        self.driver.execute_script(
            "const [field, text] = arguments;"
            "Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), 'value')"
            ".set.call(field, text);"
            "field.dispatchEvent(new Event('input', {bubbles: true}));"
            "field.dispatchEvent(new Event('change', {bubbles: true}));",
            self.find(selector),
            text,
        )

    def errors(self) -> list[str]:
        """What the console said that is an error, since the last call."""
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] in ("SEVERE", "WARNING")]

    def asked(self) -> list[str]:
        """Addresses of all requests but those of the browser's own pages, since the last call."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("chrome")]

    def shoot(self, name: str, top: str | None = None) -> None:
        """Save what is shown, `top` at the top."""
        if top is not None:
            self.driver.execute_script("arguments[0].scrollIntoView()", self.find(top))
        SHOTS.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(SHOTS / f"{name}.png"))


class Shown(NamedTuple):
    """An answer as the page shows it."""

    status: int
    text: str


class Form:
    """The form of POST /v1/ingest/{device_id}, opened by `Try it out`."""

    ROOT = f"#operations-{INGEST}-{INGEST}"

    def __init__(self, browser: Chromium, gateway: GatewayProcess) -> None:
        self.browser = browser
        browser.open(gateway)
        browser.click(f"{self.ROOT} .opblock-summary-control")
        browser.click(f"{self.ROOT} .try-out__btn")

    def send(self, device_id: str, body: str, ack: str = "") -> Shown:
        """Fill it, press Execute, and read the answer."""
        browser, root = self.browser, self.ROOT
        browser.type(f"{root} tr[data-param-name=device_id] input", device_id)
        select = browser.find(f"{root} tr[data-param-name=ack] select")
        Select(select).select_by_value(ack)
        browser.type(f"{root} textarea.body-param__text", body)
        for clear in browser.driver.find_elements(By.CSS_SELECTOR, f"{root} .btn-clear"):
            clear.click()  # the answer before this one
        browser.click(f"{root} .execute")
        row = f"{root} .live-responses-table tbody .response"
        status = browser.find(f"{row} .response-col_status").text.split()[0]
        return Shown(int(status), browser.find(f"{row} .response-col_description").text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    try:
        yield chromium
    finally:
        chromium.driver.quit()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {
        "mqtt.url": "embedded",
        "mqtt.topic": "t/{device_id}",
        "http.body_bytes_max": EVENT_MAX,
        "http.batch_bytes_max": EVENT_MAX,
    }
    with GatewayProcess(tmp_path_factory.mktemp("docs"), settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def form(browser: Chromium, gateway: GatewayProcess) -> Form:
    form = Form(browser, gateway)
    browser.errors()
    return form


def subscribed(gateway: GatewayProcess, topic: str) -> "subprocess.Popen[str]":
    """mosquitto_sub, once the broker has its subscription."""
    process = subprocess.Popen(
        [
            *("stdbuf", "-oL", mosquitto.find("mosquitto_sub") or ""),
            *("-V", "mqttv5", "-d", "-F", "%t %p"),
            *("-h", "127.0.0.1", "-p", str(gateway.settings["mqtt.embedded_port"])),
            *("-t", topic, "-C", "1", "-W", "15"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    said = next((line for line in process.stdout if line.startswith("Subscribed")), None)
    assert said, "the embedded broker did not take the subscription"
    return process


def refused_in(errors: list[str], status: int) -> bool:
    """Chromium logs a fetch that is answered with 4xx or 5xx as an error: that, and no other."""
    return len(errors) == 1 and f"responded with a status of {status} " in errors[0]


# ---- in the browser --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_page_shows_its_operations_without_an_error_or_a_request_outside(
    browser: Chromium, gateway: GatewayProcess, path: str
) -> None:
    browser.open(gateway, path)
    assert browser.driver.title == "Telemetry gateway: HTTP API"
    assert "/v1/ingest/{device_id}" in browser.find(f"#operations-{INGEST}-{INGEST}").text.replace(
        "\u200b", ""
    )
    assert browser.errors() == []
    asked = browser.asked()
    assert f"{browser.origin}/docs/openapi.json" in asked
    outside = [url for url in asked if not url.startswith((f"{browser.origin}/docs", "data:"))]
    assert outside == []
    browser.shoot("1-page")


def test_try_it_out_sends_an_event_that_arrives_at_mqtt(
    form: Form, gateway: GatewayProcess
) -> None:
    form.browser.shoot("2-before", form.ROOT)
    with subscribed(gateway, "t/boiler-7") as subscriber:
        try:
            shown = form.send("boiler-7", EVENT)
            form.browser.shoot("3-accepted-202", f"{form.ROOT} .responses-wrapper")
            assert shown.status == 202
            assert '"ack": "enqueue"' in shown.text
            assert "x-receipt: " in shown.text
            assert subscriber.stdout
            arrived = [line for line in subscriber.stdout if line.startswith("t/boiler-7 ")]
            topic, _, body = arrived[0].partition(" ")
            sent = json.loads(body)
            assert sent.pop("ts")
            assert (topic, sent) == ("t/boiler-7", json.loads(EVENT))
        finally:
            subscriber.kill()
    assert form.browser.errors() == []


def test_the_page_shows_200_when_the_sink_is_asked_for(form: Form) -> None:
    shown = form.send("boiler-7", EVENT.replace("7", "8"), ack="sink")
    form.browser.shoot("4-delivered-200", f"{form.ROOT} .responses-wrapper")
    assert shown.status == 200
    assert '"ack": "sink"' in shown.text
    assert form.browser.errors() == []


def test_the_page_shows_why_an_event_is_400(form: Form) -> None:
    shown = form.send("boiler-7", '{"metrics":{"Temp":21.5}}')
    form.browser.shoot("5-refused-400", f"{form.ROOT} .responses-wrapper")
    assert shown.status == 400
    assert '"code": "bad_metric_key"' in shown.text
    assert refused_in(form.browser.errors(), 400)


def test_the_page_shows_that_an_event_is_413(form: Form) -> None:
    large = json.dumps({"metrics": {}, "payload": "x" * EVENT_MAX})
    shown = form.send("boiler-7", large)
    form.browser.shoot("6-too-large-413", f"{form.ROOT} .responses-wrapper")
    assert shown.status == 413
    assert '"code": "body_too_large"' in shown.text
    assert refused_in(form.browser.errors(), 413)


def test_the_page_shows_that_a_full_log_is_503(browser: Chromium, tmp_path: Path) -> None:
    bodies = [
        json.dumps({"metrics": {}, "payload": "x" * size}).encode() for size in (60_000, 4_000)
    ]
    with GatewayProcess(tmp_path / "full") as full:  # no broker: nothing empties the log
        form = Form(browser, full)
        for body in bodies:  # one that is large is refused alone, as long as others fit
            wait_for(lambda body=body: full.post(body=body) == 503, what="the log to be full")
        shown = form.send("boiler-7", EVENT)
        browser.shoot("7-full-503", f"{form.ROOT} .responses-wrapper")
    assert shown.status == 503
    assert '"code": "log_full"' in shown.text
    assert "retry-after: " in shown.text
    assert refused_in(browser.errors(), 503)


@pytest.mark.parametrize(
    "script",
    [
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';",
        "const s = document.createElement('style'); s.textContent = 'body { color: red }';",
        "const s = new Image(); s.src = 'http://127.0.0.1:9/pixel.png';",
    ],
    ids=["inline script", "inline style", "image of another site"],
)
def test_what_the_policy_forbids_does_not_happen_but_is_seen(
    browser: Chromium, gateway: GatewayProcess, script: str
) -> None:
    """The control of "no console errors" and "no request outside"."""
    browser.open(gateway)
    browser.driver.execute_script(f"{script} document.body.append(s);")
    errors: list[str] = wait_for(browser.errors, what="the console to say so")
    assert "Content Security Policy" in errors[0]
    assert browser.driver.execute_script("return window.ran") is None
    outside = [url for url in browser.asked() if not url.startswith((browser.origin, "data:"))]
    assert outside == (["http://127.0.0.1:9/pixel.png"] if "Image" in script else [])


# ---- its files -------------------------------------------------------------------------------


def test_the_vendored_files_are_those_of_the_pinned_version() -> None:
    sums = dict(
        reversed(line.split()) for line in (docs_ui.FOLDER / "SHA256SUMS").read_text().splitlines()
    )
    own = {"__init__.py", "index.html", "init.js", "page.css", "icon.svg", "SHA256SUMS"}
    files = {path.name for path in docs_ui.FOLDER.iterdir() if path.is_file()}
    assert files == own | set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((docs_ui.FOLDER / name).read_bytes()).hexdigest() == digest, name
    assert f'"{docs_ui.VERSION}"' in (docs_ui.FOLDER / "swagger-ui-bundle.js").read_text()


def test_the_version_is_written_once() -> None:
    own = [path for path in docs_ui.FOLDER.iterdir() if path.suffix in (".py", ".html")]
    own += [docs_ui.FOLDER / "init.js", ROOT / "pyproject.toml"]
    assert sum(path.read_text().count(docs_ui.VERSION) for path in own) == 1


def test_a_wheel_carries_them() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "docs_ui/*" in patterns["package-data"]["gateway"]


def test_nothing_is_read_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> IO[bytes]:
        raise AssertionError("read")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read)
        pages = docs_ui.pages()
        with pytest.raises(AssertionError):
            pages["/docs/swagger-ui.css"](None)
    assert pages["/docs/swagger-ui.css"](None).body


def test_every_answer_is_kept_from_being_sniffed_or_framed(gateway: GatewayProcess) -> None:
    for path in docs_ui.pages():
        status, headers, body = gateway.request("GET", path)
        assert (status, headers["x-content-type-options"]) == (200, "nosniff"), path
        assert headers["referrer-policy"] == "no-referrer"
        policy = dict(part.partition(" ")[::2] for part in docs_ui.POLICY.split("; "))
        assert headers["content-security-policy"] == docs_ui.POLICY
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in docs_ui.POLICY
        assert len(body) == int(headers["content-length"])
        head_status, head, nothing = gateway.request("HEAD", path)
        assert (head_status, nothing, head["content-type"]) == (200, b"", headers["content-type"])
        assert gateway.request("POST", path)[0] == 405
    assert gateway.request("GET", "/docs/SHA256SUMS")[0] == 404
    assert gateway.request("GET", "/docs/../docs_ui/index.html")[0] == 404
