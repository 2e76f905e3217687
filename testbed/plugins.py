"""From a file's name to what is in it: methods and device kinds.  A new one is one new file; there is no list to keep.

A method is found through the entry-point group `testbed.methods`, whose entries name *packages*.  Every module of such
a package whose name has no leading underscore holds exactly one concrete `Method`, and the module's name is the
method's.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from testbed.errors import ConfigError, UsageError
from testbed.method import Method
from testbed.spelling import did_you_mean

METHODS_GROUP = "testbed.methods"
DEVICES_PACKAGE = "testbed.devices"


def all_methods() -> dict[str, type[Method]]:
    """Every method by its name; raises ConfigError for a plug-in that is broken."""
    return {name: method_in(module) for name, module in sorted(_method_modules().items())}


def sound_methods() -> tuple[dict[str, type[Method]], list[ConfigError]]:
    """Every method that can be had, and what is wrong with the others: one broken file does not hide the rest."""
    found, broken = {}, []
    for name, module in sorted(_method_modules().items()):
        try:
            found[name] = method_in(module)
        except ConfigError as error:  # noqa: PERF203
            broken.append(error)
    return found, broken


def find_method(name: str) -> type[Method]:
    """The method of that name; raises UsageError with the nearest right name."""
    modules = _method_modules()
    if name not in modules:
        raise UsageError(f'there is no method "{name}"; {did_you_mean(name, modules)}')
    return method_in(modules[name])


def method_in(module_name: str) -> type[Method]:
    """The one concrete Method that the module itself defines; raises ConfigError when it is broken."""
    module = _import(module_name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
    ]
    concrete = [method for method in found if not inspect.isabstract(method)]
    if len(concrete) == 1:
        return concrete[0]
    unfinished = [f"{method.__name__} (lacks {', '.join(sorted(method.__abstractmethods__))})" for method in found]
    names = [method.__name__ for method in concrete] or unfinished
    raise ConfigError(
        f"{module.__file__}: expected exactly one concrete Method, got {', '.join(names) or 'none'}; "
        f"a module that is no method has a name with a leading underscore"
    )


def restore_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method with the settings of a record or a job (JSON has lists where settings are tuples)."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return find_method(name)(**values)
    except TypeError as error:
        raise UsageError(f"method {name} does not take these settings: {error}") from None


def make_method(name: str, settings: Mapping[str, str]) -> Method:
    """The method with its settings read from text (`--set rank=16`); raises UsageError for a wrong name or type."""
    method = find_method(name)
    kinds = setting_types(method)
    for setting in settings:
        if setting not in kinds:
            raise UsageError(f'method {name} has no setting "{setting}"; {did_you_mean(setting, kinds)}')
    values = {setting: _read(name, setting, text, kinds[setting]) for setting, text in settings.items()}
    try:
        return method(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"method {name}: {error}") from None


def setting_types(method: type[Method]) -> dict[str, Any]:
    """The type of every setting, in the order of the class."""
    try:
        hints = typing.get_type_hints(method)
    except NameError as error:
        raise ConfigError(
            f"{inspect.getfile(method)}: expected settings of types that exist when it runs, got {error}"
        ) from None
    return {field.name: hints[field.name] for field in dataclasses.fields(method) if field.init}


def type_text(kind: Any) -> str:
    """A setting's type in words: "int", "one of blocks, parts", "int or none"."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if typing.get_origin(kind) is tuple:
        return f"{type_text(options[0])}, {type_text(options[0])}, …"
    if _is_union(kind):
        return " or ".join(type_text(option) for option in options)
    return {type(None): "none", bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        kind, str(kind)
    )


def device_kinds() -> tuple[str, ...]:
    """The names of the device kinds, without importing them."""
    return tuple(sorted(name.rpartition(".")[2] for name in _modules_of(DEVICES_PACKAGE)))


def _method_modules() -> dict[str, str]:
    """Module name by method name, over all packages that offer methods."""
    modules: dict[str, str] = {}
    for package in sorted({entry.value for entry in importlib.metadata.entry_points(group=METHODS_GROUP)}):
        for module in _modules_of(package):
            name = module.rpartition(".")[2]
            if name in modules:
                raise ConfigError(f'two packages offer a method "{name}": {modules[name]} and {module}; rename one')
            modules[name] = module
    if not modules:
        raise ConfigError(
            f"no installed package offers methods (entry-point group {METHODS_GROUP}); install edge-testbed"
        )
    return modules


def _modules_of(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(f"entry-point group {METHODS_GROUP}: expected a package, got {package!r}, which is none")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return [f"{package}.{module.name}" for module in found if not module.name.startswith("_")]


def _import(module_name: str) -> types.ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a plug-in raises is told in one line
        spec = importlib.util.find_spec(module_name)
        place = module_name if spec is None else spec.origin
        raise ConfigError(
            f"{place}: expected a module that can be imported, got {type(error).__name__}: {error}"
        ) from error


def _read(method: str, setting: str, text: str, kind: Any) -> Any:
    try:
        return _value(text.strip(), kind)
    except ValueError:
        raise UsageError(f'method {method}: {setting}: expected {type_text(kind)}, got "{text}"') from None


def _value(text: str, kind: Any) -> Any:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return _one_of(text, options)
    if typing.get_origin(kind) is tuple:
        return tuple(_value(part.strip(), options[0]) for part in text.split(",") if part.strip())
    if _is_union(kind):
        return _first_that_fits(text, options)
    readers: dict[Any, Callable[[str], Any]] = {type(None): _none, bool: _bool, int: int, float: _float, str: str}
    if kind not in readers:
        raise ValueError(text)
    return readers[kind](text)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in {typing.Union, types.UnionType}


def _one_of(text: str, options: Iterable[Any]) -> Any:
    for option in options:
        if str(option) == text:
            return option
    raise ValueError(text)


def _first_that_fits(text: str, kinds: Iterable[Any]) -> Any:
    first, *others = sorted(kinds, key=lambda kind: kind is str)  # text fits everything: it comes last
    try:
        return _value(text, first)
    except ValueError:
        if not others:
            raise
        return _first_that_fits(text, others)


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]
