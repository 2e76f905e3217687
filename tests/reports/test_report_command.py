"""`testbed report` with -o and --paper, and of an experiment: what is written, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed.cli import main
from testbed.experiments.experiment import load_experiment
from testbed.store import FINISHED, RunFolder
from tests.run_records import add_rounds, finished, record

FILE = "{name: two methods, seeds: [0, 1], methods: {lora: {}, fedprox: {}}, run: {rounds: 3}}"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with an experiment whose first two cells are done."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(FILE)
    for cell in load_experiment(Path("mine.yaml")).cells[:2]:
        mark = {"cell": cell.identity, "label": cell.label, "name": "two methods"}
        made(f"{cell.label}-20260314-15092{cell.seed}-5f3a", cell.label, seed=cell.seed, experiment=mark)
    return tmp_path


def made(name, method, **config):
    run = RunFolder.create(Path("runs"), name, record(method, **config))
    run.record_result(finished(0, 0, "orin-1", 720))
    add_rounds(run, [0.4, 0.6])
    run.set_status(FINISHED)


def refused(capsys, *words, code=2):
    assert main(["report", *words]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return " ".join(said.err.split())


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_page_and_a_papers_files_of_runs(lab, capsys):
    assert main(["report", "lora", "fedprox", "-o", "out/it.html", "--paper", "paper", "--target", "0.5"]) == 0
    page, paper = capsys.readouterr().out.splitlines()
    assert page.startswith("out/it.html: ")
    assert page.endswith("tables")
    assert paper == f"paper: {sum(path.is_file() for path in Path('paper').rglob('*'))} files, listed in paper/index.md"
    text = Path("out/it.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "lora-20260314-150920-5f3a" in text


def test_a_page_of_an_experiment_says_what_is_not_done(lab, capsys):
    assert main(["report", "mine.yaml", "-o", "it.html", "--reference", "fedprox"]) == 0
    assert "2 of 4 runs of the experiment are not done: the report says which" in capsys.readouterr().err
    text = Path("it.html").read_text()
    assert "<h1>two methods</h1>" in text
    assert "fedprox, seed 1" in text
    assert "Against fedprox" in text


def test_an_experiment_is_printed_as_its_own_command_does(lab, capsys):
    assert main(["report", "mine.yaml"]) == 0
    assert "lora, seed 0" in capsys.readouterr().out
    assert main(["report", "mine.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [cell["state"] for cell in told["cells"]].count("done") == 2
    assert main(["report", "mine.yaml", "--csv"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()].count("run") == 2


def test_what_an_experiment_is_compared_with_and_to_which_target_can_be_said(lab, capsys):
    assert main(["report", "mine.yaml", "--reference", "fedprox", "--target", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reference"] == "fedprox"
    assert [(each["target"], each["reached"], each["runs"]) for each in told["tables"]["to-target"]] == [
        (0.5, 1, 1)
    ] * 2
    assert main(["report", "mine.yaml", "--reference", "fedprox", "--target", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "Against fedprox ──" in said
    assert "Cost to target ──" in said


def test_a_page_that_is_there_is_replaced(lab, capsys):
    Path("it.html").write_text("old")
    assert main(["report", "-o", "it.html"]) == 0
    assert "<!DOCTYPE" in Path("it.html").read_text()
    assert not list(lab.glob(".*partial"))


# ── what is refused, before anything is read ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "runs"), "-o runs: is a folder; name the file: -o runs/report.html"),
        (("-o", "it.pdf"), "-o it.pdf: the page is HTML; name it so: -o it.html"),
        (("-o", "it"), "-o it: the page is HTML; name it so: -o it.html"),
        (("-o", "mine.yaml/it.html"), "mine.yaml is a file, not a folder; name another place"),
        (("--paper", "mine.yaml"), "--paper mine.yaml: expected a folder, there is a file; name another place"),
        (("--paper", "."), "--paper .: is not empty, and no `--paper` has written it; name another folder"),
        (("-o", "it.html", "--csv"), "-o and --paper write files, --csv and --json print: choose one kind"),
        (("--csv", "--json"), "--csv and --json: choose one of them"),
        (("--reference", "lora"), "--reference tells what others are compared with: name an experiment, or add -o"),
        (("mine.yaml", "--csv", "--reference", "lora"), "--reference tells what others are compared with"),
        (("other.yaml",), "other.yaml: there is no such experiment file; "),
        (("lora", "mine.yaml"), "mine.yaml is an experiment, which stands for all of its runs: name it alone"),
    ],
)
def test_what_cannot_be_done_is_told(lab, capsys, words, message):
    assert message in refused(capsys, *words)


def test_an_experiment_of_which_nothing_is_done(lab, capsys):
    said = refused(capsys, "mine.yaml", "--runs", "others", "-o", "it.html", code=1)
    assert "others: none of the 4 runs of two methods is done; `testbed experiment mine.yaml` makes them" in said
    assert not Path("it.html").exists()


def test_no_run_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "there is no finished run in runs" in refused(capsys, "-o", "it.html", code=1)


def test_an_unknown_reference_is_told(lab, capsys):
    for words in (("-o", "it.html"), (), ("--json",)):
        assert "fedprux" in refused(capsys, "mine.yaml", *words, "--reference", "fedprux")
