"""An SQLite database over all runs, for queries.  The folders stay the truth: it can be rebuilt from them any time.

SELECT run, accuracy FROM runs WHERE method = 'fedpruner' ORDER BY accuracy DESC;
SELECT device, max(peak_bytes) FROM jobs WHERE outcome = 'finished' GROUP BY device;
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from testbed.errors import StoreError
from testbed.run_record import finite, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from testbed.job import Result
    from testbed.run_record import RoundRecord, Status

INDEX_NAME = "index.sqlite"
BUSY_SECONDS = 30.0  # how long one controller waits for another's transaction


@dataclass(frozen=True)
class RunRow:
    """One run, as the index lists it."""

    run: str
    method: str
    data: str | None
    model: str | None
    seed: int | None
    state: str
    started: str | None  # ISO 8601, UTC
    ended: str | None
    rounds: int | None  # asked for
    rounds_done: int
    accuracy: float | None  # at the last evaluation
    loss: float | None
    error: str | None


@dataclass(frozen=True)
class JobRow:
    """One job of a run."""

    run: str
    job: str
    round: int
    client: int
    device: str
    kind: str
    outcome: str
    seconds: float | None
    peak_bytes: int | None  # the estimate
    limit_bytes: int | None
    bytes_down: int
    bytes_up: int


# ── migrations: each is applied once, in this order, with a record of its own ────────────────────────────────────────
def create_runs(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE TABLE runs (run TEXT PRIMARY KEY, method TEXT NOT NULL, data TEXT, model TEXT, seed INTEGER, "
        "state TEXT NOT NULL, started TEXT, ended TEXT, rounds INTEGER, rounds_done INTEGER NOT NULL, "
        "accuracy REAL, loss REAL, error TEXT)"
    )


def create_jobs(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE TABLE jobs (run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, job TEXT NOT NULL, "
        "round INTEGER NOT NULL, client INTEGER NOT NULL, device TEXT NOT NULL, kind TEXT NOT NULL, "
        "outcome TEXT NOT NULL, seconds REAL, peak_bytes INTEGER, limit_bytes INTEGER, bytes_down INTEGER NOT NULL, "
        "bytes_up INTEGER NOT NULL, PRIMARY KEY (run, job))"
    )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (create_runs, create_jobs)


class RunIndex:
    """The index of one runs folder.  Every call is its own transaction, so that several controllers can share it.

    Without a write-ahead log: whoever turns that on, or is the last to close it, makes others fail at once with
    "database is locked", however long they are willing to wait.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.path = runs_dir / INDEX_NAME
        with self._transaction() as connection:
            migrate(connection)

    def put(self, row: RunRow, jobs: Iterable[JobRow] = ()) -> None:
        """Add a run, or replace what was known of it."""
        with self._transaction() as connection:
            _put(connection, row, jobs)

    def replace_all(self, rows: Iterable[tuple[RunRow, Iterable[JobRow]]]) -> None:
        """Forget everything and hold exactly these."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM runs")
            for row, jobs in rows:
                _put(connection, row, jobs)

    def drop(self, run: str) -> None:
        """Forget a run."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM runs WHERE run = ?", (run,))

    def rows(self) -> list[RunRow]:
        """Every run, oldest first."""
        with self._transaction() as connection:
            found = connection.execute(_select(RunRow, "runs", "ORDER BY started, run")).fetchall()
        return [RunRow(*row) for row in found]

    def jobs(self, run: str) -> list[JobRow]:
        """The jobs of a run, by round and client."""
        with self._transaction() as connection:
            query = _select(JobRow, "jobs", "WHERE run = ? ORDER BY round, client, job")
            found = connection.execute(query, (run,)).fetchall()
        return [JobRow(*row) for row in found]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot be opened ({error})") from error
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}; it can be removed, the run folders hold everything") from error
        finally:
            connection.close()  # an open transaction is rolled back


def describe(
    run: str,
    config: Mapping[str, Any],
    status: Status,
    rounds: Sequence[RoundRecord],
    results: Iterable[Result],
) -> tuple[RunRow, list[JobRow]]:
    """The rows of one run, from what its folder says."""
    quality = next((record.quality for record in reversed(rounds) if record.quality), None) or {}
    row = RunRow(
        run=run,
        method=str(config.get("method", "")),
        data=name_of(config.get("data")),
        model=name_of(config.get("model")),
        seed=config.get("seed"),
        state=status.state,
        started=status.started,
        ended=status.ended,
        rounds=config.get("rounds"),
        rounds_done=len(rounds),
        accuracy=finite(quality.get("accuracy")),
        loss=finite(quality.get("loss")),
        error=status.error,
    )
    return row, [_job_row(run, result) for result in results]


def _job_row(run: str, result: Result) -> JobRow:
    measured = result.measurement
    return JobRow(
        run=run,
        job=result.job,
        round=result.round,
        client=result.client,
        device=result.device,
        kind=result.kind,
        outcome=result.outcome,
        seconds=measured.seconds,
        peak_bytes=measured.peak.estimate_bytes,
        limit_bytes=measured.limit_bytes,
        bytes_down=measured.bytes_down,
        bytes_up=measured.bytes_up,
    )


def migrate(connection: sqlite3.Connection) -> None:
    """Apply the migrations that this file has not seen; refuse a file of a newer version."""
    connection.execute("CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied TEXT NOT NULL)")
    applied = {name for (name,) in connection.execute("SELECT name FROM migrations")}
    unknown = applied - {migration.__name__ for migration in MIGRATIONS}
    if unknown:
        raise StoreError(
            f"the index was written by a newer version of the testbed (migration {min(unknown)!r}); update the "
            f"testbed, or remove {INDEX_NAME}: the run folders hold everything"
        )
    for migration in MIGRATIONS:
        if migration.__name__ not in applied:
            migration(connection)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            connection.execute("INSERT INTO migrations VALUES (?, ?)", (migration.__name__, now))


def _put(connection: sqlite3.Connection, row: RunRow, jobs: Iterable[JobRow]) -> None:
    connection.execute("DELETE FROM runs WHERE run = ?", (row.run,))
    _insert(connection, "runs", [row])
    _insert(connection, "jobs", list(jobs))


def _insert(connection: sqlite3.Connection, table: str, rows: list[Any]) -> None:
    if rows:
        holes = ", ".join("?" for _ in fields(rows[0]))
        columns = _columns(type(rows[0]))
        statement = f"INSERT INTO {table} ({columns}) VALUES ({holes})"  # noqa: S608 -- names of our own dataclasses
        connection.executemany(statement, [astuple(row) for row in rows])


def _select(kind: Any, table: str, rest: str) -> str:
    return f"SELECT {_columns(kind)} FROM {table} {rest}"  # noqa: S608 -- names of our own dataclasses


def _columns(kind: Any) -> str:
    return ", ".join(field.name for field in fields(kind))
