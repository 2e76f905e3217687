"""*Compare*: the runs of the store side by side, with the figures of `testbed report`."""

from __future__ import annotations

from dashboards.panels import Json, bars, dashboard, now, number, table, variable

_RUNS = 'testbed_result_info{method=~"$method", state=~"$state", run=~"$run"}'
_ABOUT = "Runs are compared fairly only where seed, data and devices are the same; `testbed report` says where not."


def _of(metric: str) -> str:
    return f"{metric} * on (run) group_left (method, seed) {_RUNS}"


def _by_run(title: str, unit: str, metric: str, *also: str) -> Json:
    labels = "".join(f" {{{{{label}}}}}" for label in also)
    return bars(title, unit, now(_of(metric), f"{{{{method}}}}, seed {{{{seed}}}}{labels}"))


def compare() -> Json:
    variables = [
        variable("method", "Method", "label_values(testbed_result_info, method)"),
        variable("state", "State", "label_values(testbed_result_info, state)"),
        variable("run", "Run", 'label_values(testbed_result_info{method=~"$method", state=~"$state"}, run)'),
    ]
    rows = [
        (10, [(24, _table())]),
        (
            9,
            [
                (8, _by_run("Accuracy", "percentunit", "testbed_result_accuracy_ratio")),
                (8, _references()),
                (8, _loss()),
            ],
        ),
        (9, [(12, _peaks()), (12, _shares())]),
        (9, [(8, _by_run("Seconds", "s", "testbed_result_seconds")), (8, _phases()), (8, _traffic())]),
        (6, [(8, _energy()), (8, _failed()), (4, _count()), (4, _age())]),
    ]
    return dashboard("compare", "Compare", _ABOUT, variables, rows)


def _table() -> Json:
    labels = "run, method, model, data, seed, state, emulated"
    joined = f"on (run) group_left ({labels.removeprefix('run, ')}) {_RUNS}"

    def column(expr: str) -> Json:
        return now(f"max by ({labels}) ({expr} * {joined})")

    columns = {
        "rounds": ("none", column("testbed_result_rounds")),
        "accuracy": ("percentunit", column("testbed_result_accuracy_ratio")),
        "loss": ("none", column("testbed_result_loss")),
        "worst peak": ("bytes", column("max by (run) (testbed_result_peak_bytes)")),
        "seconds": ("s", column("testbed_result_seconds")),
        "up": ("bytes", column('sum by (run) (testbed_result_traffic_bytes{direction="up"})')),
        "down": ("bytes", column('sum by (run) (testbed_result_traffic_bytes{direction="down"})')),
        "energy": ("joule", column('testbed_result_energy_joules{valid="true", replayed="false"}')),
    }
    return table("Runs", columns, about=_ABOUT + " An empty cell was not measured.")


def _references() -> Json:
    return _by_run("… beside", "percentunit", "testbed_result_reference_accuracy_ratio", "reference")


def _loss() -> Json:
    return _by_run("Held-out loss", "none", "testbed_result_loss")


def _peaks() -> Json:
    legend = "{{method}}, seed {{seed}} {{device}}"
    peak = now(_of("testbed_result_peak_bytes"), f"{legend} peak")
    predicted = now(_of("testbed_result_predicted_peak_bytes"), f"{legend} predicted")
    return bars("Worst peak, and what was predicted", "bytes", peak, predicted)


def _shares() -> Json:
    share = "(testbed_result_peak_bytes / on (run, device) testbed_result_budget_bytes)"
    return _by_run("Worst peak as a share of the budget", "percentunit", share, "device")


def _phases() -> Json:
    return _by_run("Seconds of jobs by phase", "s", "testbed_result_phase_seconds", "phase")


def _traffic() -> Json:
    return _by_run("Traffic", "bytes", "testbed_result_traffic_bytes", "direction")


def _energy() -> Json:
    legend = "{{method}}, seed {{seed}}, valid {{valid}}, replayed {{replayed}}"
    about = "Gross, of all jobs.  Only what is valid and was measured stands in the table above."
    return bars("Energy", "joule", now(_of("testbed_result_energy_joules"), legend), about=about)


def _failed() -> Json:
    return _by_run("Jobs not finished", "none", "testbed_result_failed_jobs")


def _count() -> Json:
    return number("Runs in the folder", "none", now("testbed_runs", "{{state}}"))


def _age() -> Json:
    since = now("time() - testbed_exporter_refreshed_timestamp_seconds", "{{part}}")
    return number("Looked at … ago", "s", since, thresholds=(60, 300))
