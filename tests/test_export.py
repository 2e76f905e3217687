"""`testbed export`: tables, models and trackers, read back by the programs that they are for."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from testbed.cli import main
from testbed.exports.schema import SAMPLES, SUMMARIES, tables
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.model.whole import export_whole, whole_tensors
from testbed.prepare import content_store
from testbed.run_record import INTERRUPTED
from testbed.store import RunFolder
from testbed.trained import load
from tests.model import tiny
from tests.whole_runs import ROUNDS, base_model, make_run, work_of_devices

RUN = "lora-20260101-000000-abcd"
OTHER = "lora-20260101-000001-abcd"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of different seeds, the second of an experiment; made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_CACHE", str(folder / "cache"))
        results, model = work_of_devices(folder), base_model(folder / "model")
        make_run(folder / "runs", RUN, model, results)
        mark = {"cell": "c", "label": "lora", "name": "two seeds"}
        make_run(folder / "runs", OTHER, model, results, seed=1, experiment=mark)
    return folder


@pytest.fixture
def lab(made, tmp_path, monkeypatch):
    """A working directory with those runs."""
    monkeypatch.setenv("TESTBED_CACHE", str(made / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "runs", tmp_path / "runs")
    return tmp_path


def rows(path):
    return parquet.read_table(path).to_pylist()


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_table_has_its_rows_with_the_figures_of_the_run(lab, capsys):
    assert main(["export", RUN, OTHER, "-o", "out"]) == 0
    assert "2 runs in out (rows: runs 2, devices 2, rounds 4, jobs 8" in capsys.readouterr().out
    folder = RunFolder(lab / "runs" / RUN)
    runs = {row["run"]: row for row in rows("out/runs.parquet")}
    assert runs.keys() == {RUN, OTHER}
    assert (runs[OTHER]["experiment"], runs[OTHER]["label"], runs[OTHER]["seed"]) == ("two seeds", "lora", 1)
    assert (runs[RUN]["accuracy"], runs[RUN]["experiment"]) == (0.6, None)
    assert runs[RUN]["final_state"] == folder.status.final_state
    jobs = {(row["run"], row["job"]): row for row in rows("out/jobs.parquet")}
    for result in folder.results():
        row = jobs[RUN, result.job]
        assert row["peak_estimate_bytes"] == result.measurement.peak.estimate_bytes
        assert row["seconds"] == result.measurement.seconds
        assert row["loss"] == result.scalars["loss"]
    own = [row for row in rows("out/rounds.parquet") if row["run"] == RUN]
    assert [row["round"] for row in own] == list(range(ROUNDS))
    assert own[-1]["total_joules"] == runs[RUN]["energy_joules"] > 0


def test_samples_are_those_of_the_files_one_row_each(lab):
    assert main(["export", RUN, "-o", "out"]) == 0
    folder = RunFolder(lab / "runs" / RUN)
    memory = [row for row in rows("out/memory_samples.parquet") if row["job"] == "run-r0-c0"]
    (result,) = [each for each in folder.results() if each.job == "run-r0-c0"]
    stored = folder.memory_samples(result)
    assert [row["vmhwm_bytes"] for row in memory] == [sample.vmhwm_bytes for sample in stored]
    assert {row["phase"] for row in memory} >= {"train", "merge"}
    power = [row for row in rows("out/power_samples.parquet") if row["job"] == "run-r0-c0"]
    (trace,) = folder.with_power(result).measurement.power
    assert len(power) == len(trace.rows) * len(trace.rails)
    assert {(row["rail"], row["watts"], row["is_total"]) for row in power} == {("VIN", 5.0, True), ("PART", 2.0, False)}
    spans = {
        phase.name: (phase.begun_seconds, phase.begun_seconds + phase.seconds) for phase in result.measurement.phases
    }
    inside = [row for row in power if row["phase"] is not None]
    assert all(spans[row["phase"]][0] <= row["seconds"] < spans[row["phase"]][1] for row in inside)
    around = [row["seconds"] for row in power if row["phase"] is None]
    assert inside or around, "a job of milliseconds may lie between two samples: then both are outside"
    assert not any(
        begun <= seconds < end for seconds in around for name, (begun, end) in spans.items() if name != "idle"
    )
    assert all(row["counter_joules"] is None for row in power)


def test_types_are_kept_an_integer_with_nulls_stays_one(lab):
    assert main(["export", RUN, "-o", "out"]) == 0
    words = {"text": "string", "integer": "int64", "real": "double", "boolean": "bool"}
    for table in tables(samples=True):
        schema = parquet.read_schema(f"out/{table.name}.parquet")
        assert [(field.name, str(field.type)) for field in schema] == [
            (column.name, words[column.kind]) for column in table.columns
        ]
    phases = rows("out/phases.parquet")
    uncapped = [row["peak_upper_bytes"] for row in phases]
    assert None in uncapped
    assert 0 not in uncapped


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_csv_and_json_say_the_same_as_parquet(lab, kind):
    assert main(["export", RUN, "-o", "out"]) == 0
    assert main(["export", RUN, "-o", kind, "--format", kind]) == 0
    for table in tables(samples=True):
        wanted = rows(f"out/{table.name}.parquet")
        if kind == "json":
            assert json.loads(Path(kind, f"{table.name}.json").read_text()) == wanted
        else:
            with Path(kind, f"{table.name}.csv").open(newline="") as stream:
                read = list(csv.DictReader(stream))
            assert read == [{name: as_csv(value) for name, value in row.items()} for row in wanted]


def as_csv(value):
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_without_samples_there_are_none(lab):
    assert main(["export", RUN, "-o", "out", "--no-samples"]) == 0
    there = {path.stem for path in Path("out").glob("*.parquet")}
    assert there == {table.name for table in SUMMARIES}


def test_every_column_is_described_with_its_unit(lab):
    assert main(["export", RUN, "-o", "out"]) == 0
    schema = json.loads(Path("out/schema.json").read_text())
    readme = Path("out/README.md").read_text()
    told = {table["name"]: {column["name"]: column for column in table["columns"]} for table in schema["tables"]}
    assert told["jobs"]["peak_lower_bytes"]["unit"] == "bytes"
    assert told["power_samples"]["watts"]["unit"] == "watts"
    for table in (*SUMMARIES, *SAMPLES):
        for column in table.columns:
            assert column.meaning
            assert f"| {column.name} | {column.kind} |" in readme
    assert schema["runs"] == [RUN]


def test_an_unfinished_run_is_exported_with_its_state(lab, capsys):
    RunFolder(lab / "runs" / RUN).set_status(INTERRUPTED, "the user stopped it")
    assert main(["export", RUN, OTHER, "-o", "out", "--model"]) == 0
    told = capsys.readouterr().err
    assert f"{RUN} is interrupted: its rows say so" in told
    assert "only a finished run has a trained model" in told
    states = {row["run"]: (row["state"], row["error"]) for row in rows("out/runs.parquet")}
    assert states == {RUN: ("interrupted", "the user stopped it"), OTHER: ("finished", None)}
    assert [path.name for path in Path("out/models").iterdir()] == [OTHER]


# ── the folder ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_export_is_written_over_its_own_and_leaves_what_is_not_its(lab):
    assert main(["export", RUN, "-o", "out", "--model"]) == 0
    Path("out/notes.txt").write_text("mine")
    assert main(["export", OTHER, "-o", "out", "--format", "csv", "--no-samples"]) == 0
    there = {path.relative_to("out").as_posix() for path in Path("out").rglob("*")}
    assert there == {"notes.txt", "README.md", "schema.json", *(f"{table.name}.csv" for table in SUMMARIES)}


def test_what_a_kill_left_can_be_exported_over(lab, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("testbed.exports.folder.write_tables", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["export", RUN, "-o", "out"]) == 130
    assert main(["export", RUN, "-o", "out"]) == 0
    assert len(rows("out/runs.parquet")) == 1


def test_a_folder_of_somebody_else_is_refused_and_not_touched(lab, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years")
    assert main(["export", RUN, "-o", "mine"]) == 2
    assert "mine is not empty, and no export has written it" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((RUN,), 2, "say where to: -o DIR for files, or --to mlflow or --to wandb"),
        ((RUN, "-o", "runs/" + RUN + "/config.json"), 2, "is a file; name a folder"),
        (("lara", "-o", "out"), 1, "did you mean"),
        (("nothing.yaml", "-o", "out"), 2, "nothing.yaml"),
        ((RUN, "-o", "out", "--uri", "x"), 2, "--uri goes with --to mlflow"),
        ((RUN, "-o", "out", "--project", "x"), 2, "--project goes with --to"),
        ((RUN, "--to", "mlflow"), 2, "say where it is with --uri"),
        ((RUN, "-o", "out", "--format", "xls"), 2, "is not one of"),
        (("-o", "out"), 2, "Missing argument"),
    ],
)
def test_wrong_use_is_told(lab, capsys, monkeypatch, words, code, message):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["export", *words]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("pyarrow", ("-o", "out"), "choose --format csv or --format json"),
        ("mlflow", ("--to", "mlflow", "--uri", "x"), "pip install 'edge-testbed[mlflow]'"),
        ("wandb", ("--to", "wandb"), "pip install 'edge-testbed[wandb]'"),
    ],
)
def test_a_library_that_is_lacking_is_named_with_what_installs_it(lab, capsys, monkeypatch, module, words, message):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["export", RUN, *words]) == 2
    assert message in capsys.readouterr().err


def test_models_are_refused_where_no_run_has_one(lab, capsys):
    RunFolder(lab / "runs" / RUN).set_status(INTERRUPTED)
    assert main(["export", RUN, "-o", "out", "--model"]) == 2
    assert "only a finished run has a trained model" in capsys.readouterr().err
    assert not Path("out").exists()


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_an_exported_adapter_loads_with_peft_and_computes_what_the_run_evaluated(lab, made):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    assert main(["export", RUN, "-o", "out", "--model"]) == 0
    base = AutoModelForSequenceClassification.from_pretrained(made / "model", num_labels=tiny.LABELS)
    theirs = tiny.logits(PeftModel.from_pretrained(base, f"out/models/{RUN}"))
    torch.testing.assert_close(theirs, tiny.logits(load(RUN)), rtol=1e-5, atol=1e-5)


def test_an_exported_whole_model_loads_with_transformers(lab, made):
    from transformers import AutoModelForSequenceClassification

    base = tiny.BaseModel.open(made / "model", content_store(), SEQUENCE_CLASSIFICATION, tiny.LABELS)
    export = lab / "runs" / RUN / "export"
    shutil.rmtree(export)
    tensors = {name: value + 0.1 for name, value in whole_tensors(base, 0).items()}
    export_whole(export, base, tensors)
    assert main(["export", RUN, "-o", "out", "--model"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(f"out/models/{RUN}")
    found = dict(model.named_parameters())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())
    assert "A model that was trained" in Path(f"out/models/{RUN}/README.md").read_text()


def test_a_models_card_says_what_it_is_and_grants_nothing(lab):
    assert main(["export", RUN, "-o", "out", "--model"]) == 0
    card = Path(f"out/models/{RUN}/README.md").read_text()
    assert "A PEFT adapter that was trained by federated fine-tuning" in card
    assert "AutoModelForSequenceClassification" in card
    assert "num_labels=3" in card
    assert "| accuracy | 0.600 |" in card
    assert "| data | docstrings (SHA-256 d0c5) |" in card
    assert "| rank | 2 |" in card
    assert "Not known here" in card


def test_half_a_model_is_not_exported(lab, capsys):
    path = lab / "runs" / RUN / "export" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert main(["export", RUN, "-o", "out", "--model"]) == 1
    assert "the model is not complete" in capsys.readouterr().err
    assert not Path(f"out/models/{RUN}").exists()


# ── trackers ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.filterwarnings("ignore:.*filesystem tracking backend.*:FutureWarning")
def test_a_second_export_into_mlflow_replaces_the_first(lab, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    words = ["export", RUN, "--to", "mlflow", "--uri", str(lab / "store"), "--model", "--no-samples"]
    assert main(words) == 0
    assert main(words) == 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=str(lab / "store"), registry_uri=str(lab / "store"))
    experiment = client.get_experiment_by_name("edge-testbed")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.testbed_run = '{RUN}'")
    assert (run.data.tags["method"], run.data.tags["state"]) == ("lora", "finished")
    assert run.data.params["settings.rank"] == "2"
    assert run.data.params["rounds"] == str(ROUNDS)
    assert run.data.metrics["run_accuracy"] == 0.6
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.6)]
    assert {"total_joules", "total_bytes_up", "total_seconds"} <= run.data.metrics.keys()
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"runs.parquet", "models", "schema.json"} <= files


def test_an_export_into_wandb_offline_holds_the_run_once(lab, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(lab))
    monkeypatch.setenv("HOME", str(lab))
    words = ["export", OTHER, "--to", "wandb", "--project", "phones", "--no-samples"]
    assert main(words) == 0
    assert main(words) == 0
    (folder,) = (lab / "wandb").glob("offline-run-*")
    assert folder.name.endswith(f"-testbed-{OTHER}")
    (log,) = folder.glob("*.wandb")
    written = log.read_bytes()
    for word in (b"phones", b"two seeds", b"settings.rank", b"total_joules", b"run_accuracy", OTHER.encode()):
        assert word in written


def test_an_mlflow_that_cannot_be_had_is_told_in_one_line(lab, capsys):
    assert main(["export", RUN, "--to", "mlflow", "--uri", "foo://somewhere"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("testbed: MLflow at foo://somewhere: ")
    assert "Traceback" not in message
