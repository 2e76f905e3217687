"""The results.  A run is a folder that stands alone; an index over all runs can be rebuilt from the folders.

runs/
  index.sqlite                        for queries (testbed.run_index)
  lora-20260314-150926-5f3a/
    plan.json  config.json  inventory.json  versions.json
    status.json                       running, finished, interrupted or failed; error; state hashes
    rounds.jsonl                      one line per round
    reference.json                    quality of majority class, bag of words, no fine-tuning
    results/<job>.json                one file per job
    updates/                          spooled for the round under way
    checkpoint/round-00003/           state.safetensors and state.json; the newest two stay
    samples/                          <job>.csv: memory (testbed.memory_samples);
                                      <job>.<meter>.power.csv: power (testbed.power_samples)
    energy.json                       energy of every job, derived when the run ended (testbed.job_energy)
    export/                           the trained model
    manifest.json                     SHA-256 of all that does not change any more (testbed.manifest)
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import checkpoints, memory_samples, power_samples
from testbed.durable import disk_errors_in_words, plain, read_json, read_text, sync_path, write_json
from testbed.errors import StoreError
from testbed.job import REST, Result
from testbed.process_identity import ProcessIdentity
from testbed.run_index import JobRow, RunIndex, RunRow, describe
from testbed.run_record import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    STATES,
    RoundRecord,
    RunRecord,
    Status,
)

if TYPE_CHECKING:
    from testbed.measurement import PowerTrace
    from testbed.memory_samples import MemorySample
    from testbed.method import State
    from testbed.task import Quality

__all__ = [
    "FAILED",
    "FINISHED",
    "INTERRUPTED",
    "RUNNING",
    "RoundRecord",
    "RunFolder",
    "RunRecord",
    "Status",
    "list_runs",
    "new_run_id",
    "reindex",
    "run_folders",
]


logger = logging.getLogger(__name__)

#: Of a memory sample on a device without an accelerator.
_PLAIN_COLUMNS = 5
#: Of a run's files, by which a folder is told for one that lacks others.
_ENOUGH_PARTS = 2


def new_run_id(method: str) -> str:
    """method-YYYYMMDD-HHMMSS-xxxx (UTC): sorts by time within a method, and never twice the same."""
    return f"{method}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunFolder:
    """One run on disk.  Every write is atomic; a kill at any moment leaves a folder that can be read and resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced: set[Path] = set()
        self._unreadable: set[Path] = set()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def run_id(self) -> str:
        return self.path.name

    # ── create and open ────────────────────────────────────────────────────────────────────────────────────────────
    @classmethod
    def create(cls, runs_dir: Path, run_id: str, record: RunRecord) -> RunFolder:
        """Make the folder with its record, in state `running`; raises StoreError when it exists or cannot be made."""
        path = runs_dir / run_id
        if path.exists():
            raise StoreError(f"{path}: there is a run of this name already; continue it with `--resume {run_id}`")
        with disk_errors_in_words(path):
            for name in ("results", "checkpoint", "samples", "export"):
                (path / name).mkdir(parents=True)
        folder = cls(path)
        for name, content in vars(record).items():
            write_json(path / f"{name}.json", content, sync=True)
        folder.set_status(RUNNING)
        with disk_errors_in_words(path):
            sync_path(path)
            sync_path(runs_dir)
        return folder

    @classmethod
    def open(cls, runs_dir: Path, run: str) -> RunFolder:
        """The run of this id, of this unique beginning of an id, or at this path.

        Raises StoreError naming the ids that come near.
        """
        known = [path.name for path in run_folders(runs_dir)]
        matches = [run] if run in known else [name for name in known if run and name.startswith(run)]
        if len(matches) == 1:
            return cls(runs_dir / matches[0])
        if matches:
            raise StoreError(f"{runs_dir}: {len(matches)} runs begin with {run!r}: {_listed(matches)}; say more of it")
        if os.sep in run and _is_run(Path(run)):
            return cls(Path(run))
        for path in (Path(run),) if os.sep in run else (runs_dir / run,):
            if run and (missing := _missing_of_a_run(path)):
                raise StoreError(
                    f"{path}: this folder is a run without {missing}; restore the file, or remove the folder"
                )
        raise StoreError(_not_found(runs_dir, run, known))

    # ── what was settled before ────────────────────────────────────────────────────────────────────────────────────
    @property
    def record(self) -> RunRecord:
        """Plan, configuration, inventory and versions."""
        return RunRecord(**{name: self._object(name) for name in ("plan", "config", "inventory", "versions")})

    @property
    def plan(self) -> dict[str, Any]:
        return self._object("plan")

    @property
    def config(self) -> dict[str, Any]:
        return self._object("config")

    @property
    def reference(self) -> dict[str, float | None]:
        """Qualities to stand beside the run's own: "majority", "bag_of_words", "no_fine_tuning", where known."""
        path = self.path / "reference.json"
        return self._object("reference") if path.exists() else dict(self.config.get("reference") or {})

    def record_reference(self, **values: float | None) -> None:
        """Add to `reference`; what was there under another name stays."""
        write_json(self.path / "reference.json", {**self.reference, **values}, sync=True)

    def record_refit(self, round_index: int, client: Mapping[str, Any]) -> None:
        """Note in the plan that from this round on a client has another submodel and prediction."""
        plan = self.plan
        again = (client["index"], round_index)  # noted before, by a controller that was killed in this round
        others = [refit for refit in plan.get("refits", ()) if (refit["index"], refit["from_round"]) != again]
        refits = [*others, {**client, "from_round": round_index}]
        write_json(self.path / "plan.json", {**plan, "refits": refits}, sync=True)

    def _object(self, name: str) -> dict[str, Any]:
        path = self.path / f"{name}.json"
        content = read_json(path)
        if not isinstance(content, dict):
            raise StoreError(f"{path}: expected a JSON object, got {type(content).__name__}")
        return content

    # ── status ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def status(self) -> Status:
        """Where the run stands; `interrupted` when its controller died without a word."""
        stored = self._stored_status()
        if stored.state == RUNNING and not stored.alive:
            return replace(stored, state=INTERRUPTED, error="the controller that ran it is gone")
        return stored

    def set_status(self, state: str, error: str | None = None, **facts: Any) -> None:
        """Record where the run stands; further facts are kept beside it.

        Raises StoreError when another controller is running it right now.
        """
        if state not in STATES:
            raise ValueError(f"{state!r} is not one of {', '.join(STATES)}")
        before = self._stored_status()
        me = ProcessIdentity.own()
        if state == RUNNING and before.alive and before.process != me:
            raise StoreError(f"{self.run_id}: process {before.process and before.process.pid} is running it; stop that")
        self._write_status(
            replace(
                before,
                state=state,
                error=error,
                started=before.started or _now(),
                ended=None if state == RUNNING else _now(),
                process=me if state == RUNNING else None,
                facts={**before.facts, **facts},
            )
        )
        self._update_index()

    def note(self, **facts: Any) -> None:
        """Keep further facts beside the status; what stood there under another name stays."""
        before = self._stored_status()
        self._write_status(replace(before, facts={**before.facts, **facts}))

    def record_initial_state(self, state: State) -> str:
        """Note the hash of the tensors before the first round: runs that compare fairly start from the same."""
        from testbed.model.combine import state_hash

        value = str(state_hash(state.tensors, {}))
        self._write_status(replace(self._stored_status(), initial_state=value))
        return value

    def record_final_state(self, state: State) -> str:
        """Note the hash of the state after the last round: a resumed run must end with the same."""
        from testbed.model.combine import state_hash

        value = str(state_hash(state.every_tensor, state.scalars))
        self._write_status(replace(self._stored_status(), final_state=value))
        return value

    def _stored_status(self) -> Status:
        path = self.path / "status.json"
        return Status.from_json(read_json(path)) if path.exists() else Status()

    def _write_status(self, status: Status) -> None:
        write_json(self.path / "status.json", asdict(status), sync=True)

    # ── results and rounds ─────────────────────────────────────────────────────────────────────────────────────────
    def record_result(self, result: Result) -> None:
        """Keep one job's result; a job that runs again after a resume replaces its own."""
        samples = self.path / "samples" / f"{_file_name(result.job)}.csv"
        with disk_errors_in_words(samples):
            samples.write_text("".join(_sample_lines(result)), encoding="utf-8")
        self._unsynced.add(samples)
        self.record_power(result)

    def record_power(self, result: Result) -> None:
        """Keep one job's power samples, and its result without any."""
        path = self.path / "results" / f"{_file_name(result.job)}.json"
        write_json(path, replace(result, measurement=result.measurement.without_traces()).to_json())
        self._unsynced.add(path)
        for trace in result.measurement.power:
            samples = self._power_path(result, trace)
            with disk_errors_in_words(samples):
                samples.write_text(power_samples.as_text(trace), encoding="utf-8")
            self._unsynced.add(samples)

    def with_power(self, result: Result) -> Result:
        """A stored result with its power samples; raises StoreError when they cannot be read."""
        read = []
        for trace in result.measurement.power:
            path = self._power_path(result, trace)
            read.append(power_samples.with_rows(trace, read_text(path), str(path)))
        return replace(result, measurement=replace(result.measurement, power=tuple(read)))

    def memory_samples(self, result: Result) -> list[MemorySample]:
        """The memory samples of a stored result; raises StoreError when they cannot be read."""
        path = self.path / "samples" / f"{_file_name(result.job)}.csv"
        return memory_samples.parse(read_text(path), str(path))

    def _power_path(self, result: Result, trace: PowerTrace) -> Path:
        return self.path / "samples" / f"{_file_name(result.job)}.{_file_name(trace.meter)}.power.csv"

    def results(self, round_index: int | None = None) -> list[Result]:
        """Every job's result, or every one of a round, by round, client and job id."""
        names = "[!.]*.json" if round_index is None else f"[!.]*-r{round_index}-c*.json"
        found = [result for result in self._readable_results(names) if result.kind != REST]
        return sorted(found, key=lambda result: (result.round, result.client, result.job))

    def rests(self) -> list[Result]:
        """The windows in which devices rested, before the rounds and after them, in the order of their names."""
        return [result for result in self._readable_results() if result.kind == REST]

    def _readable_results(self, names: str = "[!.]*.json") -> Iterator[Result]:
        for path in sorted((self.path / "results").glob(names)):
            try:
                yield Result.from_json(read_json(path))
            except (StoreError, KeyError, TypeError) as error:  # noqa: PERF203 -- one bad file costs one result
                if path not in self._unreadable:  # told once, however often the results are read
                    logger.warning("%s: left out, it is not a readable result (%s)", path, error)
                self._unreadable.add(path)

    def forget_empty_rounds(self) -> bool:
        """Go back to before the last rounds in which nobody finished, so that they are done again; whether there are.

        Such a round leaves the state as it was.  A folder that is left half way here is gone back from again.
        """
        saved = self.load_checkpoint()
        if saved is None or not saved[2].get("empty_rounds"):
            return False
        state, done, extra = saved
        rounds = [record for record in self.rounds() if record.round < done]
        first = max((record.round + 1 for record in rounds if record.finished or not record.participants), default=0)
        for result in [*self.results()]:
            if result.round >= first:
                self._forget_result(result.job)
        path = self.path / "rounds.jsonl"
        partial = path.with_name(f".{path.name}.partial")
        with disk_errors_in_words(path):
            kept = [json.dumps(asdict(record), default=plain) + "\n" for record in rounds if record.round < first]
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)
        checkpoints.go_back(self.path / "checkpoint", state, first, {**extra, "empty_rounds": 0})
        return True

    def _forget_result(self, job: str) -> None:
        name = _file_name(job)
        with disk_errors_in_words(self.path):
            (self.path / "results" / f"{name}.json").unlink(missing_ok=True)
            for path in (self.path / "samples").glob(f"{name}.*"):
                path.unlink()

    def record_round(self, index: int, *, quality: Quality | None = None, **figures: Any) -> None:
        """Append one round: its index from 0, and the other fields of RoundRecord by name."""
        path = self.path / "rounds.jsonl"
        record = RoundRecord(index, quality=asdict(quality) if quality else None, **figures)
        line = json.dumps(asdict(record), default=plain)
        with disk_errors_in_words(path), path.open("a+b") as stream:
            stream.write(b"" if _ends_clean(path) else b"\n")  # a line that a kill cut off stays apart
            stream.write(line.encode() + b"\n")
        self._unsynced.add(path)

    def rounds(self) -> list[RoundRecord]:
        """Every round, in order; of a round that was run again after a resume, the last."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        with disk_errors_in_words(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = {record.round: record for record in map(_round_of, lines) if record}
        return [found[index] for index in sorted(found)]

    # ── payloads and updates of the round under way ────────────────────────────────────────────────────────────────
    def update_path(self, job: str) -> Path:
        """Where a job's update is spooled until it is combined and the checkpoint stands."""
        return self._spool() / f"{_file_name(job)}.update.safetensors"

    def payload_path(self, job: str) -> Path:
        """Where the tensors that a job sends out are written."""
        return self._spool() / f"{_file_name(job)}.payload.safetensors"

    def forget_updates(self, round_index: int) -> None:
        """Remove what was spooled for this round and those before it: the checkpoint holds what came of them."""
        del round_index  # rounds follow one another: when one is over, nothing of a later one is there yet
        with disk_errors_in_words(self.path):
            for path in self._spool().iterdir():
                path.unlink()

    def _spool(self) -> Path:
        path = self.path / "updates"
        with disk_errors_in_words(path):
            path.mkdir(exist_ok=True)
        return path

    # ── checkpoints ────────────────────────────────────────────────────────────────────────────────────────────────
    def save_checkpoint(self, state: State, round_index: int, extra: Mapping[str, Any] | None = None) -> None:
        """Put the state after `round_index` on the disk, with all results so far; durable when this returns."""
        checkpoints.save(self.path / "checkpoint", state, round_index, extra or {}, self._unsynced)
        self._unsynced.clear()

    def load_checkpoint(self) -> tuple[State, int, dict[str, Any]] | None:
        """State, round and extra of the newest readable checkpoint, or None when there is none.

        Raises StoreError when there are checkpoints and none can be read.
        """
        return checkpoints.load(self.path / "checkpoint")

    # ── index ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def index_rows(self) -> tuple[RunRow, list[JobRow]]:
        """What the index holds of this run."""
        return describe(self.run_id, self.config, self.status, self.rounds(), self.results())

    def _update_index(self) -> None:
        """The index is a convenience: a run goes on without it."""
        try:
            RunIndex(self.path.parent).put(*self.index_rows())
        except StoreError as error:
            logger.warning("the run is stored, its line in the index is not: %s", error)


