"""docs/meters.md: every meter is in it, and every example is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from testbed.config import load_inventory
from testbed.meters import meter_class, names

PAGE = (Path(__file__).parent.parent.parent / "docs/meters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
INLINE = re.findall(r"`(meter: .*?)`", PAGE)


def written(folder, entry):
    device = {"kind": "generic", "profile": "raspberry_pi_5_8gb", "budget": {"memory": "1 GiB"}, **entry}
    (folder / "lab.yaml").write_text(yaml.safe_dump({"devices": {"board": device}}))
    return load_inventory(folder / "lab.yaml").devices[0]


@pytest.mark.parametrize("text", [text for text in BLOCKS + INLINE if text.startswith("meter")])
def test_an_example_is_a_meter(text, tmp_path):
    assert written(tmp_path, yaml.safe_load(text)).meters or text == "meter: none"


def test_the_inventory_is_one(tmp_path):
    (tmp_path / "lab.yaml").write_text(next(text for text in BLOCKS if "devices:" in text))
    orin, pi = load_inventory(tmp_path / "lab.yaml")
    assert [meter.name for meter in orin.meters] == ["ina3221"]
    assert [meter.name for meter in pi.meters] == ["rpi_pmic", "shelly"]


@pytest.mark.parametrize("name", names())
def test_every_meter_has_its_row(name):
    [row] = [line.split("|") for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    kind = meter_class(name)
    if name != "replay":  # whose recording says it
        assert f"`{kind.point}`" in row[3]
    if kind.where == "controller":
        assert row[2].strip() == ("yes" if kind.can_switch else "no")
