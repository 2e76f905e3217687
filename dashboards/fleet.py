"""*Fleet*: the boards, whether they answer, what they draw, what they hold, how hot they are."""

from __future__ import annotations

from dashboards.panels import Json, curves, dashboard, now, over_time, states, table, variable

_ONE = '{device=~"$device"}'


def _least(metric: str) -> str:
    """Of a device that a run and the exporter both tell of, the worse word."""
    return f"min by (device) ({metric}{_ONE})"


def _most(metric: str) -> str:
    return f"max by (device) ({metric}{_ONE})"


def fleet() -> Json:
    device = variable("device", "Device", "label_values(testbed_device_budget_bytes, device)")
    rows = [
        (9, [(16, _boards()), (8, _alerts())]),
        (8, [(12, _what_each_is_at()), (12, _throttled())]),
        (9, [(12, _power()), (12, _energy())]),
        (9, [(12, _memory()), (12, _headroom())]),
        (8, [(8, _temperature()), (8, _accelerator()), (8, _meters())]),
        (7, [(12, _disk()), (12, _kinds())]),
    ]
    return dashboard("fleet", "Fleet", "The devices of the testbed as they stand now.", [device], rows)


def _boards() -> Json:
    age = f"time() - {_most('testbed_device_last_contact_timestamp_seconds')}"
    columns = {
        "answers": ("bool_yes_no", now(_least("testbed_device_up"))),
        "held by a run": ("bool_yes_no", now(_most("testbed_device_held"))),
        "last word": ("s", now(age)),
        "budget": ("bytes", now(_least("testbed_device_budget_bytes"))),
        "memory now": ("bytes", now(_most("testbed_device_memory_bytes"))),
        "peak of the job": ("bytes", now(_most("testbed_device_peak_bytes"))),
        "temperature": ("celsius", now(_most("testbed_device_temperature_celsius"))),
        "held back": ("bool_yes_no", now(_most("testbed_device_throttled"))),
    }
    return table("Boards", columns, about="An empty cell was not measured.")


def _alerts() -> Json:
    firing = now('ALERTS{alertstate="firing", alertname=~"Device.*|Run.*"}')
    return table("What needs a look", {"firing": ("none", firing)}, hidden=["alertstate", "severity"])


def _what_each_is_at() -> Json:
    at = over_time(f"max by (device, state) (testbed_device_state{_ONE})", "{{device}} {{state}}")
    return states("What each is at", at, texts={1: ("at it", "blue")})


def _throttled() -> Json:
    by = over_time(f"max by (device, reason) (testbed_device_throttled_by{_ONE})", "{{device}} {{reason}}")
    return states("Held back by", by, texts={0: ("no", "green"), 1: ("yes", "red")}, about="No row: it never was.")


def _power() -> Json:
    rails = over_time(f"testbed_device_power_watts{_ONE}", "{{device}} {{rail}} ({{meter}})")
    mean = over_time(f"device:testbed_device_power_watts:avg1m{_ONE}", "{{device}} {{rail}} ({{meter}}), mean of 1 min")
    return curves("Power by rail", "watt", rails, mean, about="By the boards' own names; rails are never added up.")


def _energy() -> Json:
    total = over_time(f"testbed_device_energy_joules_total{_ONE}", "{{device}} {{rail}} ({{meter}})")
    return curves("Energy since the run began", "joule", total, about="Integrated on the device, not by Prometheus.")


def _memory() -> Json:
    used = over_time(_most("testbed_device_memory_bytes"), "{{device}} unreclaimable")
    budget = over_time(_least("testbed_device_budget_bytes"), "{{device}} budget")
    predicted = over_time(_most("testbed_device_predicted_peak_bytes"), "{{device}} predicted peak")
    return curves("Memory against budget and prediction", "bytes", used, budget, predicted, custom={"fillOpacity": 0})


def _headroom() -> Json:
    return curves("Headroom", "bytes", over_time(f"device:testbed_device_headroom_bytes:now{_ONE}", "{{device}}"))


def _temperature() -> Json:
    hottest = over_time(_most("testbed_device_temperature_celsius"), "{{device}}")
    return curves("Temperature", "celsius", hottest)


def _accelerator() -> Json:
    return curves("Accelerator memory", "bytes", over_time(_most("testbed_device_accelerator_bytes"), "{{device}}"))


def _meters() -> Json:
    info = now(f"max by (device, meter, point, replayed) (testbed_meter_info{_ONE})")
    about = "Replayed: a recording was played, nothing was measured."
    return table("Meters", {"there": ("bool_yes_no", info)}, about=about)


def _disk() -> Json:
    return curves("Free disk", "bytes", over_time(_least("testbed_device_disk_free_bytes"), "{{device}}"))


def _kinds() -> Json:
    return table("Inventory", {"there": ("bool_yes_no", now(f"testbed_device_info{_ONE}"))})
