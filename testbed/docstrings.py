"""The default corpus: docstrings of a fixed list of packages and of the standard library.

Nothing is downloaded and nothing is shipped: the texts are read, with `ast` and without importing anything, from the
packages that a locked installation has anyway.  The split into *train* and *held-out* is by module, so that two
docstrings of one file never stand on both sides, and near-duplicates are removed over the whole corpus first, so that
a text copied from module to module does not leak either.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from testbed.errors import DataError

STDLIB = "stdlib"
#: Import name of every package whose docstrings are read; the distribution's name where it differs.
PACKAGES: dict[str, str] = {
    "torch": "torch",
    "transformers": "transformers",
    "sympy": "sympy",
    "networkx": "networkx",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "huggingface_hub": "huggingface-hub",
    "datasets": "datasets",
    "peft": "peft",
    "accelerate": "accelerate",
    "pyarrow": "pyarrow",
    "PIL": "pillow",
    "seaborn": "seaborn",
    "mpmath": "mpmath",
    "fsspec": "fsspec",
    "aiohttp": "aiohttp",
    "fontTools": "fonttools",
}
#: Parts of the standard library that are no library: tests, an editor, vendored installers.
STDLIB_LEFT_OUT = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"})
MIN_CHARACTERS = 60
HELD_OUT_SHARE = 0.1
#: Raise it whenever a change to this file changes the texts: a cache of an older format is then ignored.
FORMAT = 1
_SHINGLE_WORDS = 5
_NEAR_DUPLICATE = 0.6
_CHUNK_FILES = 64
_PROGRESS_FILES = 4000


@dataclass(frozen=True)
class Docstring:
    """One text: the package it comes from, its module (a path inside the package) and whether it is held out."""

    package: str
    module: str
    held_out: bool
    text: str


def load_docstrings(cache_dir: Path, say: Callable[[str], None] = lambda _: None) -> tuple[Docstring, ...]:
    """Read the corpus, from the cache if it was read before with the same package versions.

    Raises DataError when a package of the list is not installed, or the cache cannot be written.
    """
    cache = cache_dir / f"docstrings-{_versions_hash()}.jsonl"
    cached = _read_cache(cache, say)
    if cached is not None:
        return cached
    with _told_if_not_writable(cache_dir):  # before the reading, which takes a while
        cache_dir.mkdir(parents=True, exist_ok=True)
    say("reading docstrings from the installed packages (once; kept in the cache)")
    texts = tuple(_without_near_duplicates(_read_all(say)))
    _write_cache(cache, texts)
    return texts


def corpus_hash(texts: tuple[Docstring, ...]) -> str:
    """SHA-256 over every text with its package and module: what the record of a run keeps."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text.package}\0{text.module}\0{text.text}\0".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, say: Callable[[str], None]) -> tuple[Docstring, ...] | None:
    if not cache.is_file():
        return None
    try:
        with cache.open(encoding="utf-8") as lines:
            return tuple(Docstring(**json.loads(line)) for line in lines)
    except (OSError, ValueError, TypeError) as error:
        say(f"{cache} is damaged ({error}); reading the packages again")
        return None


def _write_cache(cache: Path, texts: tuple[Docstring, ...]) -> None:
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    with _told_if_not_writable(cache.parent):
        try:
            with partial.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(asdict(text)) + "\n" for text in texts)
            partial.replace(cache)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _told_if_not_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"data 'docstrings': the cache {folder} cannot be written ({error.strerror})") from None


def _versions_hash() -> str:
    versions = {name: _version(distribution) for name, distribution in PACKAGES.items()}
    versions[STDLIB] = ".".join(map(str, sys.version_info[:3]))
    return hashlib.sha256(json.dumps([FORMAT, versions], sort_keys=True).encode()).hexdigest()[:16]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"data 'docstrings': the package {distribution!r} is not installed, and its docstrings are part of the "
            f"corpus; install the locked versions (make demo, or pip install 'edge-testbed[controller]')"
        ) from None


def _read_all(say: Callable[[str], None]) -> Iterator[Docstring]:
    files = [(package, module, path) for package, root in _roots() for module, path in _modules(root)]
    # Spawned, because a fork of a process that has threads already (torch, tokenizers) may hang.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for number, texts in enumerate(pool.map(_read_file, files, chunksize=_CHUNK_FILES), 1):
            yield from texts
            if number % _PROGRESS_FILES == 0:
                say(f"read {number} of {len(files)} files")


def _roots() -> Iterator[tuple[str, Path]]:
    yield STDLIB, Path(sysconfig.get_path("stdlib"))
    libraries = [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]
    for name in PACKAGES:
        yield name, _folder(name, libraries)


def _folder(package: str, libraries: Sequence[Path]) -> Path:
    found = next((library / package for library in libraries if (library / package).is_dir()), None)
    if found is None:
        raise DataError(
            f"data 'docstrings': the package {package!r} is installed, but not in {libraries[0]}, where its source is "
            "looked for; install the locked versions into one virtual environment"
        )
    return found


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if not STDLIB_LEFT_OUT.intersection(module.parts):
            yield module.as_posix(), path


def _read_file(source: tuple[str, str, Path]) -> list[Docstring]:
    package, module, path = source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # what Python 3.11 says of the same escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            return []
        except OSError as error:
            raise DataError(f"data 'docstrings': {path} cannot be read ({error.strerror})") from None
    held_out = _is_held_out(f"{package}/{module}")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [Docstring(package, module, held_out, text) for text in texts if text and len(text) > MIN_CHARACTERS]


def _is_held_out(module: str) -> bool:
    fraction = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") / 2**64
    return fraction < HELD_OUT_SHARE


def _without_near_duplicates(texts: Iterable[Docstring]) -> Iterator[Docstring]:
    """Drop a text when most of its word shingles stood in the corpus already (containment, not only equality)."""
    seen: set[int] = set()
    for text in texts:
        shingles = _shingles(text.text)
        known = len(shingles & seen)
        if known < _NEAR_DUPLICATE * len(shingles):
            seen |= shingles
            yield text


def _shingles(text: str) -> set[int]:
    words = re.findall(r"[a-z]+", text.lower())
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return {zlib.crc32(" ".join(words[i : i + _SHINGLE_WORDS]).encode()) for i in range(count)}
