"""Every metric there is, with its labels and meaning: what is exported, documented and shown is held to this table.

Names end in their unit, as https://prometheus.io/docs/practices/naming/ asks for: base units, ratios from 0 to 1.

The id of a run is a label of `testbed_run_info` alone.  Were it on every live series, each run would begin all of them
anew, and a Prometheus that watches a lab for months would carry every one of them.  A query that wants it joins:
`testbed_run_loss * on (instance) group_left (run) testbed_run_info`.

The families `testbed_result_*` are the exception: one run has one accuracy, and that it is of this run is what the
series says.  There are as many of them as runs in the folder, and they never change once a run is over.
"""

from __future__ import annotations

from typing import NamedTuple

GAUGE, COUNTER = "gauge", "counter"
_UNITS = ("bytes", "seconds", "joules", "watts", "celsius", "ratio")


class Family(NamedTuple):
    """One metric.  A counter's name ends in _total."""

    name: str
    labels: tuple[str, ...]
    about: str

    @property
    def kind(self) -> str:
        return COUNTER if self.name.endswith("_total") else GAUGE

    @property
    def unit(self) -> str:
        """The unit in the name; "" for counts, facts and losses."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in _UNITS else ""


_RAIL = ("device", "meter", "rail")

DEVICE_FAMILIES = (
    Family("testbed_device_info", ("device", "kind", "profile"), "a device of the inventory; always 1"),
    Family("testbed_device_up", ("device",), "1 in contact, 0 looked for or unreachable"),
    Family(
        "testbed_device_state", ("device", "state"), "1 for what it is at: a phase, idle, or how its last job ended"
    ),
    Family("testbed_device_held", ("device",), "1 while a run holds it"),
    Family("testbed_device_last_contact_timestamp_seconds", ("device",), "when it was last heard of, since 1970"),
    Family("testbed_device_budget_bytes", ("device",), "memory that a run may use of it"),
    Family("testbed_device_predicted_peak_bytes", ("device",), "the largest peak that the plan predicts for a client"),
    Family("testbed_device_memory_bytes", ("device",), "unreclaimable memory of the trainer now"),
    Family("testbed_device_peak_bytes", ("device",), "peak of the job under way, else of the last one (estimate)"),
    Family("testbed_device_accelerator_bytes", ("device",), "accelerator memory now"),
    Family("testbed_device_disk_free_bytes", ("device",), "free on the file system of the testbed's folder"),
    Family("testbed_device_power_watts", _RAIL, "power of a rail now; rails are never added up"),
    Family(
        "testbed_device_energy_joules_total", _RAIL, "energy of a rail, integrated on the device, since the run began"
    ),
    Family("testbed_meter_info", ("device", "meter", "point", "replayed"), "a meter, and where it measures; always 1"),
    Family("testbed_device_temperature_celsius", ("device",), "its hottest sensor"),
    Family("testbed_device_throttled", ("device",), "1 while it is held back, 0 while it is not"),
    Family("testbed_device_throttled_by", ("device", "reason"), "1 for what holds it back, 0 for what did before"),
    Family("testbed_device_loss", ("device",), "loss of its last local step"),
)

RUN_FAMILIES = (
    Family("testbed_run_info", ("run", "method", "model", "data", "task", "seed", "state"), "the run; always 1"),
    Family("testbed_run_last_event_timestamp_seconds", (), "when something last went on in the run, since 1970"),
    Family("testbed_run_rounds_planned", (), "rounds that were asked for"),
    Family("testbed_run_rounds_done", (), "rounds that are over"),
    Family("testbed_run_round", (), "the round under way, counted from 1"),
    Family("testbed_run_round_seconds", (), "how long the last round took"),
    Family("testbed_run_participants", (), "clients that take part in this round"),
    Family("testbed_run_learning_rate", (), "learning rate of this round"),
    Family("testbed_run_train_loss", (), "mean training loss of the clients that finished this round"),
    Family("testbed_run_loss", (), "held-out loss at the last evaluation"),
    Family("testbed_run_accuracy_ratio", (), "held-out accuracy at the last evaluation"),
    Family("testbed_run_jobs_total", ("device", "kind", "outcome"), "jobs that ended"),
    Family("testbed_run_tokens_total", ("device",), "tokens of finished jobs"),
    Family("testbed_run_phase_seconds_total", ("device", "phase"), "time that jobs spent in each phase"),
    Family("testbed_run_traffic_bytes_total", ("device", "direction"), "payload of jobs, up and down"),
)

RESULT_FAMILIES = (
    Family(
        "testbed_result_info",
        ("run", "method", "model", "data", "task", "seed", "state", "emulated"),
        "a run of the store; always 1",
    ),
    Family("testbed_result_accuracy_ratio", ("run",), "held-out accuracy at the end"),
    Family("testbed_result_loss", ("run",), "held-out loss at the end"),
    Family("testbed_result_reference_accuracy_ratio", ("run", "reference"), "what the accuracy stands beside"),
    Family("testbed_result_rounds", ("run",), "rounds that were run"),
    Family("testbed_result_seconds", ("run",), "sum over its rounds"),
    Family("testbed_result_phase_seconds", ("run", "phase"), "time of all jobs in each phase"),
    Family("testbed_result_traffic_bytes", ("run", "direction"), "payload of all jobs"),
    Family(
        "testbed_result_energy_joules",
        ("run", "valid", "replayed"),
        "gross energy of all jobs, where every device was metered, with its verdict",
    ),
    Family("testbed_result_failed_jobs", ("run",), "jobs that did not finish"),
    Family("testbed_result_peak_bytes", ("run", "device"), "worst peak of the finished jobs (estimate)"),
    Family("testbed_result_predicted_peak_bytes", ("run", "device"), "what was predicted for it"),
    Family("testbed_result_budget_bytes", ("run", "device"), "what it was allowed"),
    Family("testbed_runs", ("state",), "runs in the folder"),
    Family("testbed_exporter_refreshed_timestamp_seconds", ("part",), "when the exporter last looked, since 1970"),
)

FAMILIES = {family.name: family for family in (*DEVICE_FAMILIES, *RUN_FAMILIES, *RESULT_FAMILIES)}