# ── over all runs ──────────────────────────────────────────────────────────────────────────────────────────────────
def run_folders(runs_dir: Path) -> list[Path]:
    """Every run folder, by name; none when the folder does not exist."""
    with disk_errors_in_words(runs_dir):
        return sorted(path for path in runs_dir.iterdir() if _is_run(path)) if runs_dir.is_dir() else []


def list_runs(runs_dir: Path) -> list[RunRow]:
    """Every run, oldest first: from the index, brought up to date with the folders; one that lacks files is told."""
    for path in sorted(runs_dir.iterdir()) if runs_dir.is_dir() else ():
        if missing := _missing_of_a_run(path):
            logger.warning("%s: left out, it is a run without %s", path, missing)
    names = [path.name for path in run_folders(runs_dir)]
    if not names:
        return []
    index = RunIndex(runs_dir)
    known = {row.run: row for row in index.rows()}
    for name in names:
        if name not in known or known[name].state == RUNNING:
            index.put(*RunFolder(runs_dir / name).index_rows())
    for name in known.keys() - set(names):
        index.drop(name)
    return index.rows()


def newest_of_each_method(runs_dir: Path) -> list[str]:
    """The newest finished run of every method, in the order in which they ended; raises StoreError without any."""
    newest = {row.method: row.run for row in list_runs(runs_dir) if row.state == FINISHED}
    if not newest:
        raise StoreError(f"there is no finished run in {runs_dir}; `testbed run-method METHOD` makes one")
    return sorted(newest.values(), key=lambda run: run.split("-", 1)[1])


