"""One thread: the suite's models are tiny, and bit-for-bit equality is promised for the same number of threads."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def cheap_collection():
    """What is there by now stays, or is little: the collections after every job of a test need not look at it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
