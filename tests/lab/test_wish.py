import pytest

from testbed.errors import UsageError
from testbed.lab.wish import LabWish, choose_hosts


def names(**wish):
    return [host.name for host in choose_hosts(LabWish(**wish))]


def test_by_default_there_is_one_of_each_board():
    assert names() == ["jetson-orin-nano", "raspberry-pi-5", "raspberry-pi-4b"]


def test_boards_take_turns():
    assert names(devices=5)[3:] == ["jetson-orin-nano-2", "raspberry-pi-5-2"]


def test_one_host_per_persona_that_is_named():
    assert names(personas=("raspberry_pi_5_8gb", "plain")) == ["raspberry-pi-5", "board-1"]
    assert names(personas=("plain",), devices=2) == ["board-1", "board-2"]


def test_addresses_follow_the_machines_own():
    hosts = choose_hosts(LabWish(subnet="10.7.0.0/29", devices=2, personas=("plain",)))
    assert [host.address for host in hosts] == ["10.7.0.2", "10.7.0.3"]


def test_a_persona_brings_its_kind_profile_and_memory():
    [host] = choose_hosts(LabWish(personas=("raspberry_pi_5_8gb",)))
    assert (host.kind, host.profile, host.needs_cmdline) == ("raspberry_pi", "raspberry_pi_5_8gb", True)
    assert host.memory_bytes > 7 << 30
    [capped] = choose_hosts(LabWish(personas=("raspberry_pi_5_8gb",), memory_bytes=1 << 30))
    assert capped.memory_bytes == 1 << 30


WRONG = {
    "no such persona": (LabWish(personas=("raspbery_pi_5_8gb",)), 'did you mean "raspberry_pi_5_8gb"?'),
    "no network": (LabWish(subnet="10.99.0.1/24"), 'a network such as "10.99.0.0/24"'),
    "IPv6": (LabWish(subnet="fd00::/64"), "an IPv4 network"),
    "no room": (LabWish(subnet="10.7.0.0/30"), "10.7.0.0/30 is too small for 3 hosts"),
    "no memory": (LabWish(memory_bytes=1 << 20), "at least 128 MiB"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_wanted_is_told(case):
    wish, told = WRONG[case]
    with pytest.raises(UsageError) as error:
        choose_hosts(wish)
    assert told in str(error.value)
