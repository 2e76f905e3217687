"""The docstring corpus: what is read, what is left out, and what is held out."""

import errno
from collections import Counter
from pathlib import Path

import pytest

from testbed import docstrings
from testbed.data_sources import DOCSTRING_CLASSES
from testbed.docstrings import Docstring, corpus_hash, load_docstrings
from testbed.errors import DataError

LONG = "A text that is long enough to be kept, about one thing in particular: "


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """Two packages in the place of the installed ones."""
    root = tmp_path / "site"
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omicron")
    for package in ("one", "two"):
        for number in range(20):
            own = " ".join(f"{word}{chr(97 + number)}{package}" for word in words)
            write(root / package / f"module_{number}.py", f'"""{own}."""\n')
    monkeypatch.setattr(docstrings, "_roots", lambda: [(name, root / name) for name in ("one", "two")])
    return root


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        (f'"""{LONG}module."""', [f"{LONG}module."]),
        (f'class A:\n    """{LONG}class."""', [f"{LONG}class."]),
        (f'def f():\n    """{LONG}function."""', [f"{LONG}function."]),
        (f'async def f():\n    """{LONG}coroutine."""', [f"{LONG}coroutine."]),
        (f'class A:\n    def f(self):\n        """{LONG}\n\n        method."""', [f"{LONG}\n\nmethod."]),
        ('"""Too short."""', []),
        (f'x = """{LONG}no docstring"""', []),
        ("def broken(:", []),
        ("\0", []),
        (f'"""{LONG}\\d invalid escape."""', [f"{LONG}\\d invalid escape."]),
    ],
)
def test_a_file_gives_its_long_docstrings(tmp_path, source, texts):
    path = write(tmp_path / "module.py", source)
    found = docstrings._read_file(("package", "module.py", path))
    assert [text.text for text in found] == texts


def test_tests_and_vendored_installers_are_left_out(tmp_path):
    for name in ("json/decoder.py", "test/test_json.py", "idlelib/run.py", "site-packages/x.py"):
        write(tmp_path / name, "")
    assert [module for module, _ in docstrings._modules(tmp_path)] == ["json/decoder.py"]


def test_a_module_is_on_one_side_only_and_about_a_tenth_is_held_out():
    sides = [docstrings._is_held_out(f"package/module_{number}.py") for number in range(2000)]
    assert 0.08 < sum(sides) / len(sides) < 0.12
    assert sides == [docstrings._is_held_out(f"package/module_{number}.py") for number in range(2000)]


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ("the quick brown fox jumps over the lazy dog and runs away into the dark forest", 1),
        ("The quick, brown fox jumps over the lazy dog -- and runs away into the dark woods!", 1),
        ("an entirely different sentence about the weather in a small town by the sea", 2),
    ],
)
def test_near_duplicates_are_removed_across_modules(second, kept):
    first = "the quick brown fox jumps over the lazy dog and runs away into the dark forest"
    texts = [Docstring("a", "x.py", False, first), Docstring("b", "y.py", True, second)]
    assert len(list(docstrings._without_near_duplicates(texts))) == kept


def test_the_corpus_is_read_once_and_then_comes_from_the_cache(small_corpus, tmp_path):
    said = []
    first = load_docstrings(tmp_path / "cache", said.append)
    assert len(first) == 40
    assert len(said) == 1
    assert load_docstrings(tmp_path / "cache", said.append) == first
    assert len(said) == 1


def test_a_damaged_cache_is_told_and_read_again(small_corpus, tmp_path):
    first = load_docstrings(tmp_path)
    (cache,) = tmp_path.glob("*.jsonl")
    cache.write_text(cache.read_text()[:-20])
    said = []
    assert load_docstrings(tmp_path, said.append) == first
    assert "damaged" in said[0]
    assert len(cache.read_text().splitlines()) == len(first)


def test_the_hash_follows_the_content(small_corpus, tmp_path):
    texts = load_docstrings(tmp_path)
    assert corpus_hash(texts) == corpus_hash(texts)
    assert corpus_hash(texts) != corpus_hash(texts[1:])


def test_a_package_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(docstrings.PACKAGES, "nowhere", "no-such-distribution")
    with pytest.raises(DataError, match="'no-such-distribution' is not installed"):
        load_docstrings(tmp_path)


def test_a_package_without_its_source_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(docstrings.PACKAGES, "nowhere", "pytest")
    with pytest.raises(DataError, match="'nowhere' is installed, but not in"):
        load_docstrings(tmp_path)


def test_a_cache_that_cannot_be_written_is_told(small_corpus, tmp_path):
    blocked = write(tmp_path / "blocked", "")
    with pytest.raises(DataError, match="cannot be written"):
        load_docstrings(blocked)


def test_a_full_disk_leaves_no_partial_cache(small_corpus, tmp_path, monkeypatch):
    def full(_self, _target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        load_docstrings(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
@pytest.mark.beside
def test_the_installed_packages_give_the_default_classes(tmp_path):
    texts = load_docstrings(tmp_path)
    train = Counter(text.package for text in texts if not text.held_out)
    held_out = Counter(text.package for text in texts if text.held_out)
    largest = {package for package, _ in train.most_common(8)}
    assert largest == set(DOCSTRING_CLASSES)
    assert min(train[package] for package in largest) >= 1000
    assert min(held_out[package] for package in largest) >= 100
    modules = [{(text.package, text.module) for text in texts if text.held_out is side} for side in (False, True)]
    assert modules[0].isdisjoint(modules[1])
