"""Refusals: one list, the same as that of the compiled code; exceptions fit to be shown."""

import importlib
import json
import re
from pathlib import Path

import pytest

from gateway import errors
from gateway.__main__ import EXIT_CODES
from gateway.errors import BY_CODE, REFUSALS, ConfigError, Exit, PortBusy, Refusal

ROOT = Path(__file__).parent.parent
CODES = re.findall(r'X\(\w+, "(\w+)"\)', (ROOT / "_native" / "gw_codes.h").read_text())
REFUSED = REFUSALS[1:]


def test_the_table_follows_the_list_of_the_compiled_code() -> None:
    assert len(CODES) > 30
    assert [refusal.code for refusal in REFUSED] == CODES


@pytest.mark.parametrize("module", ["_log", "_validator"])
def test_the_compiled_modules_have_the_same_codes(module: str) -> None:
    compiled = importlib.import_module(f"gateway.{module}")
    assert tuple(compiled.CODES) == tuple(refusal.code for refusal in REFUSALS)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.code)
def test_a_refusal_has_a_status_of_the_interface(refusal: Refusal) -> None:
    assert refusal.status in {400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 429, 500, 503, 504}


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.code)
def test_a_body_has_code_message_and_field(refusal: Refusal) -> None:
    assert json.loads(refusal.body("metrics.temp_c")) == {
        "code": refusal.code,
        "message": refusal.message,
        "field": "metrics.temp_c",
    }


def test_a_body_without_field_says_null() -> None:
    assert json.loads(BY_CODE["log_full"].body())["field"] is None


def test_a_body_may_have_a_message_of_its_own() -> None:
    assert json.loads(BY_CODE["bad_ts"].body("ts", "no offset"))["message"] == "no offset"


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.code)
def test_only_what_is_known_not_to_be_in_the_log_may_look_so(refusal: Refusal) -> None:
    unknown = {"internal", "accepted_pending"}
    assert (refusal.status in {500, 504}) == (refusal.code in unknown)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.code)
def test_a_message_that_names_a_setting_names_a_real_one(refusal: Refusal) -> None:
    from gateway.settings import SETTINGS

    for key in re.findall(r"\b(?:http|log|mqtt|auth)\.[a-z_]+", refusal.message):
        assert key in SETTINGS


def test_every_exit_code_is_in_the_help() -> None:
    assert set(EXIT_CODES) == {int(code) for code in Exit}


def test_every_exception_is_drawn_in_the_tree() -> None:
    tree = errors.__doc__ or ""
    for name, thing in vars(errors).items():
        if isinstance(thing, type) and issubclass(thing, Exception):
            assert f"─ {name} " in tree


def test_a_busy_port_names_the_setting_to_change() -> None:
    error = PortBusy("127.0.0.1", 8000, "http.port")
    assert "--set http.port=8001" in str(error)
    assert error.exit_code == Exit.PORT_BUSY


def test_a_config_error_has_a_line_for_each_problem() -> None:
    assert str(ConfigError("a", "b")) == "a\nb"
