"""Peaks of a phase from /proc and of an accelerator: what the bounds hold, and when a trainer is over its budget."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.measurement import PeakMemory, PhaseMeasurement
from testbed.node.memory import PhaseMeter, parse_status
from tests.node.unified_board import UnifiedBoard

KIB = 1024


def write_status(proc, high, resident, anonymous, file, *, shared=0):
    (proc / "7").mkdir(exist_ok=True)
    (proc / "7" / "status").write_text(
        f"Name:\tpython\nVmHWM:\t{high} kB\nVmRSS:\t{resident} kB\nRssAnon:\t{anonymous} kB\nRssFile:\t{file} kB\n"
        f"RssShmem:\t{shared} kB\nThreads:\t3\n"
    )


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "clear_refs").touch()
    write_status(tmp_path, 100, 100, 60, 40)
    return tmp_path


def measured(phase):
    found = PhaseMeasurement(phase["name"], phase["seconds"], PeakMemory(**phase["peak"]))
    assert found.seconds >= 0
    return found.peak


def test_the_estimate_is_the_mark_less_the_file_pages_of_the_nearest_sample(proc):
    meter = PhaseMeter(7, None, proc)
    meter.begin("train")
    assert (proc / "7" / "clear_refs").read_text() == "5"
    write_status(proc, 500, 480, 430, 50, shared=5)
    meter.sample()
    write_status(proc, 500, 200, 110, 90)
    peak = measured(meter.end())
    assert peak.estimate_bytes == (500 - 50) * KIB
    assert peak.lower_bytes == 435 * KIB
    assert peak.upper_bytes is None
    assert peak.file_bytes == 50 * KIB
    assert peak.sources == {"lower": "sampled", "estimate": "vmhwm"}
    assert peak.samples == 3


def test_a_mark_that_cannot_be_started_again_is_not_taken_for_this_phase(proc):
    (proc / "7" / "clear_refs").unlink()
    meter = PhaseMeter(7, None, proc)
    meter.begin("train")
    write_status(proc, 9999, 300, 250, 50)
    peak = measured(meter.end())
    assert peak.estimate_bytes == 250 * KIB  # of the last sample: 300 resident, 50 of them file pages
    assert peak.sources["estimate"] == "sampled"


def test_of_a_process_that_died_the_mark_comes_from_whoever_reaped_it(proc):
    meter = PhaseMeter(7, None, proc)
    meter.begin("train")
    (proc / "7" / "status").write_text("Name:\tpython\nState:\tZ (zombie)\n")
    peak = measured(meter.end(dead=800 * KIB))
    assert peak.estimate_bytes == (800 - 40) * KIB
    assert peak.sources["estimate"] == "vmhwm"


def test_without_a_process_nothing_is_measured_and_nothing_is_zero():
    peak = measured(PhaseMeter(None, None).end())
    assert peak == PeakMemory()


def test_a_group_to_which_nothing_was_charged_yet_has_measured_nothing(proc):
    class Untouched:
        version, peak_source = "v1", "cgroup1_max_usage"

        def usage(self):
            return 0, 0

        def peak(self):
            return 0

        def reset_peak(self):
            return True

    meter = PhaseMeter(7, Untouched(), proc)
    meter.begin("start")
    meter.sample()
    phase = meter.end()
    peak = measured(phase)
    assert (peak.lower_bytes, peak.estimate_bytes, peak.upper_bytes) == (None, 60 * KIB, None)
    assert peak.sources == {"estimate": "vmhwm"}
    assert {row[4] for row in phase["trace"]} == {None}


def test_our_own_status_is_read():
    status = parse_status(Path("/proc/self/status").read_bytes())
    assert status["VmHWM"] >= status["RssAnon"] > 0


def combined(phase):
    found = measured(phase)
    bounds = {bound: getattr(found, f"{bound}_bytes") for bound in ("lower", "estimate", "upper")}
    return {bound: value and value // KIB for bound, value in bounds.items()}, found


#: The trainer holds 100 anonymous, 40 of files, 10 in the kernel and 300 on the accelerator, others 50 there.  Its peak
#: without the accelerator is 150.  (cgroup, the board charges, what the node was told) → bounds, and where the
#: accelerator's part comes in: with a table of processes, and without.
COMBINATIONS = {
    ("v2", True, True): ((410, 400, 450), ("lower", "estimate")),
    ("v2", False, False): ((410, 400, 450), ("lower", "estimate", "upper")),
    ("v2", True, None): ((410, 400, 750), ("lower", "estimate", "upper")),
    ("v2", False, None): ((410, 400, 450), ("lower", "estimate", "upper")),
    ("v1", True, True): ((410, 400, 450), ("estimate",)),
    ("v1", False, False): ((410, 400, 450), ("lower", "estimate", "upper")),
    ("v1", True, None): ((410, 400, 750), ("estimate", "upper")),
    ("v1", False, None): ((400, 400, 450), ("lower", "estimate", "upper")),
    (None, True, True): ((400, 400, None), ("lower", "estimate")),
    (None, False, None): ((400, 400, None), ("lower", "estimate")),
}


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(("version", "charges", "told"), COMBINATIONS)
def test_the_accelerator_enters_every_bound_once(tmp_path, version, charges, told, table):
    board = UnifiedBoard(tmp_path, version=version, charges=charges, table=table)
    meter = board.meter(told, 50)
    meter.begin("train")
    board.moves_to(anonymous=100, file=40, kernel=10, held=300, others=50)
    bounds, peak = combined(meter.end())
    (lower, estimate, upper), added = COMBINATIONS[version, charges, told]
    assert bounds == {"lower": lower, "estimate": estimate, "upper": upper}
    assert peak.accelerator_bytes == 300 * KIB
    figure = "nvmap_process" if table else "nvmap_delta"
    assert {bound for bound, source in peak.sources.items() if source.endswith(f"+{figure}")} == set(added)
    assert all("+" not in source for bound, source in peak.sources.items() if bound not in added)


def test_what_was_never_held_at_once_is_not_added(tmp_path):
    board = UnifiedBoard(tmp_path)
    meter = board.meter(False, 0)
    meter.begin("train")
    board.moves_to(anonymous=500, held=20)
    meter.sample()
    board.moves_to(anonymous=100, held=300)
    bounds, peak = combined(meter.end())
    assert bounds == {"lower": 520, "estimate": 520, "upper": 800}  # the kernel's peak knows no moment
    assert peak.sources["estimate"] == "vmhwm+nvmap_process"


def test_the_fullest_moment_need_not_be_that_of_the_high_water_mark(tmp_path):
    board = UnifiedBoard(tmp_path)
    meter = board.meter(False, 0)
    meter.begin("train")
    board.moves_to(anonymous=200, held=0)
    meter.sample()
    board.moves_to(anonymous=150, held=300)
    bounds, peak = combined(meter.end())
    assert (bounds["lower"], bounds["estimate"]) == (450, 450)
    assert peak.sources["estimate"] == "sampled+nvmap_process"


def test_what_others_may_have_taken_is_neither_counted_as_certain_nor_left_out_of_what_can_be(tmp_path):
    board = UnifiedBoard(tmp_path, table=False)
    meter = board.meter(False, 50, 80, 60)  # others held 50 to 80 whenever there was no trainer, 60 at last
    meter.begin("train")
    board.moves_to(anonymous=100, held=300, others=60)
    assert combined(meter.end())[0] == {"lower": 100 + 280, "estimate": 100 + 300, "upper": 100 + 310}


def test_a_sum_with_an_unknown_part_is_unknown_until_the_trainer_tells_it(tmp_path):
    board = UnifiedBoard(tmp_path, table=False)
    meter = board.meter(False)  # no baseline was ever taken
    meter.begin("train")
    board.moves_to(anonymous=100, file=40, held=300)
    meter.sample()
    assert meter.estimate_bytes is None
    bounds, peak = combined(meter.end())
    assert bounds == {"lower": 100, "estimate": None, "upper": None}
    assert (peak.sources, peak.accelerator_bytes) == ({"lower": "sampled"}, None)
    meter.begin("send")
    board.moves_to(anonymous=100, file=40, held=300)
    bounds, peak = combined(meter.end(reserved=250 * KIB))
    assert bounds == {"lower": 100, "estimate": 350, "upper": 390}
    assert peak.sources["estimate"] == "vmhwm+torch_reserved"


def test_what_the_allocator_held_between_two_samples_raises_the_upper_bound(tmp_path):
    board = UnifiedBoard(tmp_path)
    meter = board.meter(False, 0)
    meter.begin("train")
    board.moves_to(anonymous=100, held=200)
    bounds, peak = combined(meter.end(reserved=260 * KIB))
    assert bounds == {"lower": 300, "estimate": 300, "upper": 360}
    assert peak.sources["upper"] == "cgroup2_peak+torch_reserved"


def test_the_trace_has_a_column_for_the_accelerator_where_there_is_one(tmp_path, proc):
    board = UnifiedBoard(tmp_path / "board")
    meter = board.meter(False, 0)
    board.moves_to(anonymous=100, file=40, kernel=10, held=300)
    *_, last = meter.end()["trace"]
    assert last[1:] == (140 * KIB, 100 * KIB, 40 * KIB, 110 * KIB, 300 * KIB)
    assert {len(row) for row in PhaseMeter(7, None, proc).end()["trace"]} == {5}


moments = st.fixed_dictionaries({name: st.integers(0, 1000) for name in ("anonymous", "file", "kernel", "held")})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    version=st.sampled_from(["v1", "v2", None]),
    charges=st.booleans(),
    knows=st.booleans(),
    table=st.booleans(),
    others=st.lists(st.integers(0, 500), min_size=1, max_size=3),
    timeline=st.lists(st.tuples(moments, st.floats(0, 1)), min_size=1, max_size=6),
)
def test_the_truth_lies_between_the_bounds(version, charges, knows, table, others, timeline):
    with TemporaryDirectory() as folder:
        board = UnifiedBoard(Path(folder), version=version, charges=charges, table=table)
        meter = board.meter(charges if knows else None, *others)
        meter.begin("train")
        for moment, share in timeline:
            now = round(min(others) + share * (max(others) - min(others)))  # others stay within what they have held
            board.moves_to(**moment, others=now)
            meter.sample()
        bounds, _ = combined(meter.end())
        meter.close()
    kernel = "kernel" if version is not None else "nothing"  # without a group nobody tells
    truth = max(m["anonymous"] + m.get(kernel, 0) + m["held"] for m, _ in timeline)
    assert (bounds["lower"] or 0) <= truth
    assert bounds["upper"] is None or truth <= bounds["upper"]
    if table:
        assert bounds["estimate"] == max(m["anonymous"] + m["held"] for m, _ in timeline)
    if charges and knows and version is not None:  # nothing is counted that the cgroup's own peak does not hold
        assert bounds["upper"] == max(sum(m.values()) for m, _ in timeline)


# ── over the budget ────────────────────────────────────────────────────────────────────────────────────────────────


def over(board, told, *others, limit=400, **moment):
    meter = board.meter(told, *others, limit=limit)
    meter.begin("train")
    board.moves_to(**moment)
    meter.sample()
    return meter.over_budget(limit * KIB)


@pytest.mark.parametrize("told", [False, None])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_trainer_is_over_its_budget_by_what_its_cgroup_does_not_see(tmp_path, version, told):
    board = UnifiedBoard(tmp_path, version=version)
    why = over(board, told, 50, anonymous=200_000, held=300_000, others=50, limit=400_000)
    assert why == (
        "over budget in phase train: 488.3 MiB held, 195.3 MiB by the process and 293.0 MiB on the accelerator "
        "(nvmap_process), the budget is 390.6 MiB"
    )


def test_within_its_budget_a_trainer_goes_on(tmp_path):
    assert over(UnifiedBoard(tmp_path), False, 50, anonymous=100, held=300, others=50) is None


def test_where_the_kernel_holds_the_cap_the_agent_ends_nobody(tmp_path):
    board = UnifiedBoard(tmp_path, charges=True)
    assert over(board, True, 50, anonymous=200, held=300, others=50) is None


def test_nobody_is_ended_by_what_others_may_have_taken(tmp_path):
    board = UnifiedBoard(tmp_path, table=False)
    assert over(board, False, 50, 200, 60, anonymous=200, held=300, others=60) is None  # 200 + 360 − 200 for certain


def test_an_uncapped_trainer_has_no_budget_to_be_over(tmp_path):
    meter = UnifiedBoard(tmp_path).meter(False, 0)
    assert meter.over_budget(None) is None


@pytest.mark.parametrize(("total", "reserve"), [(8_000_000, 131_072), (2_000_000, 100_000)])
def test_a_board_that_is_about_to_run_out_of_memory_ends_its_trainer(tmp_path, total, reserve):
    board = UnifiedBoard(tmp_path, charges=True, total=total)
    meter = board.meter(True, 0)
    meter.begin("train")
    board.moves_to(anonymous=100, available=reserve)
    meter.sample()
    assert meter.over_budget(None) is None
    board.moves_to(anonymous=100, available=reserve - 1)
    meter.sample()
    assert meter.over_budget(None).startswith("the board was about to run out of memory in phase train: ")


def test_a_device_without_an_accelerator_is_never_over_its_budget(proc):
    meter = PhaseMeter(7, None, proc)
    meter.sample()
    assert meter.over_budget(1) is None
