"""Which runs a command means: each word is a run, or an experiment with all of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import StoreError

if TYPE_CHECKING:
    from testbed.store import RunFolder

_EXPERIMENT_SUFFIXES = frozenset({".yaml", ".yml"})


def chosen_folders(words: Sequence[str], runs_dir: Path) -> list[RunFolder]:
    """The runs that these words name, each once, in their order.

    A word is a run's id, the beginning of one that no other run shares, its path, or an experiment: its file, or the
    name of one that comes along.  Raises StoreError for what is none of these, and for an experiment without a run.
    """
    found: dict[Path, RunFolder] = {}
    for word in words:
        for folder in _folders(word, runs_dir):
            found.setdefault(folder.path.resolve(), folder)
    return list(found.values())


def _folders(word: str, runs_dir: Path) -> list[RunFolder]:
    from testbed.store import RunFolder

    if _is_experiment(word, runs_dir):
        return _of_experiment(Path(word), runs_dir)
    return [RunFolder.open(runs_dir, word)]


def _is_experiment(word: str, runs_dir: Path) -> bool:
    """A run that is called like an experiment that comes along goes first: it is there because somebody made it."""
    from testbed.experiments.experiment import bundled

    if Path(word).suffix in _EXPERIMENT_SUFFIXES:
        return True
    return word in bundled() and not (runs_dir / word).exists()


def _of_experiment(name: Path, runs_dir: Path) -> list[RunFolder]:
    """The runs of an experiment's cells as far as there are any, in the order of the cells."""
    from testbed.experiments.cells import standings
    from testbed.experiments.experiment import load_experiment

    experiment = load_experiment(name)
    found = [standing.run for standing in standings(experiment.cells, runs_dir) if standing.run is not None]
    if not found:
        raise StoreError(
            f"{experiment.path}: {runs_dir} has no run of its {len(experiment.cells)} cells; run them with "
            f"`testbed experiment {name} --runs {runs_dir}`, or point --runs at the folder that holds them"
        )
    return found
