"""Caps on the kernel that is here, and the v2 logic on directory trees that look like one."""

import errno
import os
import subprocess
import sys

import pytest

from testbed.errors import LimitError
from testbed.node import limits
from tests.drills import wait_until

MIB = 1 << 20
HOG = "import sys; data = bytearray(b'x') * int(sys.argv[1]); print('alive', flush=True); input()"


@pytest.fixture
def group():
    made = limits.create(f"test-{os.getpid()}", 64 * MIB)
    yield made
    made.remove()
    assert not any(path.exists() for path in made.paths)


def hog(group, count):
    return subprocess.Popen(
        [sys.executable, "-c", HOG, str(count)],
        preexec_fn=lambda: group.add(os.getpid()),  # noqa: PLW1509 -- nothing else runs in this process
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.mark.cgroup
def test_the_kernel_kills_above_the_cap_and_says_so(group):
    with hog(group, 200 * MIB) as process:
        assert process.wait() == -9
    assert group.oom_kills() == 1
    assert group.peak() == 64 * MIB


@pytest.mark.cgroup
def test_below_the_cap_peak_and_current_memory_are_told(group):
    with hog(group, 32 * MIB) as process:
        process.stdout.readline()
        assert 32 * MIB < group.usage()[0] < 64 * MIB
        assert 32 * MIB < group.peak() < 64 * MIB
        process.communicate(b"\n")
    assert group.oom_kills() == 0
    assert group.reset_peak()
    assert group.peak() < 32 * MIB
    assert group.usage()[1] is not None


@pytest.mark.cgroup
def test_removing_kills_what_is_left_inside():
    group = limits.create(f"test-{os.getpid()}", 64 * MIB, cores=0.5)
    with hog(group, MIB) as process:
        process.stdout.readline()
        group.remove()
        assert process.wait() == -9
    assert not any(path.exists() for path in group.paths)


@pytest.mark.cgroup
def test_a_group_that_cannot_be_capped_is_not_left_behind():
    with pytest.raises(LimitError, match="--no-cap"):
        limits.create(f"test-{os.getpid()}", -5)
    assert not list(limits.ROOT.glob(f"*/{limits.PREFIX}test-{os.getpid()}"))


def test_only_groups_of_ours_are_ever_removed(tmp_path):
    (tmp_path / "system.slice").mkdir()
    with pytest.raises(LimitError, match="no group of the testbed"):
        limits.remove_path(tmp_path / "system.slice")
    assert (tmp_path / "system.slice").exists()


def test_a_group_that_is_gone_is_as_good_as_removed(tmp_path):
    limits.remove_path(tmp_path / "testbed-gone")


# ── v2, on plain trees ────────────────────────────────────────────────────────────────────────────────────────────────
def tree2(folder, controllers="cpu memory", enabled="", inside=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.controllers").write_text(controllers)
    (folder / "cgroup.subtree_control").write_text(enabled)
    (folder / "cgroup.procs").write_text("\n".join(map(str, inside)))
    return folder


def membership(tmp_path, group):
    path = tmp_path / "membership"
    path.write_text(f"1:name=systemd:/x\n0::{group}\n")
    return path


def test_v2_the_root_takes_groups_where_it_may_be_written(tmp_path):
    root = tree2(tmp_path / "cgroup", inside=(1, 2, 3))
    assert limits.find_parent(root, membership(tmp_path, "/")) == ("v2", root)


def test_v2_a_delegated_group_that_holds_only_us_is_preferred(tmp_path):
    root = tree2(tmp_path / "cgroup")
    scope = tree2(root / "user.slice" / "run.scope", inside=(os.getpid(),))
    assert limits.find_parent(root, membership(tmp_path, "/user.slice/run.scope")) == ("v2", scope)


def test_v2_a_group_shared_with_others_cannot_have_capped_children(tmp_path):
    root = tree2(tmp_path / "cgroup", controllers="pids")
    tree2(root / "user.slice" / "session.scope", inside=(os.getpid(), 1))
    with pytest.raises(LimitError, match="--no-cap"):
        limits.find_parent(root, membership(tmp_path, "/user.slice/session.scope"))


def test_v2_without_the_memory_controller_the_message_gives_the_way_out(tmp_path):
    root = tree2(tmp_path / "cgroup", controllers="hugetlb")
    with pytest.raises(LimitError, match=r"run as root, or on cgroup v2.*--no-cap"):
        limits.find_parent(root, membership(tmp_path, "/"))


def test_v1_is_found_by_its_memory_controller(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("0")
    assert limits.find_parent(tmp_path, membership(tmp_path, "/")) == ("v1", tmp_path / "memory")


def made2(tmp_path, monkeypatch, **options):
    """A v2 group with the files that the kernel would have put there."""
    root = tree2(tmp_path / "cgroup", enabled=options.pop("enabled", ""))
    files = {"memory.max": "max", "memory.swap.max": "max", "memory.oom.group": "0", "cpu.max": "max 100000"}
    plain = type(root).mkdir

    def mkdir(path, *args, **kwargs):
        plain(path, *args, **kwargs)
        for name, text in files.items():
            (path / name).write_text(text)

    monkeypatch.setattr(type(root), "mkdir", mkdir)
    return root, limits.create("x/y z", 32 * MIB, parent=root, root=root, **options)


def test_v2_cap_swap_group_kill_and_quota_are_set(tmp_path, monkeypatch):
    root, group = made2(tmp_path, monkeypatch, cores=1.5)
    assert group.path == root / "testbed-x_y_z"
    assert (group.path / "memory.max").read_text() == str(32 * MIB)
    assert (group.path / "memory.swap.max").read_text().startswith("0")
    assert (group.path / "memory.oom.group").read_text().startswith("1")
    assert (group.path / "cpu.max").read_text() == "150000 100000"


def test_v2_what_is_held_back_gets_its_budget_again(tmp_path, monkeypatch):
    _, group = made2(tmp_path, monkeypatch, cores=1.5, quota=True)
    assert group.limit_cores(0.25)
    assert (group.path / "cpu.max").read_text().startswith("25000 100000")
    assert group.limit_cores(None)
    assert (group.path / "cpu.max").read_text().startswith("150000 100000")
    (group.path / "cpu.max").unlink()
    assert not group.limit_cores(0.25)
    assert not (group.path / "cpu.max").exists()


def test_v2_controllers_are_enabled_once(tmp_path, monkeypatch):
    root, _ = made2(tmp_path, monkeypatch, enabled="memory")
    assert (root / "cgroup.subtree_control").read_text() == "memory"


def test_v2_a_group_with_ourselves_inside_is_left_for_a_leaf(tmp_path, monkeypatch):
    scope = tree2(tmp_path / "run.scope", inside=(os.getpid(),))
    plain = type(scope).write_text

    def write_text(path, text, *args, **kwargs):
        if path.name == "cgroup.subtree_control" and not (scope / "testbed-agent").exists():
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return plain(path, text, *args, **kwargs)

    monkeypatch.setattr(type(scope), "write_text", write_text)
    limits.create("x", MIB, parent=scope, root=scope)
    assert (scope / "testbed-agent" / "cgroup.procs").read_text() == str(os.getpid())
    assert (scope / "cgroup.subtree_control").read_text() == "+memory"


def test_v2_counters(tmp_path):
    group = limits.Group2(tree2(tmp_path / "testbed-x"), MIB)
    assert (group.peak(), group.oom_kills(), group.usage()) == (None, 0, (None, None))
    (group.path / "memory.peak").write_text("4096\n")
    (group.path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (group.path / "memory.stat").write_text(
        "anon 100\nfile 900\nshmem 10\nkernel_stack 3\npagetables 4\nslab_unreclaimable 5\nslab_reclaimable 7\n"
        "workingset_refault_anon 1\nworkingset_refault_file 2\n"
    )
    assert (group.peak(), group.oom_kills(), group.usage()) == (4096, 2, (122, 3))
    (group.path / "memory.events.local").write_text("oom_kill 1\n")
    assert group.oom_kills() == 1


def test_v2_a_scope_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    root = tree2(tmp_path / "cgroup")
    (tmp_path / "bus").touch()
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    monkeypatch.setattr(limits.shutil, "which", lambda _: "/usr/bin/systemd-run")
    assert limits.scope_command(root, environment) == ()
    monkeypatch.setattr(limits, "_writable", lambda _: False)
    command = limits.scope_command(root, environment)
    assert command[:5] == ("env", f"XDG_RUNTIME_DIR={tmp_path}", "systemd-run", "--user", "--scope")
    assert limits.scope_command(root, {"XDG_RUNTIME_DIR": str(tmp_path / "without")}) == ()


def test_waiting_gives_up():
    with pytest.raises(AssertionError):
        wait_until(lambda: False, patience_seconds=0.01)
