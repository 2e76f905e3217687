"""*Run*: a run while it is under way: rounds, loss, quality, phases, energy, outcomes."""

from __future__ import annotations

from dashboards.panels import Json, bars, curves, dashboard, now, number, over_time, table, variable

#: The run's id is a label of one series only; what the same process says is of that run.
_OF_RUN = 'on (instance) group_left (run) testbed_run_info{run=~"$run"}'
_DEVICE = '{device=~"$device"}'


def _of(metric: str) -> str:
    return f"{metric} * {_OF_RUN}"


def _sum(by: str, metric: str) -> str:
    return f"sum by ({by}) ({_of(metric)})"


def run() -> Json:
    variables = [
        variable("run", "Run", "label_values(testbed_run_info, run)"),
        variable("device", "Device", "label_values(testbed_device_state, device)"),
    ]
    rows = [
        (6, [(12, _runs()), (3, _round()), (3, _done()), (3, _accuracy_now()), (3, _failed())]),
        (9, [(12, _loss()), (12, _accuracy())]),
        (9, [(12, _local_loss()), (12, _peaks())]),
        (8, [(8, _phases()), (8, _outcomes()), (8, _traffic())]),
        (8, [(12, _round_seconds()), (12, _tokens())]),
        (8, [(12, _energy()), (12, _power())]),
        (6, [(12, _participants()), (12, _learning_rate())]),
    ]
    return dashboard("run", "Run", "One run, or several, while they are under way.", variables, rows)


def _runs() -> Json:
    columns = {
        "there": ("bool_yes_no", now('max by (run, method, model, data, seed, state) (testbed_run_info{run=~"$run"})')),
    }
    return table("Runs under way", columns, about="Finished runs are in Compare.")


def _round() -> Json:
    return number("Round", "none", now(_of("testbed_run_round"), "{{run}}"))


def _done() -> Json:
    share = "testbed_run_rounds_done / testbed_run_rounds_planned"
    return number("Rounds done", "percentunit", now(f"({share}) * {_OF_RUN}", "{{run}}"))


def _accuracy_now() -> Json:
    return number("Accuracy", "percentunit", now(_of("testbed_run_accuracy_ratio"), "{{run}}"))


def _failed() -> Json:
    failed = now(_sum("run", 'testbed_run_jobs_total{outcome!="finished"}'), "{{run}}")
    return number("Jobs not finished", "none", failed, thresholds=(1, 5))


def _loss() -> Json:
    held_out = over_time(_of("testbed_run_loss"), "{{run}} held out")
    train = over_time(_of("testbed_run_train_loss"), "{{run}} training")
    return curves("Loss", "none", held_out, train)


def _accuracy() -> Json:
    return curves("Held-out accuracy", "percentunit", over_time(_of("testbed_run_accuracy_ratio"), "{{run}}"))


def _local_loss() -> Json:
    return curves("Loss of local steps", "none", over_time(_of(f"testbed_device_loss{_DEVICE}"), "{{device}}"))


def _peaks() -> Json:
    peak = over_time(_of(f"testbed_device_peak_bytes{_DEVICE}"), "{{device}} peak")
    predicted = over_time(_of(f"testbed_device_predicted_peak_bytes{_DEVICE}"), "{{device}} predicted")
    budget = over_time(_of(f"testbed_device_budget_bytes{_DEVICE}"), "{{device}} budget")
    return curves("Peak of the job, predicted, and budget", "bytes", peak, predicted, budget, custom={"fillOpacity": 0})


def _phases() -> Json:
    return bars("Seconds by phase", "s", now(_sum("phase", f"testbed_run_phase_seconds_total{_DEVICE}"), "{{phase}}"))


def _outcomes() -> Json:
    jobs = now(_sum("outcome", f"testbed_run_jobs_total{_DEVICE}"), "{{outcome}}")
    return bars("Jobs by outcome", "none", jobs)


def _traffic() -> Json:
    traffic = _sum("device, direction", f"testbed_run_traffic_bytes_total{_DEVICE}")
    return bars("Traffic", "bytes", now(traffic, "{{device}} {{direction}}"))


def _round_seconds() -> Json:
    return curves("Seconds of a round", "s", over_time(_of("testbed_run_round_seconds"), "{{run}}"))


def _tokens() -> Json:
    speed = f"rate(testbed_run_tokens_total{_DEVICE}[$__rate_interval])"
    return curves("Tokens per second, over finished jobs", "none", over_time(_of(speed), "{{device}}"))


def _energy() -> Json:
    joules = over_time(_of(f"testbed_device_energy_joules_total{_DEVICE}"), "{{device}} {{rail}} ({{meter}})")
    return curves("Energy since the run began", "joule", joules)


def _power() -> Json:
    mean = over_time(
        _of(f"rate(testbed_device_energy_joules_total{_DEVICE}[$__rate_interval])"), "{{device}} {{rail}} ({{meter}})"
    )
    return curves("Power, from the energy", "watt", mean)


def _participants() -> Json:
    return curves("Participants", "none", over_time(_of("testbed_run_participants"), "{{run}}"))


def _learning_rate() -> Json:
    return curves("Learning rate", "none", over_time(_of("testbed_run_learning_rate"), "{{run}}"))
