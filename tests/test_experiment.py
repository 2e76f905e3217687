"""`testbed experiment`: which cells there are, how they are told apart, and what is run of them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

from testbed import session
from testbed.environment import describe_machine
from testbed.errors import ConfigError, UsageError
from testbed.experiments.cells import DONE, FAILED, LOCKS, NEW, RUNNING, UNFINISHED, run_cells, standings
from testbed.experiments.experiment import load_experiment
from testbed.experiments.file import RunOptions
from testbed.experiments.tables import outcome_to_json, print_outcome
from testbed.package_data import data_folder
from testbed.run import RunConfig
from testbed.run_record import FINISHED, INTERRUPTED
from testbed.store import RunFolder
from tests.run_records import add_rounds, record
from tests.tiny_lab import INVENTORY, make_lab

TWO = """\
name: two
seeds: [0, 1]
methods:
  lora: {}
  fedpruner at random: {method: fedpruner, set: {selection: random}, run: {rounds: 10}}
run: {rounds: 20, learning_rate: 2e-3}
"""


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment's file and reads it."""

    def write(text: str, name: str = "two.yaml"):
        (tmp_path / name).write_text(text)
        return load_experiment(tmp_path / name)

    return write


def identities(experiment):
    return [cell.identity for cell in experiment.cells]


def finished_run(runs_dir, cell, run="lora-20260314-150926-5f3a", accuracy=0.5, state=FINISHED):
    """A run folder that is this cell's, as one pass would have left it."""
    base = record(cell.config.method, seed=cell.seed)
    mark = {"cell": cell.identity, "label": cell.label, "name": "two"}
    folder = RunFolder.create(runs_dir, run, replace(base, config={**base.config, "experiment": mark}))
    add_rounds(folder, [accuracy])
    folder.set_status(state)
    return folder


def silent():
    return Console(file=io.StringIO(), width=200, color_system=None)


# ── the matrix ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_method_comes_with_one_seed_before_any_with_the_next(experiment):
    cells = experiment(TWO).cells
    assert [cell.title for cell in cells] == [
        "lora, seed 0",
        "fedpruner at random, seed 0",
        "lora, seed 1",
        "fedpruner at random, seed 1",
    ]
    lora, pruner, *_ = cells
    assert (lora.config.rounds, pruner.config.rounds) == (20, 10)
    assert pruner.config.method == "fedpruner"
    assert pruner.config.settings["selection"] == "random"
    assert pruner.config.settings["granularity"] == "block"
    assert lora.config.learning_rate == 0.002
    assert len(set(identities(experiment(TWO)))) == 4


def test_what_there_are_several_of_is_part_of_the_title(experiment, tmp_path):
    (tmp_path / "lab.yaml").write_text(INVENTORY)
    more = 'inventories: [default, lab.yaml]\ndata: [docstrings, {name: "hf:a/b", text: body}]\n'
    cells = experiment(TWO + more).cells
    assert len(cells) == 16
    assert cells[-1].title == "fedpruner at random, lab.yaml, hf:a/b, seed 1"
    assert [device.name for device in cells[-1].inventory] == ["large", "small"]
    assert cells[-1].config.data["columns"] == {"text": "body"}


def test_a_run_of_the_command_line_with_the_same_words_has_the_same_configuration(experiment):
    text = "name: a\nmethods: {lora: {set: {rank: 4, targets: [q_proj, v_proj]}}}\n"
    run = "run: {rounds: 3, partition: 'dirichlet:0.5', no_cap: true, task: causal_lm}\n"
    (cell,) = experiment(text + run + "data: [{name: docstrings, limit: 9}]").cells
    assert cell.config == RunConfig(
        method="lora",
        settings={**cell.config.settings, "rank": 4, "targets": ("q_proj", "v_proj")},
        task="causal_lm",
        rounds=3,
        partition={"kind": "dirichlet", "alpha": 0.5},
        capped=False,
        data={"name": "docstrings", "columns": {}, "held_out_limit": 400, "limit": 9},
    )


def test_every_setting_of_a_run_can_stand_in_the_file():
    elsewhere = {"method", "settings", "model", "data", "seed"}
    known = {field.name for field in fields(RunConfig)} - elsewhere
    assert set(RunOptions.model_fields) == known - {"capped"} | {"no_cap"}


