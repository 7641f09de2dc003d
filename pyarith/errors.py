"""Exceptions of pyarith: one base class, and each error also is the built-in it would be elsewhere.

A message names the argument, what was expected, what came, and what to do. `check` is the shared way
to raise one from a condition.
"""

from __future__ import annotations


class PyarithError(Exception):
    """Base of every error that pyarith raises on purpose."""


class InputError(PyarithError, ValueError):
    """An argument has a wrong value, shape or dtype."""


class InputTypeError(PyarithError, TypeError):
    """An argument is of a wrong type (a model, a tensor or a tokenizer was expected)."""


class AlignmentError(InputError):
    """Prompts, corrupted prompts and answers do not line up token by token."""


class UnsupportedModelError(PyarithError, ValueError):
    """The model cannot be described by a family spec, or is placed or wrapped in a way not supported."""


class SelfCheckError(PyarithError, RuntimeError):
    """Rows recomposed from the family spec do not reproduce the model's own numbers."""


class NonFiniteError(PyarithError, RuntimeError):
    """NaN or infinity appeared in a run."""


class MemoryBudgetError(PyarithError, ValueError):
    """The memory budget is too small for one row; the message says the smallest that works."""


class StorageError(PyarithError, OSError):
    """A file could not be written to its end; what was there before is still there."""


class RankError(PyarithError, RuntimeError):
    """A rank of a distributed run is gone, ended with an error, or differs from the others; the message names it."""


class BackendError(PyarithError, RuntimeError):
    """A backend asked for by name cannot run; the message says why."""


class NotAvailableError(PyarithError, ImportError):
    """An optional dependency or a file that is not here is needed."""


def check(condition: bool, message: str, error: type[PyarithError] = InputError) -> None:
    """Raise ``error(message)`` unless ``condition`` holds."""
    if not condition:
        raise error(message)
