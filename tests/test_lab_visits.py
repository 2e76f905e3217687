"""What a visit of provisioning costs a board: however much is checked, it is asked in one round trip, or two."""

from __future__ import annotations

import pytest

from testbed.config import load_inventory
from testbed.devices._board import connect_to
from testbed.provision.runner import Provisioning
from testbed.provision.visit import CHANGED, DIFFERS, READY, Options
from tests.lab_runs import logins
from tests.virtual_lab import virtual_lab

pytestmark = [pytest.mark.slow, pytest.mark.lab]

#: One for all facts; one more for the clock, where the first took too long to tell that well enough.
MOST_ROUND_TRIPS = 2


class Counted:
    """A connection; notes every verb that asks the device for something."""

    def __init__(self, connection, verbs):
        self._connection, self._verbs, self.name = connection, verbs, connection.name

    def close(self):
        self._connection.close()

    def __getattr__(self, verb):
        self._verbs.append(verb)
        return getattr(self._connection, verb)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A Jetson, as it comes from the box."""
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))
    with virtual_lab(tmp_path / "lab", devices=1, personas=("jetson_orin_nano_8gb",)) as lab:
        yield lab


def visit(lab, **options):
    """All of `testbed provision`: the board's steps and those of Python; its status, and the verbs it took."""
    verbs = []
    visits = Provisioning(
        load_inventory(lab.inventory),
        Options(**options),
        connect=lambda device: Counted(connect_to(device), verbs),
    )
    [outcome] = visits.run()
    assert outcome.problems == ()
    return outcome.status, verbs


def test_what_is_to_be_checked_on_a_board_is_asked_in_few_round_trips(lab):
    status, verbs = visit(lab, check=True)
    assert (status, len(verbs) <= MOST_ROUND_TRIPS) == (DIFFERS, True), verbs
    assert visit(lab)[0] == CHANGED
    before = logins(lab.hosts[0])
    status, verbs = visit(lab)
    assert (status, len(verbs) <= MOST_ROUND_TRIPS) == (READY, True), verbs
    assert logins(lab.hosts[0]) == before + 1
