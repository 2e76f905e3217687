"""One thread: the suite's models are tiny, and bit-for-bit equality is promised for the same number of threads."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def cheap_collection():
    """What is imported by now is never garbage: the collections after every job need not look at it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
