"""Programs that some tests look through."""

from __future__ import annotations

import os

import pytest

from testbed.programs import find


def need(*programs: str) -> None:
    """Where they are lacking there is nothing to see, and in CI that is a failure."""
    lacking = [program for program in programs if find(program) is None]
    if lacking:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{', '.join(lacking)} not installed")
