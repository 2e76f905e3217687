"""A small report made by hand, with every kind of exhibit and with names that are not meant well."""

from __future__ import annotations

from testbed.reports.exhibits import (
    BARS,
    CURVES,
    DOTS,
    SPANS,
    Axis,
    Column,
    Figure,
    Point,
    Report,
    Section,
    Series,
    Span,
    Table,
    bytes_column,
    figure_column,
    name_column,
    seconds_column,
)
from testbed.statistics import estimate

MIB = 1 << 20
EVIL = 'pi & <script>alert("1")</script> $x_1$'
DEVICES = ("jetson_orin_nano_8gb", "raspberry_pi_5", EVIL)
METHODS = ("lora", "fedpruner", "_mine")
LONG = (
    "the kernel killed the trainer for memory in the phase train, at 512 MiB of 512 MiB; `--set rank=4` needs 480 MiB"
)


def table(key: str = "quality") -> Table:
    columns = (
        name_column("method", "Method"),
        figure_column("accuracy", "Accuracy"),
        bytes_column("peak_bytes", "Worst peak"),
        seconds_column("seconds", "Time"),
        Column("capped", "Capped", lambda value: "yes" if value else "no", number=False),
        name_column("remark", "Remark"),
    )
    rows = (
        ("lora", estimate([0.65, 0.66, 0.7]), 512 * MIB, 12.345678901234567, True, "100 % of it_all"),
        (EVIL, estimate([0.6, 0.62]), 300 * MIB, None, False, LONG),
        ("fedpruner", estimate([]), None, 0.0, None, "a | b"),
    )
    return Table(key, "Quality over seeds", "Mean ± half of the 95 % interval.", columns, rows, ("Two give none.",))


def curves(count: int = 2, key: str = "accuracy-over-seconds") -> Figure:
    """The last series has one value only, the one before a gap."""
    series = [
        Series(
            METHODS[index] if index < len(METHODS) else f"method {index}",
            tuple(
                Point(10.0 * at, 0.2 + 0.05 * at + 0.01 * index, 0.15 + 0.05 * at, 0.26 + 0.05 * at) for at in range(12)
            ),
        )
        for index in range(count)
    ]
    gap = Series("gap", (Point(0.0, 0.2), Point(10.0, None), Point(20.0, 0.3, 0.2, 0.4)))
    return Figure(
        key=key,
        title="Accuracy over time",
        caption="Mean over seeds.",
        kind=CURVES,
        x=Axis("Time (s)"),
        y=Axis("Accuracy"),
        table=table(f"{key}-data"),
        series=(*series, gap, Series("empty", (Point(0.0, None),))),
        lines=(("majority class", 0.125), ("no fine-tuning", 0.14)),
        notes=("Seconds without evaluation.",),
    )


def peaks() -> Figure:
    series: list[Series] = []
    for index, method in enumerate(METHODS[:2]):
        ours = [(480 - 60 * index + 40 * at) * MIB for at in range(len(DEVICES))]
        points = [Point(name, y, y - 9 * MIB, y + 20 * MIB) for name, y in zip(DEVICES, ours, strict=True)]
        series += [
            Series(method, tuple(points)),
            Series(f"{method}, predicted", tuple(Point(name, 1.02 * y) for name, y in zip(DEVICES, ours, strict=True)),
                   predicts=method),
        ]  # fmt: skip
    ticks = tuple((name, "budget", (600 + 20 * at) * MIB) for at, name in enumerate(DEVICES))
    y = Axis("Peak memory (MiB)", MIB)
    numbers = table("peaks-data")
    return Figure("peaks", "Peaks", "Worst job.", DOTS, Axis(""), y, numbers, tuple(series), ticks=ticks)


def bars() -> Figure:
    series = tuple(
        Series(phase, tuple(Point(f"{method} on {name}", 3.0 + at) for method in METHODS for name in DEVICES))
        for at, phase in enumerate(("load", "train", "send"))
    )
    y = Axis("Energy (J)", start_at_zero=True)
    return Figure("energy", "Energy by phase", "Gross.", BARS, Axis(""), y, table("energy-data"), series)


def spans() -> Figure:
    found = []
    for at, name in enumerate(DEVICES):
        found += [
            Span(name, 0.0, 1.0, "load"),
            Span(name, 1.0, 3.0 + at, "train"),
            Span(name, 3.0 + at, 6.0, "waiting"),
        ]
    x = Axis("Time (s)", start_at_zero=True)
    return Figure("time-line", "Round 1", "Who waited.", SPANS, x, Axis(""), table("line-data"), spans=tuple(found))


def wide() -> Table:
    columns = (name_column("run", "Run"), *(figure_column(f"figure_{at}", f"A figure {at}") for at in range(16)))
    rows = tuple((f"lora-20260314-15092{row}-5f3a", *(row + 0.1 * at for at in range(16))) for row in range(4))
    return Table("runs", "Every run", "As the CSV has it.", columns, rows)


def report() -> Report:
    return Report(
        title=f"Two methods on {EVIL}",
        subtitle="three seeds",
        sections=(
            Section("run", "What was run", ("One paragraph.", f"Another one of {EVIL}."), (wide(),)),
            Section("quality", "Quality", (), (table(), curves())),
            Section("memory", "Memory", (), (peaks(),)),
            Section("energy", "Energy", (), (bars(),)),
            Section("time", "Time", ("A section may be text and a figure.",), (spans(),)),
            Section("outcomes", "Outcomes", ("Everything finished.",)),
        ),
        facts=(("testbed", "0.0"), ("devices", EVIL)),
        order=METHODS,
    )