def test_only_selects_by_label(experiment):
    two = experiment(TWO)
    assert [cell.title for cell in two.only(["lora"]).cells] == ["lora, seed 0", "lora, seed 1"]
    with pytest.raises(UsageError, match='there is no label "lroa"; did you mean "lora"'):
        two.only(["lroa"])


def test_every_experiment_that_comes_along_can_be_read_by_its_name():
    first_lines = {file: file.read_text().partition("\n")[0] for file in data_folder("experiments").glob("*.yaml")}
    experiments = [file for file, line in first_lines.items() if line.endswith("$schema=schema.json")]
    assert "quickstart" in [file.stem for file in experiments]
    for file in experiments:
        assert load_experiment(Path(file.stem)) == load_experiment(file)


def test_a_name_that_is_wrong_is_answered_with_those_that_come_along_and_inventories_are_none():
    with pytest.raises(
        UsageError, match=r'quikstart: there is no such experiment file; did you mean "quickstart"'
    ) as told:
        load_experiment(Path("quikstart"))
    assert "to_target" in str(told.value)
    assert "ample" not in str(told.value)


# ── the order in which cells are run ────────────────────────────────────────────────────────────────────────────────
FOUR = """\
name: four
seeds: [3, 1]
methods: {lora: {}, bitfit: {}, linear_probe: {}, fedprox: {}}
run: {rounds: 20}
"""


def test_cells_are_run_seed_by_seed_in_an_order_that_is_drawn(experiment):
    four = experiment(FOUR)
    assert [cell.seed for cell in four.drawn] == [3] * 4 + [1] * 4
    blocks = [[cell.label for cell in four.drawn if cell.seed == seed] for seed in (3, 1)]
    assert all(sorted(block) == sorted(["lora", "bitfit", "linear_probe", "fedprox"]) for block in blocks)
    orders = {tuple(cell.label for cell in experiment(FOUR + f"order_seed: {n}\n").drawn) for n in range(8)}
    assert len(orders) > 4, "each order_seed draws its own"
    assert sorted(identities(experiment(FOUR + "order_seed: 5\n"))) == sorted(identities(four))


def test_one_more_method_moves_none_of_the_others_and_neither_does_only(experiment):
    four = [cell.label for cell in experiment(FOUR).drawn]
    five = [cell.label for cell in experiment(FOUR.replace("lora: {}", "ffa_lora: {}, lora: {}")).drawn]
    assert [label for label in five if label != "ffa_lora"] == four
    some = [cell.label for cell in experiment(FOUR).only(["lora", "fedprox"]).drawn]
    assert some == [label for label in four if label in {"lora", "fedprox"}]


def test_the_reference_is_the_first_method_or_the_one_that_the_file_names(experiment):
    assert experiment(FOUR).reference == "lora"
    assert experiment(FOUR + "reference: fedprox\n").reference == "fedprox"
    assert experiment(FOUR + "reference: fedprox\n").only(["bitfit"]).reference == "bitfit"


# ── options that vary ───────────────────────────────────────────────────────────────────────────────────────────────
def test_every_option_that_varies_is_an_axis_of_its_own(experiment):
    vary = "vary: {partition: [iid, 'dirichlet:0.3'], batch_size: [8, 16], learning_rate: [1e-3]}\n"
    cells = experiment(TWO.replace("rounds: 20, learning_rate: 2e-3", "rounds: 20") + vary).cells
    assert len(cells) == 2 * 2 * 2 * 2
    first, *_, last = cells
    assert first.title == "lora, batch_size 8, partition iid, seed 0"
    assert last.title == "fedpruner at random, batch_size 16, partition dirichlet:0.3, seed 1"
    assert last.config.partition == {"kind": "dirichlet", "alpha": 0.3}
    assert (last.config.batch_size, last.config.learning_rate, last.config.rounds) == (16, 0.001, 10)


def test_a_value_that_varies_is_the_same_cell_as_where_it_is_stated(experiment):
    varied = experiment(TWO + "vary: {batch_size: [8, 16]}\n")
    stated = experiment(TWO.replace("rounds: 20", "rounds: 20, batch_size: 8"))
    assert identities(stated) == identities(varied)[:4]


