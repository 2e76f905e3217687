"""The documentation site: it builds without a warning, fetches nothing, and its reference is that of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest

from testbed import errors
from testbed.cli import testbed_command as group
from testbed.config import DeviceEntry
from testbed.experiments.file import RunOptions
from testbed.exporter.families import FAMILIES
from testbed.meters import names as meters
from testbed.plugins import all_methods, device_kinds, setting_types
from testbed_docs.markdown import paragraphs, plain, table
from testbed_docs.pages import PAGES
from tests.pages import ROOT

#: What a page loads by itself; a link is followed by whoever reads.
LOADED = re.compile(
    r'<(?:script|img|iframe)[^>]*\ssrc="(?!data:)([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build(folder, ROOT / "mkdocs.yml")
    return folder


def build(folder, config):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder],
        cwd=folder.parent, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_page_is_built_and_none_loads_anything_from_elsewhere(site):
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    made = {page.relative_to(site) for page in site.rglob("*.html")}
    assert {str(page).replace("README", "index") for page in written} <= set(map(str, made))
    assert {f"reference/{name}.html" for name in PAGES} <= set(map(str, made))
    loaded = [found for page in site.rglob("*.html") for pair in LOADED.findall(page.read_text()) for found in pair]
    assert [address for address in loaded if address and "//" in address] == []
    assert any(address.endswith("search-in-files.js") for address in loaded)


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n\n[another](another.md), [a place](#nowhere)\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(config.replace("testbed_docs/", f"{ROOT}/testbed_docs/"))
    with pytest.raises(AssertionError) as told:
        build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert "another.md" in str(told.value)
    assert "#nowhere" in str(told.value)


def commands(within, context, before=""):
    for name in within.list_commands(context):
        command = within.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, context, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def test_the_reference_has_every_command_with_every_option():
    page = PAGES["commands"]()
    for name, command in commands(group, click.Context(group)):
        _, _, section = page.partition(f"## testbed {name} {{")
        section = section.partition("\n## ")[0]
        options = [each for each in command.params if isinstance(each, click.Option)]
        assert [way for each in options for way in each.opts if f"`{way}`" not in section] == []


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("inventory", list(DeviceEntry.model_fields)),
        ("experiment-file", list(RunOptions.model_fields)),
        ("methods", [name for method in all_methods().values() for name in setting_types(method)]),
        ("metrics", list(FAMILIES)),
        ("errors", [kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)]),
        ("profiles", [file.stem for file in (ROOT / "inventory/profiles").glob("*.yaml")]),
    ],
)
def test_the_reference_has_every_word_of_the_code(page, words):
    text = PAGES[page]()
    assert words
    assert [word for word in words if f"`{word}`" not in text] == []


@pytest.mark.parametrize(
    ("page", "names"), [("methods", sorted(all_methods())), ("meters", meters()), ("device-kinds", device_kinds())]
)
def test_the_reference_has_a_section_for_every_file(page, names):
    text = PAGES[page]()
    assert [name for name in names if not re.search(rf"^##+ {name}\b", text, re.MULTILINE)] == []


def test_text_of_the_code_stays_as_it_is_written():
    assert plain("a_b * <c> | `x_y|z`") == "a\\_b \\* \\<c> \\| `x_y\\|z`"
    assert plain("see https://example.org/a_b, and c_d") == "see https://example.org/a_b, and c\\_d"
    assert paragraphs("One.\n\n    key: value\n\nname  text") == "One.\n\n    key: value\n\nname text\n"
    assert table(("a",), [("b\nc",)]) == "| a |\n| --- |\n| b c |\n"
