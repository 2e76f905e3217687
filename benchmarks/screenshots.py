"""Pictures of a report's page, as a wide screen and a phone show it, light and dark.

    testbed report -o report.html
    python benchmarks/screenshots.py report.html pictures
    python benchmarks/screenshots.py report.html pictures quality memory    # these sections only, pixel for pixel

Writes NAME-desktop-light.png, NAME-desktop-dark.png, NAME-phone-light.png and NAME-phone-dark.png: the whole page, at
two pixels for each of CSS; of a long page several, counted.  Needs Chromium, node and npm; the driver (playwright-core)
is installed into the cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from testbed.cache import cache_folder


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.browser.chromium import install, shoot, why_no_browser

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="what `testbed report -o` wrote")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("sections", nargs="*", help="sections of the page, by their anchors [default: the whole page]")
    args = parser.parse_args()
    if not args.page.is_file():
        parser.error(f"{args.page}: there is no such page; `testbed report -o {args.page}` writes one")
    packages = cache_folder() / "browser"
    if complaint := why_no_browser() or install(packages):
        sys.exit(complaint)
    args.folder.mkdir(parents=True, exist_ok=True)
    for picture in shoot(packages, args.page, args.folder, args.sections):
        print(picture)


if __name__ == "__main__":
    main()