# ── what tells cells apart ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_label_the_name_and_an_order_tell_no_cells_apart(experiment):
    other = (
        "name: other\nmethods:\n  at random: {run: {rounds: 10}, set: {selection: random}, method: fedpruner}\n"
        "  plain: {method: lora}\nseeds: [1, 0]\nrun: {learning_rate: 0.002, rounds: 20}\n"
    )
    assert sorted(identities(experiment(other, "other.yaml"))) == sorted(identities(experiment(TWO)))


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("lora: {}", "lora: {set: {rank: 4}}", 2),
        ("rounds: 10", "rounds: 11", 2),
        ("rounds: 20", "rounds: 21", 2),
        ("2e-3", "3e-3", 4),
        ("[0, 1]", "[0, 2]", 2),
        ("seeds", "models: [./base]\nseeds", 4),
        ("seeds", "inventories: [lab.yaml]\nseeds", 4),
        ("lora: {}", "lora: {set: {rank: 16}}", 0),  # the default
    ],
)
def test_a_change_changes_the_cells_that_it_is_about(experiment, tmp_path, old, new, changed):
    (tmp_path / "lab.yaml").write_text(INVENTORY)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    before, after = identities(experiment(TWO)), identities(experiment(TWO.replace(old, new)))
    assert sum(cell not in before for cell in after) == changed


def test_content_counts_and_not_where_it_stands(experiment, tmp_path):
    data = TWO + "data: [{name: %s, held_out: held.csv}]\nmodels: [./%s]\ninventories: [%s]\n"
    for folder, weights, rows in (("a", "w", "{}"), ("b", "w", "{}"), ("c", "v", "{}"), ("d", "w", '{"x": 1}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text(weights)
        (tmp_path / folder / "data.jsonl").write_text(rows)
        (tmp_path / folder / "lab.yaml").write_text(INVENTORY)
    (tmp_path / "held.csv").write_text("text,label\n")
    a, b, c, d = (
        identities(experiment(data % (f"{folder}/data.jsonl", folder, f"{folder}/lab.yaml"), f"{folder}.yaml"))
        for folder in "abcd"
    )
    assert a == b
    assert not set(a) & set(c)
    assert not set(a) & set(d)


def test_identities_are_those_of_another_process(experiment, tmp_path):
    (tmp_path / "lab.yaml").write_text(INVENTORY.replace("[big]", "[big, one, two, three, four]"))
    here = identities(experiment(TWO + "inventories: [lab.yaml]\n"))
    code = "import pathlib, sys; from testbed.experiments.experiment import load_experiment\n"
    code += "c = load_experiment(pathlib.Path(sys.argv[1]))\n"
    code += "print(*(cell.identity for cell in (*c.cells, *c.drawn)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-c", code, str(tmp_path / "two.yaml")]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    drawn = [cell.identity for cell in load_experiment(tmp_path / "two.yaml").drawn]
    assert done.stdout.split() == here + drawn


# ── wrong files ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("methods:", "mehtods:", 'mehtods: unknown key; did you mean "methods"'),
        ("name: two\n", "", "name: expected a name, got nothing"),
        ("method: fedpruner", "mehtod: fedpruner", 'methods.fedpruner at random.mehtod: unknown key; did you mean "me'),
        ("method: fedpruner", "method: fedpurner", 'there is no method "fedpurner"; did you mean "fedpruner"'),
        ("lora: {}", "lora:", "methods.lora: expected a mapping"),
        ("lora: {}", "lora: {set: {rnak: 4}}", 'methods.lora.set: method lora has no setting "rnak"; did you mean'),
        ("lora: {}", "lora: {set: {rank: four}}", 'lora.set: method lora: rank: expected a whole number, got "four"'),
        ("rounds: 10", "ronuds: 10", 'methods.fedpruner at random.run.ronuds: unknown key; did you mean "rounds"'),
        ("rounds: 10", "rounds: 0", "methods.fedpruner at random.run: rounds=0: expected at least 1"),
        ("rounds: 20", "rounds: 0", "two.yaml: run: rounds=0: expected at least 1"),
        ("rounds: 20", "rounds: ten", 'run.rounds: expected a whole number, got "ten"'),
        ("2e-3", "much", 'run.learning_rate: expected a number, got "much"'),
        ("rounds: 20", "schedule: cosnie", 'run.schedule: expected one of cosine, constant, got "cosnie"'),
        ("rounds: 20", "partition: idd", 'run: --partition idd: did you mean "iid"'),
        ("[0, 1]", "[0, 0]", "seeds: expected a list of different whole numbers from 0, got [0, 0]"),
        ("seeds", "reference: lroa\nseeds", 'reference: there is no label "lroa"; did you mean "lora"'),
        ("seeds", "order_seed: -1\nseeds", "order_seed: expected a whole number from 0, got -1"),
        ("seeds", "vary: {batch_size: 8}\nseeds", "vary.batch_size: expected a list of different values, each a whole"),
        ("seeds", "vary: {batch_size: [8, 8]}\nseeds", "vary.batch_size: expected a list of different values"),
        ("seeds", "vary: {batch_size: [8, 0]}\nseeds", "vary: batch-size=0: expected at least 1"),
        ("seeds", "vary: {bach_size: [8]}\nseeds", 'vary.bach_size: unknown key; did you mean "batch_size"'),
        ("seeds", "vary: {rounds: [8]}\nseeds", "run.rounds: vary says it too; leave one of them out"),
        ("rounds: 20", "until: {acuracy: 0.5}", 'two.yaml: run: until acuracy: did you mean "accuracy"'),
        ("rounds: 20", "until: 5", "run.until: expected a mapping such as {accuracy: 0.6"),
        (
            "rounds: 20",
            "disturbances: {dropuot: 1}",
            "run: disturbances.dropuot: there is no such disturbance; did you",
        ),
        ("seeds", "data: [{name: x, txet: y}]\nseeds", 'data[0].txet: unknown key; did you mean "text"'),
        ("seeds", "data: [nowhere.csv]\nseeds", 'data[0].name: expected a file or folder, got "nowhere.csv": there'),
        ("seeds", "data: [{name: x, held_out: [1]}]\nseeds", "data[0].held_out: expected a share between 0 and 1, a"),
        ("seeds", "models: [./nowhere]\nseeds", 'models[0]: expected a model\'s folder, got "./nowhere": there is no'),
        ("seeds", "inventories: [nowhere.yaml]\nseeds", 'inventories[0]: expected an inventory, got "nowhere.yaml"'),
    ],
)
def test_a_wrong_file_is_told_by_file_key_and_what_was_expected(experiment, old, new, message):
    assert old in TWO
    with pytest.raises(ConfigError) as error:
        experiment(TWO.replace(old, new))
    assert "two.yaml: " in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


