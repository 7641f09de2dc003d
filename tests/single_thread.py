"""One thread for tiny models: ``from single_thread import one_thread``.

Tiny matrices gain nothing from a second thread, and on a busy machine they wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def on_one_thread() -> Iterator[None]:
    """One thread inside; for fixtures of a module, which are set up before the fixture of each test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every test of the importing module runs on one thread; torch's own number comes back after it."""
    with on_one_thread():
        yield
