"""`testbed compare`: what two runs have in common, and a sentence on each part of it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from testbed.cli import main
from testbed.job import FINISHED
from testbed.measurement import PeakMemory, PhaseMeasurement
from testbed.parity.comparison import parity_of
from testbed.parity.verdicts import PARTS, verdicts
from testbed.run_record import INTERRUPTED
from testbed.store import RunFolder
from tests.run_records import MIB, SOURCES, add_rounds, device, finished, out_of_memory, planned, record

ACCURACIES = [0.4, None, 0.6]


def make(runs_dir, name, results, *, clients=None, boards=None, accuracies=ACCURACIES, machine="Test CPU", **config):
    made = record(clients=clients or [planned(0, "orin-1", 800, 740, 12)], **config)
    inventory = {**made.inventory, "devices": boards} if boards else made.inventory
    made = replace(made, inventory=inventory, versions={**made.versions, "machine": {"cpu": machine}})
    folder = RunFolder.create(runs_dir, name, made)
    for result in results:
        folder.record_result(result)
    add_rounds(folder, accuracies)
    folder.set_status(FINISHED)
    return folder


def jobs(on="orin-1", peak_mib=600, count=3):
    return [finished(index, 0, on, peak_mib) for index in range(count)]


def told(first, second):
    return verdicts(parity_of(first, second))


def test_the_same_work_twice_agrees_in_every_part(tmp_path):
    found = told(make(tmp_path, "a", jobs()), make(tmp_path, "b", jobs()))
    assert tuple(found) == PARTS
    assert found["settings"].startswith("like for like")
    assert found["peaks"] == "peaks agree within 0.0 %: on every device the bounds of both runs overlap"
    assert found["seconds"].startswith("seconds of work differ by up to 0.0 %")
    assert found["quality"] == "quality is the same to the last bit in 2 evaluated rounds"
    assert found["outcomes"] == "all 3 jobs ended alike"
    assert found["bytes"] == "bytes down and up are equal in 3 jobs"
    assert found["energy"] == "energies cannot be compared: no device has a meter in both runs"


def test_peaks_whose_bounds_overlap_agree_and_others_do_not(tmp_path):
    first = make(tmp_path, "a", jobs(peak_mib=600))
    near, far = make(tmp_path, "b", jobs(peak_mib=606)), make(tmp_path, "c", jobs(peak_mib=660))
    assert told(first, near)["peaks"].startswith("peaks agree within 1.0 %")
    assert told(first, far)["peaks"] == (
        "peaks do not agree: they differ by up to 10.0 %, and the bounds lie apart on orin-1"
    )
    (compared,) = parity_of(first, near).devices
    assert (compared.peak.first.low_bytes, compared.peak.first.high_bytes) == (595 * MIB, 612 * MIB)
    assert compared.peak.ratio == pytest.approx(606 / 600)


def test_an_emulation_and_a_board_are_matched_by_profile_and_their_seconds_do_not_compare(tmp_path):
    emulated = make(tmp_path, "a", jobs("pi"), clients=[planned(0, "pi", 800, 740, 12)], machine="Xeon")
    real = make(
        tmp_path,
        "b",
        jobs("kitchen-pi"),
        clients=[planned(0, "kitchen-pi", 800, 740, 12)],
        boards=[device("kitchen-pi", 800 * MIB, kind="raspberry_pi")],
    )
    parity = parity_of(emulated, real)
    (compared,) = parity.devices
    assert (compared.first, compared.second, compared.matched_by) == ("pi", "kitchen-pi", "profile")
    found = verdicts(parity)
    assert found["seconds"] == (
        "seconds do not compare: pi / kitchen-pi of the first run is emulated, and its seconds are those of Xeon"
    )
    assert found["peaks"].startswith("peaks agree")


def test_emulations_on_two_machines_do_not_compare_in_seconds(tmp_path):
    found = told(make(tmp_path, "a", jobs(), machine="Xeon"), make(tmp_path, "b", jobs(), machine="Ryzen"))
    assert found["seconds"] == "seconds do not compare: both are emulated, on Xeon and on Ryzen"
    assert found["settings"].startswith("like for like")  # the machine decides no result


def test_devices_that_cannot_be_told_apart_are_named(tmp_path):
    def two(*names):
        clients = [planned(index, name, 800, 740, 12) for index, name in enumerate(names)]
        return clients, [finished(0, index, name, 600) for index, name in enumerate(names)]

    first, second = two("a-1", "a-2"), two("b-1", "b-2")
    parity = parity_of(
        make(tmp_path, "a", first[1], clients=first[0]), make(tmp_path, "b", second[1], clients=second[0])
    )
    assert parity.devices == ()
    (why,) = parity.unmatched
    assert why.startswith("a-1, a-2 and b-1, b-2: which pi-4 stands for which cannot be told")
    assert verdicts(parity)["peaks"].startswith("peaks cannot be compared")


def test_settings_that_differ_are_told_and_make_it_not_like_for_like(tmp_path):
    first = make(tmp_path, "a", jobs())
    second = make(tmp_path, "b", jobs(), settings={"rank": 16}, seed=8)
    parity = parity_of(first, second)
    assert not parity.like_for_like
    assert {(each.name, each.first, each.second) for each in parity.differences} == {
        ("seed", 7, 8),
        ("setting rank", 8, 16),
    }
    assert verdicts(parity)["settings"] == "not like for like: the runs differ in seed, setting rank"


def test_two_methods_are_called_no_parity_in_the_first_line(tmp_path, capsys):
    make(tmp_path, "a", jobs())
    make(tmp_path, "b", jobs(), method="linear_probe")
    assert main(["compare", "a", "b", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("the methods differ (lora, linear_probe): this is no parity")


def test_bounds_are_as_measured_and_overlap_by_their_span(tmp_path):
    def unordered(result):
        peak = PeakMemory(603 * MIB, 600 * MIB, 599 * MIB, SOURCES, samples=40)
        phases = (PhaseMeasurement("train", 8.0, peak),)
        return replace(result, measurement=replace(result.measurement, phases=phases))

    first = make(tmp_path, "a", [unordered(each) for each in jobs()])
    second = make(tmp_path, "b", [unordered(each) for each in jobs()])
    (compared,) = parity_of(first, second).devices
    assert (compared.peak.first.low_bytes, compared.peak.first.high_bytes) == (603 * MIB, 599 * MIB)
    assert compared.peak.overlap


def test_an_outcome_and_bytes_that_differ_are_counted(tmp_path):
    first = make(tmp_path, "a", jobs())
    longer = replace(jobs()[1], measurement=replace(jobs()[1].measurement, bytes_up=300))
    second = make(tmp_path, "b", [jobs()[0], longer, out_of_memory(2, 0, "orin-1", 800)])
    found = told(first, second)
    assert found["outcomes"] == "1 of 3 jobs ended otherwise"
    assert found["bytes"] == "bytes differ in 1 of 2 jobs that ended alike, by up to 50 B"


def test_quality_is_compared_to_the_last_bit(tmp_path):
    found = told(make(tmp_path, "a", jobs()), make(tmp_path, "b", jobs(), accuracies=[0.4, None, 0.6 + 1e-16]))
    assert found["quality"] == "quality differs in 2 evaluated rounds: accuracy by up to 0.0000, loss by up to 0.0000"


def test_a_run_without_a_cap_has_no_upper_bound_and_says_so(tmp_path):
    def uncapped(result):
        phases = tuple(
            replace(phase, peak=replace(phase.peak, upper_bytes=None)) for phase in result.measurement.phases
        )
        return replace(result, measurement=replace(result.measurement, phases=phases))

    found = told(make(tmp_path, "a", jobs()), make(tmp_path, "b", [uncapped(each) for each in jobs()]))
    assert found["peaks"].endswith("whether they agree cannot be told on orin-1: a bound is lacking")


def test_an_unfinished_run_is_compared_as_far_as_it_got(tmp_path):
    first, second = make(tmp_path, "a", jobs()), make(tmp_path, "b", jobs(count=1), accuracies=[0.4])
    second.set_status(INTERRUPTED)
    parity = parity_of(first, second)
    assert parity.notes == ("b is interrupted after 1 of 3 rounds: only what both have is compared",)
    assert (parity.jobs, parity.only_first) == (1, 2)
    assert verdicts(parity)["outcomes"] == "all 1 jobs ended alike; 2 jobs are in one run only"


def test_two_runs_without_anything_in_common_are_no_error(tmp_path):
    found = told(make(tmp_path, "a", [], accuracies=[]), make(tmp_path, "b", [], accuracies=[]))
    assert all("cannot be compared" in found[part] for part in PARTS if part != "settings")


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_command_tells_figures_and_sentences(tmp_path, capsys):
    make(tmp_path, "a", jobs()), make(tmp_path, "b", jobs(peak_mib=606))
    assert main(["compare", "a", "b", "--runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "600 MiB (595 MiB to 612 MiB)" in printed
    assert "peaks agree within 1.0 %: on every device the bounds of both runs overlap" in printed


def test_json_and_csv_carry_the_same_figures(tmp_path, capsys):
    make(tmp_path, "a", jobs()), make(tmp_path, "b", jobs(peak_mib=606))
    main(["compare", "a", "b", "--json", "--runs", str(tmp_path)])
    told = json.loads(capsys.readouterr().out)
    main(["compare", "a", "b", "--csv", "--runs", str(tmp_path)])
    rows = {(row["subject"], row["figure"]): row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    peak = told["devices"][0]["peak"]
    row = rows["orin-1", "peak_estimate_bytes"]
    assert (float(row["first"]), float(row["second"])) == (
        peak["first"]["estimate_bytes"],
        peak["second"]["estimate_bytes"],
    )
    assert float(row["ratio"]) == peak["ratio"]
    assert told["verdicts"]["peaks"].startswith("peaks agree")
    assert rows["round 2", "accuracy"]["first"] == "0.6"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("a", "a"), 2, "both are run a: name two runs"),
        (("a",), 2, "Missing argument"),
        (("a", "nothing"), 1, "there is no run 'nothing'"),
        (("a", "b", "--csv", "--json"), 2, "choose one of them"),
    ],
)
def test_wrong_use_is_told(tmp_path, capsys, words, code, message):
    make(tmp_path, "a", jobs()), make(tmp_path, "b", jobs())
    assert main(["compare", *words, "--runs", str(tmp_path)]) == code
    assert message in capsys.readouterr().err