# ── where cells stand ───────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_is_found_by_its_cell_and_the_farthest_counts(experiment, tmp_path):
    lora, pruner, second, other = experiment(TWO).cells
    finished_run(tmp_path / "runs", lora, "lora-20260101-000000-0000")
    finished_run(tmp_path / "runs", lora, "lora-20260201-000000-0000", state=INTERRUPTED)
    finished_run(tmp_path / "runs", pruner, "fedpruner-20260101-000000-0000", state=INTERRUPTED)
    RunFolder.create(tmp_path / "runs", "lora-20260301-000000-0000", record())  # of no experiment
    (tmp_path / "runs" / "lora-20260301-000000-0000" / "config.json").write_text("damaged")
    running = finished_run(tmp_path / "runs", other, "fedpruner-20260201-000000-0000")
    running.set_status("running")
    found = standings([lora, pruner, second, other], tmp_path / "runs")
    assert [standing.state for standing in found] == [DONE, UNFINISHED, NEW, RUNNING]
    assert [standing.run.run_id for standing in found if standing.run] == [
        "lora-20260101-000000-0000",
        "fedpruner-20260101-000000-0000",
        "fedpruner-20260201-000000-0000",
    ]


# ── what is run ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def begun(monkeypatch):
    """The runs that were begun or gone on with; in place of running, a run is marked finished."""
    found = []

    def begin(prepared, folder, console):
        found.append(folder.run_id)
        folder.set_status(FINISHED)

    monkeypatch.setattr(session, "run", begin)
    monkeypatch.setattr(session, "restored", lambda folder: None)
    return found


def test_done_cells_are_skipped_and_unfinished_ones_gone_on_with(experiment, tmp_path, begun):
    two = experiment(TWO).only(["lora"])
    finished_run(tmp_path, two.cells[0], "lora-20260101-000000-0000")
    finished_run(tmp_path, two.cells[1], "lora-20260201-000000-0000", state=INTERRUPTED)
    ended = run_cells(two, tmp_path, silent())
    assert [standing.state for standing in ended] == [DONE, DONE]
    assert begun == ["lora-20260201-000000-0000"]
    run_cells(two, tmp_path, silent())
    assert len(begun) == 1


