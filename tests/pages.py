"""What the documentation's pages show, in their order: commands that a reader types, and files that a reader writes.

A file is a fenced block with a title (```yaml title="lab.yaml"), or YAML whose first line is a comment with its name.
A command is a line of a fenced block without a language, or of `console`: `testbed …` or `make …`, with `sudo` or the
folder of the environment before it.  Lines of blocks in another language are something else, such as output.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))

_BLOCK = re.compile(r"^```(?P<language>\w*)(?P<more>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_NAME_ABOVE = re.compile(r"# (\S+\.ya?ml)\n")
_TYPED = re.compile(r"^(?:\$ )?(?:sudo )?(?:\.venv/bin/)?(testbed|make|(?:\.venv/bin/)?python) (.*)$")
#: `testbed …` in running text or in a table's cell; `testbed <name>` is none.
_INLINE = re.compile(r"`testbed ([^`\n<]+)`")


@dataclass(frozen=True)
class ShownFile:
    """A file that the page tells to write."""

    name: str
    text: str


@dataclass(frozen=True)
class Typed:
    """A command that the page tells to type, without the program's name."""

    program: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join((self.program, *self.words))


def steps_of(page: Path) -> Iterator[ShownFile | Typed]:
    """Files and commands of the page, in their order."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, text = block["language"], block["text"]
        if title := _TITLE.search(block["more"]) or (language == "yaml" and _NAME_ABOVE.match(text)):
            yield ShownFile(title[1], text)
        elif language in {"", "console", "sh", "bash"}:
            yield from _typed(text)


def _typed(text: str) -> Iterator[Typed]:
    for line in text.replace("\\\n", " ").splitlines():
        if found := _TYPED.match(line):
            program, rest = found.groups()
            words = [rest.split()[0]] if program == "make" else shlex.split(rest, comments=True)
            yield Typed(program.rpartition("/")[2], tuple(words))


def commands_of(page: Path, program: str = "testbed") -> list[Typed]:
    """Only the commands of one program."""
    return [step for step in steps_of(page) if isinstance(step, Typed) and step.program == program]


def inline_commands(page: Path) -> list[str]:
    """What stands after `testbed` in code within the text, as it is written."""
    return _INLINE.findall(page.read_text(encoding="utf-8"))
