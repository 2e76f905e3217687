"""Who takes part and what each one trains: the largest submodel whose predicted peak fits the device's budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from testbed.errors import PlanError, UsageError
from testbed.inventory import Inventory
from testbed.job import REFUSED
from testbed.method import Method, ModelShape, Submodel, Workload
from testbed.model.footprint import Baseline, Footprint, predict
from testbed.quantities import bytes_text
from testbed.run import PLANNED, ClientPlan, Plan


def place_clients(inventory: Inventory) -> tuple[str, ...]:
    """The device of every client, in the order of the inventory: client i is on the i-th place."""
    return tuple(device.name for device in inventory for _ in range(device.clients))


def make_plan(
    method: Method,
    shape: ModelShape,
    work: Workload,
    inventory: Inventory,
    examples: Sequence[int],
    label_counts: Sequence[Sequence[int]],
    baselines: Mapping[str, Baseline],
) -> Plan:
    """Give every client the largest of the method's choices that fits; refuse those whom none fits.

    examples and label_counts are per client; baselines per device name (bytes of an empty trainer there).
    Raises UsageError when the method cannot do the task, PlanError when nobody can take part.
    """
    if work.task not in method.tasks:
        able = ", ".join(sorted(method.tasks))
        raise UsageError(f"{type(method).__name__} cannot do the task {work.task!r}; it can do {able}")
    method.check(shape, work)
    fits = _fits(method, shape, work, inventory, baselines)
    plan = Plan(
        tuple(
            replace(
                fits[name],  # the clients of a device share its budget, in turns
                index=index,
                device=name,
                examples=examples[index],
                label_counts=tuple(label_counts[index]) if label_counts else (),
            )
            for index, name in enumerate(place_clients(inventory))
        )
    )
    if not plan.taking_part:
        least = min(plan.refused, key=lambda client: (client.needed_bytes or 0) - client.budget_bytes)
        raise PlanError(
            f"no device can take part in this run: the nearest is {least.device}, {least.reason}. Give it a "
            f"larger budget in the inventory, or choose a smaller model, batch or length, or --checkpointing"
        )
    return plan


def _fits(
    method: Method, shape: ModelShape, work: Workload, inventory: Inventory, baselines: Mapping[str, Baseline]
) -> dict[str, ClientPlan]:
    """Device → its plan: fitted for itself, then as all of them agree."""
    works = {device.name: replace(work, accelerator=device.accelerator) for device in inventory}
    fits = {
        device.name: fit(method, shape, works[device.name], device.budget.memory_bytes, baselines[device.name])
        for device in inventory
    }
    fitted = {name: plan.submodel for name, plan in fits.items() if plan.submodel is not None}
    agreed = method.agree(tuple(fitted.values())) if fitted else ()
    for name, submodel in zip(fitted, agreed, strict=True):
        if submodel != fitted[name]:
            footprint = predict(method.phases(submodel, shape, works[name]), shape, works[name], baselines[name])
            fits[name] = _planned(submodel, footprint, fits[name].budget_bytes)
    return fits


def fit(method: Method, shape: ModelShape, work: Workload, budget_bytes: int, baseline: Baseline) -> ClientPlan:
    """The largest choice within the budget, or a refusal that names the bytes of the smallest one."""
    smallest: Footprint | None = None
    for submodel in method.choices(shape):
        footprint = predict(method.phases(submodel, shape, work), shape, work, baseline)
        if footprint.bytes <= budget_bytes:
            return _planned(submodel, footprint, budget_bytes)
        if smallest is None or footprint.bytes < smallest.bytes:
            smallest = footprint
    if smallest is None:
        raise UsageError(f"{type(method).__name__} offers no submodel for a model of {len(shape)} blocks")
    return _refused(smallest, budget_bytes, baseline)


def _planned(submodel: Submodel, footprint: Footprint, budget_bytes: int) -> ClientPlan:
    return ClientPlan(
        index=-1,
        device="",
        examples=0,
        budget_bytes=budget_bytes,
        outcome=PLANNED,
        submodel=submodel,
        predicted_bytes=footprint.bytes,
        predicted_peak_bytes=footprint.unreclaimable_bytes,
        predicted_phase=footprint.largest.name,
        parts={phase.name: dict(phase.parts) for phase in footprint.phases},
    )


def _refused(smallest: Footprint, budget_bytes: int, baseline: Baseline) -> ClientPlan:
    runtime = baseline.bytes + baseline.first_step_bytes + baseline.library_bytes
    if budget_bytes < runtime:
        reason = (
            f"its budget of {bytes_text(budget_bytes)} is below what the runtime takes without any model, "
            f"{bytes_text(runtime)}"
        )
    else:
        reason = (
            f"the smallest submodel of this method needs {bytes_text(smallest.bytes)} "
            f"(phase {smallest.largest.name}), its budget is {bytes_text(budget_bytes)}"
        )
    return ClientPlan(
        index=-1,
        device="",
        examples=0,
        budget_bytes=budget_bytes,
        outcome=REFUSED,
        needed_bytes=smallest.bytes,
        predicted_phase=smallest.largest.name,
        parts={phase.name: dict(phase.parts) for phase in smallest.phases},
        reason=reason,
    )


def refit(
    method: Method, shape: ModelShape, work: Workload, client: ClientPlan, baseline: Baseline, measured_bytes: int
) -> ClientPlan:
    """A smaller submodel for a client that ran out of memory, from what was measured.

    The measured peak over the prediction says by how much this device needs more than was predicted; the budget is
    scaled by that before the next choice is made.  A choice that is not smaller than the last one is passed over.
    """
    if client.submodel is None or client.predicted_peak_bytes is None:
        return client
    above = max(1, measured_bytes - baseline.bytes) / max(1, client.predicted_peak_bytes - baseline.bytes)
    scale = max(above, 1.0)
    current = client.submodel
    for submodel in _smaller(method.choices(shape), current):
        footprint = predict(method.phases(submodel, shape, work), shape, work, baseline)
        if baseline.bytes + scale * (footprint.bytes - baseline.bytes) <= 0.98 * client.budget_bytes:
            planned = _planned(submodel, footprint, client.budget_bytes)
            return replace(
                planned,
                index=client.index,
                device=client.device,
                examples=client.examples,
                label_counts=client.label_counts,
            )
    return replace(
        client,
        outcome=REFUSED,
        submodel=None,
        reason=f"it ran out of memory at {bytes_text(measured_bytes)} and no smaller submodel fits",
    )


def _smaller(choices: Iterable[Submodel], current: Submodel) -> Iterable[Submodel]:
    """The choices that come after the current one (choices come largest first)."""
    passed = False
    for submodel in choices:
        if passed:
            yield submodel
        passed = passed or submodel == current