def reindex(runs_dir: Path) -> int:
    """Build the index again from the folders; gives the number of runs."""
    folders = [RunFolder(path) for path in run_folders(runs_dir)]
    try:
        index = RunIndex(runs_dir)
    except StoreError:  # damaged beyond opening, or of a newer version: it holds nothing that the folders do not
        for path in runs_dir.glob("index.sqlite*"):
            path.unlink()
        index = RunIndex(runs_dir)
    index.replace_all(folder.index_rows() for folder in folders)
    return len(folders)


def _sample_lines(result: Result) -> Iterator[str]:
    """The raw samples of a job, one a line; `seconds` since the beginning of the phase, counted from 0 in the job."""
    phases = result.measurement.phases
    wide = any(len(row) > _PLAIN_COLUMNS for phase in phases for row in phase.trace)
    accelerator = ",accelerator_bytes" if wide else ""
    yield f"phase,name,seconds,vmhwm_bytes,anonymous_bytes,file_bytes,unreclaimable_bytes{accelerator}\n"
    for number, phase in enumerate(phases):
        for row in phase.trace:
            yield f"{number},{phase.name},{','.join('' if value is None else str(value) for value in row)}\n"


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "plan.json").is_file()


def _missing_of_a_run(path: Path) -> str | None:
    """Which file makes a folder with other parts of a run no run; None for a run, and for any other folder."""
    parts = ("config.json", "plan.json", "status.json", "results", "rounds.jsonl")
    if sum((path / part).exists() for part in parts) < _ENOUGH_PARTS:
        return None
    return next((name for name in ("plan.json", "config.json") if not (path / name).is_file()), None)


def _round_of(line: str) -> RoundRecord | None:
    """None for a line that a kill cut off."""
    try:
        return RoundRecord(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _ends_clean(path: Path) -> bool:
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        return size == 0 or (stream.seek(-1, os.SEEK_END) >= 0 and stream.read(1) == b"\n")


def _file_name(job: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", job).lstrip(".") or "_"


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[-limit:]) + (", …" if len(names) > limit else "")


def _not_found(runs_dir: Path, run: str, known: list[str]) -> str:
    if not known:
        return f"{runs_dir}: there is no run {run!r}, and no other; point `--runs` at the folder that holds them"
    beginnings = {name[: len(run)]: name for name in known}  # of several that begin alike, the newest
    near = difflib.get_close_matches(run, beginnings, n=3)
    if near:
        names = [beginnings[beginning] for beginning in near]
        return f"{runs_dir}: there is no run {run!r}; did you mean {_listed(names)}?"
    return f"{runs_dir}: there is no run {run!r}; the newest are {_listed(known, 3)} (`testbed runs` lists all)"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
