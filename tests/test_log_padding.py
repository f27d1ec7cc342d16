"""What fills a record's last word is under no checksum: torn, it makes no conflict of a repeat."""

import pytest

from tests.log_states import IndexMachine, body_of


@pytest.mark.parametrize("size", range(40, 72))
def test_repeat_is_known_when_the_padding_of_its_original_is_torn(size: int) -> None:
    machine = IndexMachine()
    try:
        body = body_of(1, size, 7)
        machine.repeat(0, "dev-1", body, 7, None)
        (event,) = machine.model.events
        share = (event.used + 0.5) / event.size if event.size > event.used else 1.0
        machine.power_cut_with_garbage(share, 1)
        assert not event.lost
        machine.repeat(1, "dev-1", body, 7, None)
    finally:
        machine.teardown()
