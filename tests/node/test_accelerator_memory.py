"""What a trainer holds on an accelerator: nvmap's table and total as L4T's releases print them, and NVML of a card."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from testbed.node import accelerator
from testbed.node.accelerator_memory import find, parse_clients
from testbed.node.memory import AcceleratorSample

KIB = 1024
MIB = 1024 * KIB
TREES = Path(__file__).parent / "trees"
NVMAP = "sys/kernel/debug/nvmap/iovmm"
TRAINER = 4242
#: Of the trainer and its children, in each tree; and of everybody.
HELD = {
    "l4t-32.7": (812340, 836016),
    "l4t-35.6": (2147483, 2165359),
    "l4t-36.4": (3145728 + 65536 + 8192, 3260544),
}


@pytest.fixture
def board(tmp_path):
    def copy(name):
        return Path(shutil.copytree(TREES / name, tmp_path / name))

    return copy


def hold(root, kib):
    """Have all processes together hold so much."""
    path = root / "proc" / "meminfo"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("NvMapMemUsed")]
    path.write_text("\n".join([*lines, f"NvMapMemUsed: {kib} kB", ""]))


# ── nvmap ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("release", HELD)
@pytest.mark.parametrize("table", ["clients", "maps"])
def test_the_trainers_lines_of_the_drivers_table_are_added_up(board, release, table):
    root = board(release)
    if table == "maps":
        (root / NVMAP / "clients").unlink()
    found = find("cuda", None, root)
    found.take_baseline()
    sample = found.sample(TRAINER)
    assert sample.process_bytes == sample.least_bytes == sample.most_bytes == HELD[release][0] * KIB
    assert sample.source == "nvmap_process"


def test_a_process_that_is_not_in_the_table_holds_nothing(board):
    assert find("cuda", None, board("l4t-36.4")).sample(1042 + 1).process_bytes == 0


def test_a_descendant_counts_also_where_it_leads_a_process_group_of_its_own(board):
    root = board("l4t-36.4")
    (root / "proc" / "4243" / "stat").write_text("4243 (worker) S 4250 4243 4243 0")
    (root / "proc" / "4250").mkdir()
    (root / "proc" / "4250" / "stat").write_text(f"4250 (launcher) S {TRAINER} 4250 4250 0")
    assert find("cuda", None, root).sample(TRAINER).process_bytes == HELD["l4t-36.4"][0] * KIB


def test_an_orphan_of_the_trainers_process_group_counts(board):
    root = board("l4t-36.4")
    (root / "proc" / "4243" / "stat").write_text(f"4243 (worker) S 1 {TRAINER} {TRAINER} 0")
    assert find("cuda", None, root).sample(TRAINER).process_bytes == HELD["l4t-36.4"][0] * KIB


@pytest.mark.parametrize(
    ("size", "expected"), [("5K", 5 * KIB), ("5M", 5 * MIB), ("5G", 5 * 1024 * MIB), ("5", None), ("K", None)]
)
def test_sizes_have_a_unit(size, expected):
    rows = parse_clients(f"CLIENT PROCESS PID SIZE\nuser python3 7 {size}\n".encode())
    assert rows == ([] if expected is None else [(7, expected)])


def test_what_is_no_table_says_nothing():
    assert parse_clients(b"") is None
    assert parse_clients(b"Device list is\n") is None


@pytest.mark.parametrize("release", HELD)
def test_without_the_table_it_is_what_all_have_grown_by(board, release):
    root = board(release)
    shutil.rmtree(root / "sys")
    found = find("cuda", None, root)
    everybody = HELD[release][1]
    hold(root, everybody - 1000)
    found.take_baseline()
    hold(root, everybody)
    expected = 1000 * KIB
    assert found.sample(TRAINER) == AcceleratorSample(None, expected, expected, expected, "nvmap")
    assert found.sample(TRAINER).source == "nvmap_delta"


def test_before_a_baseline_was_taken_nothing_is_known(board):
    root = board("l4t-35.6")
    shutil.rmtree(root / "sys")
    sample = find("cuda", None, root).sample(TRAINER)
    assert (sample.figure, sample.least_bytes, sample.most_bytes, sample.source) == (None, None, None, "")


def test_others_count_by_the_least_and_the_most_that_they_were_seen_to_hold(board):
    root = board("l4t-35.6")
    shutil.rmtree(root / "sys")
    found = find("cuda", None, root)
    for others in (500, 200, 300):
        hold(root, others)
        found.take_baseline()
    hold(root, 450)
    sample = found.sample(TRAINER)
    assert (sample.figure, sample.least_bytes, sample.most_bytes) == (150 * KIB, 0, 250 * KIB)


def test_a_board_without_nvmaps_total_is_not_told_from_nvmaps_table(board, tmp_path):
    found = find("cuda", True, board("l4t-38.2"), library=str(tmp_path / "missing.so"))
    found.take_baseline()
    assert found.sample(TRAINER) == AcceleratorSample()
    assert (found.shared, found.charged, found.family) == (True, True, "")


def test_a_cpu_device_has_none():
    assert find("cpu", None) is None


# ── NVML ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Card:
    """A library in place of NVML, and what it answers."""

    def __init__(self, folder):
        self.library = folder / "nvml.so"
        self._state = folder / "card.txt"
        source = Path(__file__).with_name("fake_nvml.c")
        flags = ["-shared", "-fPIC", "-Wall", "-Werror", f'-DSTATE="{self._state}"']
        subprocess.run(["gcc", *flags, "-o", self.library, source], check=True)

    def says(self, *processes, used=None):
        lines = [f"memory {used}"] if used is not None else []
        self._state.write_text("\n".join([*lines, *(f"{pid} {held}" for pid, held in processes), ""]))

    def found(self, root, charged=None):
        return find("cuda", charged, root, library=str(self.library))


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return Card(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def host(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 1 kB\n")
    return tmp_path


def test_a_cards_list_names_what_the_trainer_holds(card, host):
    card.says((99, 7 * MIB), (TRAINER, 700 * MIB), used=900 * MIB)
    found = card.found(host)
    found.take_baseline()
    assert found.sample(TRAINER) == AcceleratorSample(700 * MIB, 0, 700 * MIB, 700 * MIB, "nvml")
    assert found.sample(TRAINER).source == "nvml_process"


@pytest.mark.parametrize("told", [True, None])
def test_a_cards_own_memory_is_in_no_cgroup_and_not_the_boards(card, host, told):
    card.says(used=0)
    found = card.found(host, told)
    assert (found.charged, found.shared) == (False, False)
    found.sample(TRAINER)
    assert found.shortage() is None  # however little of its own memory the host has left


def test_a_long_list_is_read_to_its_end(card, host):
    card.says(*((pid, MIB) for pid in range(10_000, 10_200)), (TRAINER, 5 * MIB), used=0)
    assert card.found(host).sample(TRAINER).process_bytes == 5 * MIB


def test_a_list_of_other_process_ids_is_not_taken_for_nothing(card, host):
    card.says(used=100 * MIB)
    found = card.found(host)
    found.take_baseline()
    assert found.sample(TRAINER).process_bytes == 0
    card.says((31, 800 * MIB), used=900 * MIB)
    assert found.sample(TRAINER) == AcceleratorSample(None, 800 * MIB, 0, 800 * MIB, "nvml")


def test_an_amount_that_is_not_available_is_unknown(card, host):
    card.says(used=100 * MIB)
    found = card.found(host)
    found.take_baseline()
    card.says((TRAINER, "n/a"), used=300 * MIB)
    assert (found.sample(TRAINER).process_bytes, found.sample(TRAINER).figure) == (None, 200 * MIB)


@pytest.mark.parametrize("used", [None, 5 * MIB])
def test_a_thor_shares_its_memory_and_lists_its_processes(card, board, used):
    card.says((TRAINER, 3800 * MIB), used=used)
    found = card.found(board("l4t-38.2"), True)
    assert (found.shared, found.charged, found.family) == (True, True, "nvml")
    assert found.sample(TRAINER).process_bytes == 3800 * MIB


def test_a_board_that_does_not_tell_its_cards_memory_shares_it(card, host):
    card.says((TRAINER, MIB))
    found = card.found(host, None)
    assert (found.shared, found.charged) == (True, None)


# ── in the trainer ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("budget", "own", "total", "expected"), [(4, 1, 8, 3 / 8), (16, 1, 8, 1.0), (1, 2, 8, 0.0)])
def test_the_allocator_gets_what_the_process_leaves_of_the_budget(budget, own, total, expected):
    assert accelerator.allocator_fraction(budget, own, total) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131'
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_an_accelerator_out_of_memory_is_known_by_any_of_its_words(error):
    assert accelerator.is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("NVML_SUCCESS == r"), OSError("No space left on device")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not accelerator.is_out_of_memory(error)
