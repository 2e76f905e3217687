"""What mkdocs calls: the pages of the reference come from the code, so none is in docs/ and none can be out of date.

hooks: [testbed_docs/hooks.py]     # in mkdocs.yml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

# mkdocs loads this file by its path; `testbed_docs` is then found wherever mkdocs was started from.
sys.path.insert(0, str(Path(__file__).parent.parent))

from testbed_docs.pages import PAGES

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

_SEARCH_IN_FILES = "assets/search-in-files.js"


def on_config(config: MkDocsConfig) -> None:
    """Nothing is fetched from the network: a script of ours searches in files, and not one from elsewhere."""
    config.extra["polyfills"] = [_SEARCH_IN_FILES]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the reference."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