def failed_run(runs_dir, cell, run="lora-20260101-000000-0000"):
    folder = finished_run(runs_dir, cell, run)
    folder.set_status("failed", "no client finished in 2 rounds in a row")
    return folder


def test_a_cell_whose_run_failed_is_left_alone_with_its_reason_until_it_is_asked_for(experiment, tmp_path, begun):
    two = experiment(TWO).only(["lora"])
    failed_run(tmp_path, two.cells[0])
    finished_run(tmp_path, two.cells[1], "lora-20260201-000000-0000")
    (left, _) = run_cells(two, tmp_path, console := silent())
    assert (left.state, left.error, begun) == (FAILED, "no client finished in 2 rounds in a row", [])
    assert "failed: no client finished in 2 rounds in a row" in console.file.getvalue()
    print_outcome(two, [left], console := silent())
    assert "--retry-failed goes on with its run lora-20260101-000000-0000" in console.file.getvalue()
    (retried, _) = run_cells(two, tmp_path, silent(), retry_failed=True)
    assert (retried.state, begun) == (DONE, ["lora-20260101-000000-0000"])


def test_a_failed_run_that_cannot_be_gone_on_with_is_begun_anew(experiment, tmp_path, begun, monkeypatch):
    lab = make_lab(tmp_path)
    (lab / "tiny.yaml").write_text(LAB)
    tiny = load_experiment(lab / "tiny.yaml")

    def gone(folder):
        raise ConfigError("its model is gone")

    failed_run(tmp_path / "runs", tiny.cells[0])
    monkeypatch.setattr(session, "restored", gone)
    (standing,) = run_cells(tiny, tmp_path / "runs", console := silent(), retry_failed=True)
    assert standing.state == DONE
    assert begun == [standing.run.run_id] != ["lora-20260101-000000-0000"]
    assert "cannot be gone on with, and the cell is begun anew: its model is gone" in console.file.getvalue()


def test_what_is_left_is_told_and_gets_better_as_cells_end(experiment, tmp_path, begun):
    four = experiment(TWO.replace("[0, 1]", "[0, 1, 2]")).only(["lora"])
    for number, cell in enumerate(four.cells):
        state = FINISHED if number == 0 else INTERRUPTED
        run = finished_run(tmp_path, cell, f"lora-20260101-00000{number}-0000", state=state)
        versions = {"machine": describe_machine(), "packages": {}}
        (run.path / "versions.json").write_text(json.dumps(versions))
        run.note(running_seconds=600.0)
    run_cells(four, tmp_path, console := silent())
    rules = [line for line in console.file.getvalue().splitlines() if line.startswith("cell ")]
    assert "cell 1 of 3: lora, seed 0, about 19 min left" in rules[0]  # 1 of 20 rounds of both is done
    assert "cell 3 of 3: lora, seed 2, about 10 min left" in rules[2]


def test_a_cell_that_another_process_is_at_is_left_alone(experiment, tmp_path, begun):
    two = experiment(TWO).only(["lora"])
    for number, cell in enumerate(two.cells):
        finished_run(tmp_path, cell, f"lora-20260101-00000{number}-0000", state=INTERRUPTED)
    (tmp_path / LOCKS).mkdir()
    with (tmp_path / LOCKS / two.cells[0].identity).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = run_cells(two, tmp_path, console := silent())
    assert [standing.state for standing in ended] == [RUNNING, DONE]
    assert begun == ["lora-20260101-000001-0000"]
    assert "another process is running it" in console.file.getvalue()


