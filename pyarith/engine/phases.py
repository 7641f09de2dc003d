"""Names for the parts of a run and for its large tensors, heard only while someone listens (``engine.profiling``).

Without a listener a phase costs one look at a context variable, and so does a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class Listener(Protocol):
    """What hears phases. They do not nest."""

    def begin(self, phase: str) -> None:
        """A phase begins."""

    def end(self, phase: str) -> None:
        """It is over, perhaps by an error."""

    def label(self, name: str, tensor: Tensor) -> None:
        """What a tensor is for."""


# of a context: what another thread does meanwhile is no part of the run
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Tell these of every phase in the block."""
    token = _listeners.set((*_listeners.get(), *listeners))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a run, such as "capture"."""
    found = _listeners.get()
    for one in found:
        one.begin(name)
    try:
        yield
    finally:
        for one in reversed(found):
            one.end(name)


def label(name: str, tensor: Tensor) -> None:
    """Say what a new tensor is for, in an account of memory."""
    for one in _listeners.get():
        one.label(name, tensor)
