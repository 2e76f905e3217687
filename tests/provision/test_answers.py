"""What boards print, and what the facts make of it: every file of answers/ is a case."""

import pytest

from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.part import Answer
from tests.provision.tables import HERE, read

CASES = sorted(path.stem for path in (HERE / "answers").glob("*.yaml"))
PARTS = {part.name: part for part in FACTS_SCRIPT_PARTS}


def part_of(found, expected):
    """As much of what was found as the case tells."""
    if isinstance(expected, dict):
        return {key: part_of(found[key], value) for key, value in expected.items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    told = read(f"answers/{case}.yaml")
    found = PARTS[told["part"]].parse(Answer(told.get("files", {}), told.get("output", "")))
    assert part_of(found, told["facts"]) == told["facts"]