def test_the_outcome_has_every_method_over_its_seeds(experiment, tmp_path):
    two = experiment(TWO)
    lora, pruner, second, other = two.cells
    finished_run(tmp_path, lora, "lora-20260101-000000-0000", accuracy=0.5)
    finished_run(tmp_path, second, "lora-20260201-000000-0000", accuracy=0.6)
    finished_run(tmp_path, pruner, "fedpruner-20260201-000000-0000", accuracy=0.4)
    ended = standings(two.cells, tmp_path)
    ended[-1] = replace(ended[-1], state=FAILED, error="no client can take part")
    print_outcome(two, ended, console := silent())
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "lora 2 0, 1 0.550 0.550 1.000 0.125 0.810 – 0.0013" in lines
    assert "fedpruner at random 1 0 0.400 0.400 1.000 0.125 0.810 – 0.0013" in lines
    assert "fedpruner at random 1 -0.100 -0.100 not enough runs to say –" in lines
    assert "lora 2 1 10.0 s – 0 B – – – 1 2" in lines
    assert lines.count("Not all runs are done: fedpruner at random 1 of 2.") == 1
    assert f"failed: {other.title}: no client can take part; the same command tries it again" in lines
    content = json.loads(outcome_to_json(two, ended))
    quality = content["tables"]["quality"]
    assert [row["accuracy"]["deviation"] for row in quality] == [pytest.approx(0.0707, abs=1e-4), None]
    assert [*content["tables"]] == ["quality", "comparison", "costs"]
    assert [cell["state"] for cell in content["cells"]] == [DONE, DONE, DONE, FAILED]
    assert len(content["runs"]) == 3


def test_seeds_are_no_unfairness_but_what_differs_between_methods_is(experiment, tmp_path):
    two = experiment(TWO)
    for number, cell in enumerate(two.cells):
        run = f"{cell.config.method}-20260101-00000{number}-0000"
        folder = finished_run(tmp_path, cell, run)
        config = {**folder.config, "rounds": cell.config.rounds, "data_hash": f"{cell.seed}"}
        (folder.path / "config.json").write_text(json.dumps(config))
    content = json.loads(outcome_to_json(two, standings(two.cells, tmp_path)))
    assert content["fairness"] == ["rounds: lora 20, fedpruner at random 10"]


# ── as a user meets it ──────────────────────────────────────────────────────────────────────────────────────────────
LAB = """\
name: tiny
inventories: [lab.yaml]
models: [./model]
data: [{name: data.jsonl, text: body, label: kind}]
methods: {lora: {}}
run: {length: 16, rounds: 2, steps: 2, evaluate_every: 1, learning_rate: 0.02}
"""
ONE_DEVICE = """\
defaults: {kind: emulated, profile: raspberry_pi_5_4gb}
devices: {only: {budget: {memory: "640 MiB"}}}
"""


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.timeout(600)  # two whole passes
def test_an_interrupted_experiment_is_gone_on_with_and_a_cell_that_fails_stops_no_other(tmp_path):
    lab = make_lab(tmp_path)
    (lab / "lab.yaml").write_text(ONE_DEVICE)
    (lab / "poor.yaml").write_text(ONE_DEVICE.replace("640 MiB", "80 MiB"))
    (lab / "tiny.yaml").write_text(LAB)
    words = [sys.executable, "-m", "testbed", "experiment", "tiny.yaml"]
    how = {
        "env": {**os.environ, "TESTBED_CACHE": str(lab / "cache"), "COLUMNS": "200"},
        "cwd": lab,
        "text": True,
        "stderr": subprocess.PIPE,
        "stdout": subprocess.PIPE,
    }

    with subprocess.Popen(words, **how) as process:  # Ctrl-C in the first cell
        while not list(lab.glob("runs/lora-*/rounds.jsonl")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate()
    assert process.returncode == 130, complaints
    assert "cell 1 of 1: lora, seed 0" in said
    assert "go on with: testbed experiment tiny.yaml --runs runs" in said
    assert "Traceback" not in complaints
    (first,) = lab.glob("runs/lora-*")
    assert json.loads((first / "status.json").read_text())["state"] == INTERRUPTED

    more = LAB.replace("lora: {}", "lora: {}, low: {method: lora, set: {rank: 2}}")
    (lab / "tiny.yaml").write_text(more.replace("[lab.yaml]", "[poor.yaml, lab.yaml]"))
    done = subprocess.run([*words, "--json"], check=False, **how)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    cells = json.loads(done.stdout)["cells"]
    (second,) = set(lab.glob("runs/lora-*")) - {first}
    assert [(cell["state"], cell["run"]) for cell in cells] == [
        (FAILED, None),
        (FAILED, None),
        (DONE, first.name),
        (DONE, second.name),
    ]
    assert "no device can take part in this run" in cells[0]["error"]
    assert json.loads((first / "status.json").read_text())["state"] == FINISHED
    assert json.loads((second / "config.json").read_text())["settings"]["rank"] == 2
