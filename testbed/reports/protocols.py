"""The protocols by which methods are judged: those of EdgeFlowerTune (arXiv:2605.08636).

Memory is a budget of the inventory: a method that does not keep it has no run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.reports.exhibits import Figure, Section, Table
from testbed.reports.robustness import robustness_figure, robustness_table
from testbed.reports.to_target import target_runs_table, target_table
from testbed.reports.under_budget import budget_table

if TYPE_CHECKING:
    from testbed.reports.material import Material


def protocols(material: Material) -> Section | None:
    """None where no run was judged by one."""
    exhibits: list[Table | Figure] = [*protocol_tables(material)]
    if any(table.key == "robustness" for table in exhibits):
        exhibits.append(robustness_figure(material))
    return Section("protocols", "Protocols", (), tuple(exhibits)) if exhibits else None


def protocol_tables(material: Material) -> list[Table]:
    """Those of the protocols that runs were given."""
    tables = (budget_table(material), target_table(material), target_runs_table(material), robustness_table(material))
    return [table for table in tables if table.rows]
