"""The tables that `testbed export` writes: columns with their type, unit and meaning.  Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TEXT = "text"
INTEGER = "integer"
REAL = "real"
TRUTH = "boolean"
#: In a column's name, its unit.
_UNITS = ("bytes", "seconds", "joules", "watts", "celsius")


@dataclass(frozen=True)
class Column:
    """A column of an exported table; what was not measured is null, or an empty field."""

    name: str
    kind: str  # TEXT, INTEGER, REAL or TRUTH
    meaning: str

    @property
    def unit(self) -> str | None:
        """By the end of its name: `peak_lower_bytes` is bytes."""
        return next((unit for unit in _UNITS if self.name.split("_")[-1] == unit), None)


class Row(NamedTuple):
    """Values by the names of their columns; those that are left out are null."""

    table: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table: its name is the file's, `meaning` says what a row is."""

    name: str
    meaning: str
    columns: tuple[Column, ...] = field(repr=False)

    def row(self, **values: Any) -> Row:
        """Raises KeyError for a value that has no column."""
        if unknown := values.keys() - {column.name for column in self.columns}:
            raise KeyError(f"{self.name} has no column {min(unknown)}")
        return Row(self.name, values)

    def tuples(self, row: Row) -> tuple[Any, ...]:
        """The values in the order of the columns."""
        return tuple(row.values.get(column.name) for column in self.columns)


def _columns(text: str) -> tuple[Column, ...]:
    """One a line: name, type, meaning."""
    return tuple(Column(*line.split(None, 2)) for line in text.strip().splitlines())


def _table(name: str, meaning: str, *parts: str) -> Table:
    return Table(name, meaning, tuple(column for part in parts for column in _columns(part)))


_RUN = "run text the run's id, which joins the tables"
_JOB = """
run     text     the run's id, which joins the tables
job     text     the job's id, unique in its run
round   integer  counted from 0; a rest before the first round has -1
client  integer  whose data it was; -1 of a rest
device  text     on which it ran
kind    text     train, rest, evaluate or a word of the method's own
"""
_PEAK = """
peak_lower_bytes     integer  largest sample of memory that cannot be reclaimed
peak_estimate_bytes  integer  high-water mark less the file pages at that sample: the figure of the reports
peak_upper_bytes     integer  the cgroup's own peak, page cache included
"""
_ENERGY = """
energy_joules       real     gross energy, of all jobs
energy_low_joules   real     lower end of its interval at 95 %
energy_high_joules  real     upper end of its interval at 95 %
energy_valid        boolean  whether it may be used without a reservation
energy_replayed     boolean  a recording was played, nothing was measured
"""

