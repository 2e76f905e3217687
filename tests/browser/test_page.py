"""The page of a report in a real Chromium: what is seen, heard and reached, and that it asks nobody for anything."""

from __future__ import annotations

import os
import statistics

import pytest

from testbed.report import summarise
from testbed.reports.files import write_file
from testbed.reports.gather import report_of
from testbed.reports.page import page_of
from testbed.store import FINISHED, RunFolder
from tests.browser.chromium import install, look
from tests.reports import sample
from tests.run_records import add_rounds, finished, planned, record

pytestmark = [pytest.mark.browser, pytest.mark.slow]
METHODS = {"lora": 0.5, "fedpruner": 0.6}
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    complaint = install(folder)
    if complaint and not os.environ.get("CI"):
        pytest.skip(f"npm cannot install what drives the browser: {complaint}")
    assert complaint is None, complaint
    return folder


@pytest.fixture(scope="module")
def drawn(packages, tmp_path_factory):
    """A report of every kind of exhibit, with names that are not meant well."""
    return look(packages, write_file(tmp_path_factory.mktemp("page") / "report.html", page_of(sample.report())))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods with three seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    return [made(folder, method, seed) for method in METHODS for seed in SEEDS]


def made(folder, method, seed):
    clients = [planned(0, "orin-1", 800, 740, 12), planned(1, "pi-1", 500, 470, 3)]
    run = RunFolder.create(folder, f"{method}-20260314-15092{seed}-5f3a", record(method, clients, seed=seed))
    for index in range(3):
        run.record_result(finished(index, 0, "orin-1", 720 + seed))
        run.record_result(finished(index, 1, "pi-1", 460 + index, limit_mib=500))
    add_rounds(run, [0.2, 0.4, METHODS[method] + 0.01 * seed**2])
    run.set_status(FINISHED)
    return run


@pytest.fixture(scope="module")
def stored(packages, runs, tmp_path_factory):
    """The page of real run folders."""
    page = page_of(report_of(runs, title="two methods"))
    return look(packages, write_file(tmp_path_factory.mktemp("page") / "report.html", page))


@pytest.fixture(params=["drawn", "stored"])
def found(request):
    return request.getfixturevalue(request.param)


def test_nothing_is_asked_for_and_nothing_complains(found):
    assert found["requests"] == []
    assert found["complaints"] == []


def test_every_figure_is_seen_at_every_width(found):
    for name, view in found["views"].items():
        assert len(view["figures"]) > 1
        for figure in view["figures"]:
            assert figure["shown"] == 1, (name, figure)
            assert figure["width"] > 300, (name, figure)
            assert figure["height"] > 100, (name, figure)
            assert figure["letters"] >= 10, (name, figure)  # pixels
            assert figure["cut"] == [], (name, figure)


def test_the_page_does_not_scroll_sideways(found):
    assert {name: view["page"][0] - view["page"][1] for name, view in found["views"].items()} == dict.fromkeys(
        found["views"], 0
    )


def test_axe_finds_nothing(found):
    assert {name: view["violations"] for name, view in found["views"].items()} == {name: [] for name in found["views"]}


def test_headings_go_down_step_by_step_and_ids_are_unique(found):
    view = found["views"]["desktop, light"]
    assert view["headings"][0] == 1
    assert set(view["headings"][1:]) == {2}
    assert view["repeated"] == []


def test_light_and_dark_follow_the_reader_and_print_is_light(found):
    light, dark = (found["views"][f"desktop, {theme}"]["background"] for theme in ("light", "dark"))
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(23, 24, 26)")
    assert found["theme"] == dark  # by its button, on a light screen
    assert found["printed"] == light


def test_the_keyboard_reaches_contents_regions_and_folded_numbers(found):
    """In this order, each with a mark that shows where one is; what is folded opens with the enter key."""
    reached = found["reached"]["found"]
    assert reached[0] == "a#report"  # past the contents
    contents = [name for name in reached if name.startswith("a#section-")]
    assert len(contents) == len(found["views"]["desktop, light"]["headings"]) - 1
    regions = [name.removeprefix("region ").removesuffix("-caption") for name in reached if name.startswith("region")]
    assert regions == [name for name in found["tables"] if not name.endswith("-numbers")]  # those are folded
    assert reached.count("summary") == len(found["views"]["desktop, light"]["figures"])
    assert not [name for name in reached if name.endswith("without a mark")]
    assert found["reached"]["opens"] is True


def test_a_table_is_sorted_by_its_raw_values_and_what_is_not_measured_comes_last(found):
    (up, rising), (down, falling) = found["sorted"]
    assert (up, down) == ("ascending", "descending")
    for values, reverse in ((rising, False), (falling, True)):
        numbers = [float(value) for value in values if value is not None]
        assert numbers == sorted(numbers, reverse=reverse)
        assert values[len(numbers) :] == [None] * (len(values) - len(numbers))


def test_without_scripts_everything_is_there(found):
    assert found["plain"] == {"figures": len(found["views"]["desktop, light"]["figures"]), "buttons": 0}


def test_raw_values_are_those_that_were_given(drawn):
    for exhibit in (sample.table(), sample.wide()):
        shown = drawn["tables"][exhibit.key]
        assert shown["keys"] == [column.key for column in exhibit.columns]
        assert shown["texts"] == [list(row) for row in exhibit.texts()]


def test_the_page_says_what_the_store_says(stored, runs):
    """Accuracy, loss and peak of every run; and the mean over the seeds."""
    summaries = {run.run_id: summarise(run) for run in runs}
    shown = stored["tables"]["run-figures"]
    rows = [dict(zip(shown["keys"], row, strict=True)) for row in shown["rows"]]
    assert {row["run"] for row in rows} == set(summaries)
    for row in rows:
        summary = summaries[row["run"]]
        for name in ("accuracy", "loss", "seconds", "bytes_up", "peak_worst_bytes"):
            assert float(row[name]) == getattr(summary, name), (row["run"], name)
    quality = stored["tables"]["quality"]
    means = {row[0]: float(row[quality["keys"].index("accuracy")]) for row in quality["rows"]}
    for method in METHODS:
        ours = [summary.accuracy for summary in summaries.values() if summary.method == method]
        assert means[method] == pytest.approx(statistics.mean(ours))
