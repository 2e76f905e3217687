"""Runs into MLflow, through its own client: a server, a database, or a folder.

A run is found again by its tag `testbed_run`: a second export of it replaces the first.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import StoreError, UsageError
from testbed.exports.tracking import RUN_TAG, Tracked

if TYPE_CHECKING:
    from collections.abc import Iterator

_SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "mysql", "mssql", "postgresql")
#: Of one request, by MLflow's own limits.
_MOST_METRICS, _MOST_PARAMETERS, _MOST_TAGS = 1000, 100, 100
_LONGEST_PARAMETER = 6000


class MlflowTarget:
    """Where runs go: `uri` as MLflow has it (http://…, sqlite:///runs.db, a folder); None: MLFLOW_TRACKING_URI.

    Raises UsageError where the client is lacking, or there is no such place.
    """

    def __init__(self, uri: str | None) -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        if not self.uri:
            raise UsageError(
                "--to mlflow: say where it is with --uri (http://HOST:5000, sqlite:///mlflow.db or a folder), or set "
                "MLFLOW_TRACKING_URI"
            )
        self._client = _client(self.uri)

    def put(self, run: Tracked, experiment: str, files: Path | None) -> str:
        """Add a run, with all files below a folder as its artifacts, or replace what was added of it; its MLflow id."""
        with _errors_in_words(self.uri):
            number = self._experiment(experiment)
            before = self._client.search_runs([number], f"tags.{RUN_TAG} = '{run.run}'")
            made: str = self._client.create_run(number, run_name=run.run, tags=dict(run.tags)).info.run_id
            try:
                self._log(made, run)
                if files is not None:
                    self._client.log_artifacts(made, str(files))
            except BaseException:
                self._client.set_terminated(made, "FAILED")
                self._client.delete_run(made)
                raise
            self._client.set_terminated(made, "FINISHED" if run.tags.get("state") == "finished" else "FAILED")
            for old in before:
                self._client.delete_run(old.info.run_id)
        return made

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        number: str = found.experiment_id if found else self._client.create_experiment(name, _artifacts(self.uri))
        return number

    def _log(self, made: str, run: Tracked) -> None:
        from mlflow.entities import Metric, Param

        now = 0
        metrics = [Metric(name, value, now, step) for step, values in run.rounds for name, value in values.items()]
        last = run.rounds[-1][0] if run.rounds else 0
        metrics += [Metric(f"run_{name}", value, now, last) for name, value in run.figures.items()]
        parameters = [Param(name, _cut(str(value))) for name, value in run.parameters.items()]
        for begin in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(made, metrics=metrics[begin : begin + _MOST_METRICS])
        for begin in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(made, params=parameters[begin : begin + _MOST_PARAMETERS])


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_PARAMETER else f"{text[: _LONGEST_PARAMETER - 1]}…"


def _client(uri: str) -> Any:
    """MLflow's client, which is told to send nothing about its use to its makers."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "://" not in uri or uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it is in maintenance, and does what is needed here
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise UsageError("--to mlflow needs its client: pip install 'edge-testbed[mlflow]'") from None
    if uri.startswith(_DATABASES):
        _check_database(uri)
    with _errors_in_words(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_database(uri: str) -> None:
    lacking = [name for name in ("sqlalchemy", "alembic", "sqlparse") if find_spec(name) is None]
    if lacking:
        raise UsageError(
            f"--uri {uri}: for a database MLflow needs {', '.join(lacking)}: pip install {' '.join(lacking)}, or give "
            "the address of a server, or a folder"
        )


def _artifacts(uri: str) -> str | None:
    """Where an experiment's files go: beside an SQLite file, not into whatever folder the command was typed in."""
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).resolve().parent / "mlartifacts").as_uri()


@contextmanager
def _errors_in_words(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise StoreError(f"MLflow at {uri}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise StoreError(f"MLflow at {uri}: {error.strerror or error}") from None
