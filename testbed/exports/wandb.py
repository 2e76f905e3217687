"""Runs into Weights & Biases, through its own client; with WANDB_MODE=offline into a folder, for `wandb sync`.

A run's id there follows from its own, so that a second export goes on with it and adds nothing twice.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import StoreError, UsageError
from testbed.exports.tracking import RUN_TAG

if TYPE_CHECKING:
    from testbed.exports.tracking import Tracked

#: Its own error reports and measurements of this machine: nothing of it belongs to the run.
_QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class WandbTarget:
    """Where runs go: a project, by WANDB_MODE (online, or offline into the folder of WANDB_DIR, else the current one).

    Raises UsageError where the client is lacking.
    """

    def __init__(self, project: str) -> None:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import wandb
        except ImportError:
            raise UsageError("--to wandb needs its client: pip install 'edge-testbed[wandb]'") from None
        self._wandb = wandb
        self.project = project

    def put(self, run: Tracked, experiment: str, files: Path | None) -> str:
        """Add a run, with all files below a folder as an artifact, or go on with what was added of it; its W&B id."""
        number = wandb_id(run.run)
        before = _offline_folders(number)
        with _errors_in_words():
            made = self._wandb.init(
                project=self.project,
                id=number,
                name=run.run,
                group=experiment,
                job_type=run.tags.get("method"),
                tags=[
                    f"{name}:{value}"[:64] for name, value in run.tags.items() if name in ("method", "seed", "label")
                ],
                config={**run.parameters, RUN_TAG: run.run, **{f"tag.{name}": text for name, text in run.tags.items()}},
                resume="allow",
                settings=self._settings(),
            )
            try:
                self._log(made, run, files)
            finally:
                made.finish()
        for folder in before:  # this one says all that they say
            shutil.rmtree(folder, ignore_errors=True)
        return number

    def _settings(self) -> Any:
        return self._wandb.Settings(
            console="off", disable_code=True, disable_git=True, silent=True, x_disable_meta=True, x_disable_stats=True
        )

    def _log(self, made: Any, run: Tracked, files: Path | None) -> None:
        for step, metrics in run.rounds:
            made.log(dict(metrics), step=step)
        made.summary.update({f"run_{name}": value for name, value in run.figures.items()})
        if files is not None:
            artifact = self._wandb.Artifact(f"results-{made.id}", type="results")
            artifact.add_dir(str(files))
            made.log_artifact(artifact)


def wandb_id(run: str) -> str:
    """The id of a run there: the same for the same run."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"testbed-{run}")[:128]


def _offline_folders(number: str) -> list[Path]:
    """What an earlier export of this run has left to be synchronised."""
    folder = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    return sorted(folder.glob(f"offline-run-*-{number}"))


@contextmanager
def _errors_in_words() -> Iterator[None]:
    from wandb.errors import Error

    try:
        yield
    except Error as error:
        raise StoreError(
            f"Weights & Biases: {str(error).splitlines()[0]}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from None
