"""The arithmetic of both cgroup versions on plain directory trees; the real ones are in test_host.py."""

import pytest

from testbed.lab.groups import HostGroups, hierarchies, memory_version


@pytest.fixture
def v1(tmp_path):
    for name in ("memory", "freezer", "cpu"):
        (tmp_path / name).mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").touch()
    return tmp_path


@pytest.fixture
def v2(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    return tmp_path


def test_v1_is_where_its_memory_hierarchy_is(v1):
    assert memory_version(v1) == "v1"
    assert hierarchies(v1) == [v1 / "freezer", v1 / "memory"]


def test_a_v1_machine_without_a_freezer_freezes_by_its_v2_hierarchy(v1):
    (v1 / "freezer").rmdir()
    (v1 / "unified").mkdir()
    assert hierarchies(v1) == [v1 / "unified", v1 / "memory"]


def test_v2_is_where_memory_is_among_the_controllers(v2):
    assert memory_version(v2) == "v2"
    assert hierarchies(v2) == [v2]


def test_a_hierarchy_without_memory_is_none(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    assert memory_version(tmp_path) is None


def test_v1_caps_memory_and_offers_the_hierarchy(v1):
    groups = HostGroups("lab", "board", v1)
    groups.make(1 << 20)
    assert (v1 / "memory/lab/board/memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (v1 / "freezer/lab/board").is_dir()
    assert groups.processes == groups.memory == v1 / "memory/lab/board"
    assert groups.mounting()[1:] == ("cgroup", "memory")
    assert groups.open_control() is None


def test_v2_caps_memory_and_keeps_processes_out_of_what_has_capped_children(v2):
    groups = HostGroups("lab", "board", v2)
    groups.make(1 << 20)
    assert (v2 / "lab/board/memory.max").read_text() == str(1 << 20)
    assert [(v2 / path).read_text() for path in ("cgroup.subtree_control", "lab/cgroup.subtree_control")] == [
        "+memory"
    ] * 2
    assert groups.processes == v2 / "lab/board/root/init"
    assert groups.processes.is_dir()
    assert groups.mounting()[1:] == ("cgroup2", "")


def test_use_counts_what_cannot_be_had_back(v1, v2):
    groups = HostGroups("lab", "board", v1)
    assert groups.used_bytes() is None
    groups.memory.mkdir(parents=True)
    (groups.memory / "memory.stat").write_text("cache 900\nrss 5\ntotal_cache 1000\ntotal_rss 100\ntotal_shmem 20\n")
    assert groups.used_bytes() == 120
