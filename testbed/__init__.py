"""A testbed for federated fine-tuning of language models on small devices; `testbed.load(RUN)` gives a run's model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.trained import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: a device, which imports this package, has no store and no plan."""
    if name == "load":
        return import_module("testbed.trained").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