RUNS = _table(
    "runs",
    "one run; qualities are those of the last evaluation",
    _RUN,
    """
    experiment          text     name of the experiment that it is a cell of
    label               text     of the cell, in the experiment's file
    method              text     the method's name
    settings            text     the method's settings, as JSON
    seed                integer  of everything drawn in the run
    state               text     finished, interrupted, failed or running when it was exported
    error               text     why it ended, where it did not finish
    started             text     ISO 8601, UTC
    ended               text     ISO 8601, UTC
    task                text     what is learned
    data                text     name of the data set
    data_sha256         text     hash of its content
    model               text     name or folder of the base model
    model_sha256        text     hash of its weights outside the blocks
    rounds              integer  done
    rounds_planned      integer  asked for
    seconds             real     sum over the rounds, evaluation included
    accuracy            real     a share, at the last evaluation
    accuracy_best       real     a share, at the best evaluation
    loss                real     at the last evaluation
    loss_best           real     at the best evaluation
    majority            real     accuracy of always naming the most frequent class
    bag_of_words        real     accuracy of a bag of words, trained centrally
    no_fine_tuning      real     accuracy before the first round
    clients             integer  in the plan
    clients_refused     integer  of them, refused
    jobs_failed         integer  jobs that did not finish
    bytes_down          integer  sent to devices with jobs
    bytes_up            integer  sent back, without what measuring took
    measurement_bytes   integer  what telling the measurements took
    deployed_bytes      integer  sent beside the jobs because devices lacked it
    tokens_per_second   real     of the finished jobs, over the seconds of the method's own phases
    peak_worst_bytes    integer  highest estimate of any device
    """,
    _ENERGY,
    """
    emulated            boolean  all devices are emulated (null: some)
    uncapped            boolean  a finished job ran without a memory limit
    testbed_version     text     of edge-testbed
    commit              text     of its code, where that is a clone
    machine             text     the controller's processor
    initial_state       text     hash of the tensors before the first round
    final_state         text     hash of the state after the last round
    """,
)
DEVICES = _table(
    "devices",
    "one device of a run, over all its jobs",
    _RUN,
    """
    device                  text     its name in the inventory
    kind                    text     emulated, jetson, raspberry_pi or generic
    profile                 text     hardware profile
    clients                 integer  placed on it
    clients_refused         integer  of them, refused
    jobs                    integer  that it was given
    jobs_finished           integer  of them, finished
    budget_bytes            integer  memory that a trainer may take
    predicted_bytes         integer  peak that the plan predicted
    peak_median_bytes       real     estimate, median over the finished jobs
    """,
    _PEAK.replace("peak_", "peak_worst_"),
    """
    peak_source             text     where the worst estimate comes from
    prediction_error        real     prediction over worst peak, less 1, as a ratio
    accelerator_peak_bytes  integer  of the peak, held on the accelerator
    bytes_down              integer  sent to it with jobs
    bytes_up                integer  sent back by it
    tokens_per_second       real     of its finished jobs
    highest_celsius         real     of its sensors
    """,
    _ENERGY,
    """
    energy_net_joules       real     less what it takes at rest in the same time
    energy_point            text     where the meter measures
    energy_samples          integer  power samples inside the jobs
    """,
)
ROUNDS = _table(
    "rounds",
    "one round of a run; figures that begin with total_ are sums up to its end, without evaluation",
    _RUN,
    """
    round               integer  counted from 0
    seconds             real     that it took, evaluation included
    evaluation_seconds  real     of them, by the evaluation; null in older runs
    learning_rate       real     in this round
    participants        integer  clients that were asked
    finished            integer  clients whose updates were combined
    deployed_bytes      integer  sent beside the jobs because devices lacked it
    train_loss          real     mean over the clients, weighted by examples
    accuracy            real     a share, where it was evaluated
    loss                real     where it was evaluated
    examples            integer  that it was evaluated on
    total_seconds       real     wall clock of the rounds
    total_joules        real     gross energy of all devices; null where one has no meter
    total_bytes_down    integer  sent with jobs
    total_bytes_up      integer  sent back
    total_deployed_bytes integer sent beside the jobs
    """,
)
JOBS = _table(
    "jobs",
    "one client's work in one round, or a device's rest",
    _JOB,
    """
    outcome             text     finished, out_of_memory, over_budget, timed_out, unreachable, refused or failed
    phase               text     where it ended, if not finished
    error               text     why it did not finish
    examples            integer  of its shard
    tokens              integer  that it trained on
    loss                real     that its method told
    begun_unix_seconds  real     when its first byte came, by the controller's clock
    seconds             real     that it took, without waiting
    limit_bytes         integer  memory limit of the trainer; null: uncapped
    baseline_bytes      integer  memory of the loaded, empty trainer
    """,
    _PEAK,
    """
    refaults                integer  pages read again after they were reclaimed
    accelerator_peak_bytes  integer  held at most by the caching allocator
    bytes_down              integer  sent to the device
    bytes_up                integer  sent back, without what measuring took
    measurement_bytes       integer  what telling the measurements took
    meter                   text     first meter of the device
    energy_joules           real     gross, by that meter
    energy_half_width_joules real    half of its interval at 95 %
    energy_valid            boolean  whether it may be used without a reservation
    begin_celsius           real     when it began
    highest_celsius         real     while it ran
    throttled               text     what the device was held back by, comma-separated; empty text: by nothing
    disturbances            text     what was done to it on purpose and what came of that, as JSON
    """,
)
PHASES = _table(
    "phases",
    "one phase of a job",
    _JOB,
    """
    phase_number    integer  counted from 0 in the job
    phase           text     receive, start, load, send, idle (waiting), or the method's own
    begun_seconds   real     after the job's first byte came
    seconds         real     that it took
    """,
    _PEAK,
    """
    lower_source       text     where the lower bound comes from
    estimate_source    text     where the estimate comes from
    upper_source       text     where the upper bound comes from
    file_bytes         integer  file pages mapped at the estimate's sample
    accelerator_bytes  integer  largest sample of what was held on the accelerator
    refaults           integer  pages read again after they were reclaimed
    samples            integer  taken; of more than 1000 only every second, fourth, … is kept
    """,
)
MEMORY_SAMPLES = _table(
    "memory_samples",
    "one look at a trainer's counters",
    _JOB,
    """
    phase_number         integer  counted from 0 in the job
    phase                text     its name
    seconds              real     since the phase began
    vmhwm_bytes          integer  high-water mark of resident memory; of a phase's first sample that of the phase before
    anonymous_bytes      integer  anonymous memory
    file_bytes           integer  mapped file pages
    unreclaimable_bytes  integer  what cannot be reclaimed, of the whole cgroup where there is one
    accelerator_bytes    integer  held on the accelerator
    """,
)
POWER_SAMPLES = _table(
    "power_samples",
    "one reading of one rail",
    _JOB,
    """
    phase           text     in which it was taken; null outside of the job
    meter           text     the meter's name
    point           text     where it measures
    replayed        boolean  a recording was played, nothing was measured
    rail            text     the board's own name of it
    is_total        boolean  whether it is one of those whose sum is the whole at that point
    seconds         real     after the job's first byte came
    clock_seconds   real     that the wall clock has moved against the monotonic one since the first sample
    watts           real     as it was read, without calibration
    counter_joules  real     that the rail's energy counter has grown by since the first sample, where it has one
    """,
)
SUMMARIES = (RUNS, DEVICES, ROUNDS, JOBS, PHASES)
SAMPLES = (MEMORY_SAMPLES, POWER_SAMPLES)


def tables(*, samples: bool) -> tuple[Table, ...]:
    """What is written, in the order in which it is described."""
    return (*SUMMARIES, *SAMPLES) if samples else SUMMARIES


def described(made: tuple[Table, ...]) -> Iterator[dict[str, Any]]:
    """Tables and columns as JSON."""
    for table in made:
        columns = [
            {"name": each.name, "type": each.kind, "unit": each.unit, "meaning": each.meaning} for each in table.columns
        ]
        yield {"name": table.name, "row": table.meaning, "columns": columns}
