import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal, Optional

import pytest

from testbed import plugins
from testbed.errors import ConfigError, UsageError
from testbed.method import Method

BASE = """
from dataclasses import dataclass
from typing import Literal, Optional
from testbed.method import Method

class Whole(Method):
    def choices(self, shape): ...
    def phases(self, submodel, shape, work): ...
    def start(self, base, work, clients, seed): ...
    def order(self, state, base, clients, round_index): ...
    def combine(self, state, base, received): ...
    def export(self, state, base, work, folder): ...
    def mount(self, built, tensors): ...
    def work(self, workplace): ...
"""
MINE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
from lab_methods._base import Whole

@dataclass(frozen=True)
class Mine(Whole):
    \"\"\"Does what the lab needs.\"\"\"
    rank: int = 8
    rate: float = 0.5
    dropout: bool = False
    note: str = ""
    order_by: Literal["size", "name"] = "size"
    targets: tuple[str, ...] = ("q_proj",)
    sizes: tuple[int, ...] = (1,)
    limit: int | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A lab's own package of methods, installed beside ours; gives a function that adds a module to it."""
    package = tmp_path / "lab_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_base.py").write_text(BASE)
    (package / "mine.py").write_text(MINE)
    installed = tmp_path / "lab_methods-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-methods\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[testbed.methods]\nlab = lab_methods\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name, text: (package / f"{name}.py").write_text(text)
    for module in [name for name in sys.modules if name.partition(".")[0] == "lab_methods"]:
        del sys.modules[module]


def test_a_new_file_is_a_new_method(lab):
    assert plugins.find_method("mine").__name__ == "Mine"
    assert {"mine", "lora"} <= set(plugins._method_modules())


def test_modules_with_an_underscore_are_no_methods(lab):
    assert "_base" not in plugins._method_modules()


def test_an_unknown_method_is_refused_with_the_nearest_right_name(lab):
    with pytest.raises(UsageError, match=r'there is no method "loar"; did you mean "lora"\? There are: '):
        plugins.find_method("loar")


BROKEN = {
    "an import error": (
        "import nothing_of_that_name",
        "a module that can be imported, got ModuleNotFoundError: No mod",
    ),
    "a syntax error": ("class:", "a module that can be imported, got SyntaxError"),
    "an exception": ("1 / 0", "a module that can be imported, got ZeroDivisionError"),
    "no method": ("from lab_methods._base import Whole", "exactly one concrete Method, got none"),
    "two methods": (
        "from lab_methods._base import Whole\nclass A(Whole): ...\nclass B(Whole): ...",
        "exactly one concrete Method, got A, B",
    ),
    "an unfinished method": (
        "from lab_methods._base import Method\nclass A(Method): ...",
        r"exactly one concrete Method, got A \(lacks combine, ",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_one_clear_message(case, lab):
    text, message = BROKEN[case]
    lab("bad", text)
    with pytest.raises(ConfigError, match=rf"lab_methods/bad\.py: expected {message}"):
        plugins.find_method("bad")
    assert plugins.find_method("mine").__name__ == "Mine", "the others are still found"


def test_a_list_has_the_sound_ones_and_says_what_is_wrong_with_the_others(lab):
    lab("bad", "import nothing_of_that_name")
    found, broken = plugins.sound_methods()
    assert {"mine", "lora"} <= set(found)
    assert "bad" not in found
    assert [str(error).partition(": expected")[0].rpartition("/")[2] for error in broken] == ["bad.py"]


def test_two_packages_may_not_offer_the_same_name(lab):
    lab("lora", MINE)
    with pytest.raises(ConfigError, match=r'two packages offer a method "lora": lab_methods\.lora and m'):
        plugins.find_method("mine")


SETTINGS = {
    "rank": ("16", 16),
    "rate": ("1e-3", 0.001),
    "dropout": ("yes", True),
    "note": ("a b", "a b"),
    "order_by": ("name", "name"),
    "targets": ("q_proj, v_proj", ("q_proj", "v_proj")),
    "sizes": ("1,2", (1, 2)),
    "limit": ("3", 3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_to_their_type(name, lab):
    text, value = SETTINGS[name]
    assert getattr(plugins.make_method("mine", {name: text}), name) == value


def test_an_optional_setting_can_be_none(lab):
    assert plugins.make_method("mine", {"limit": "none"}).limit is None


def test_settings_left_out_keep_their_defaults(lab):
    assert plugins.make_method("mine", {}) == plugins.find_method("mine")()


WRONG = {
    "rank": ("many", "rank: expected a whole number, got"),
    "rate": ("fast", "rate: expected a number, got"),
    "dropout": ("maybe", "dropout: expected true or false, got"),
    "order_by": ("colour", "order_by: expected one of size, name, got"),
    "sizes": ("1,two", "sizes: expected a whole number, a whole number, …, got"),
    "limit": ("much", "limit: expected a whole number or none, got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_of_the_wrong_type_is_refused(name, lab):
    text, message = WRONG[name]
    with pytest.raises(UsageError, match=f'method mine: {message} "{text}"'):
        plugins.make_method("mine", {name: text})


def test_an_unknown_setting_is_refused_with_the_nearest_right_name(lab):
    with pytest.raises(UsageError, match=r'method mine has no setting "rnak"; did you mean "rank"\?'):
        plugins.make_method("mine", {"rnak": "8"})


def test_what_the_method_itself_refuses_is_a_message_too(lab):
    with pytest.raises(UsageError, match="method mine: rank: expected at least 1, got 0"):
        plugins.make_method("mine", {"rank": "0"})


def test_annotations_in_either_spelling_are_understood():
    @dataclass(frozen=True)
    class Spelled(Method):
        __abstractmethods__ = frozenset()
        old: Optional[int] = None  # noqa: UP045 -- the older spelling is what is tested
        choice: Literal[1, 2] = 1

    kinds = plugins.setting_types(Spelled)
    assert plugins.type_text(kinds["old"]) == "a whole number or none"
    assert plugins._value("2", kinds["choice"]) == 2


def test_every_method_of_ours_is_listed_without_torch():
    code = (
        "import sys, json; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'numpy', 'peft']))\n"
        "from testbed.plugins import all_methods, setting_types, make_method\n"
        "methods = all_methods()\n"
        "print(json.dumps({name: list(setting_types(method)) for name, method in methods.items()}))\n"
        "assert all(make_method(name, {}) == method() for name, method in methods.items())\n"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert {"lora", "fedpruner"} <= set(found)
    assert "rank" in found["lora"]
