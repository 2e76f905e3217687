"""Where the files are that the package reads: inventory, dashboards, ….

Beside the code in an installed wheel (`testbed/package_data/`), in the top-level folder of the same name in a clone.
"""

from __future__ import annotations

from pathlib import Path

from testbed.errors import UsageError

PACKAGE = Path(__file__).parent


def data_folder(name: str) -> Path:
    """The folder of that name; raises UsageError when the installation lacks it."""
    places = (PACKAGE / "package_data" / name, PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise UsageError(
        f"the installation lacks its data folder {name!r}, looked for at {' and '.join(map(str, places))}; "
        f"install edge-testbed again"
    )
