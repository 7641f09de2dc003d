"""What was installed when a number was made."""

from __future__ import annotations

import platform
from importlib import metadata

from pyarith import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib")


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that can change a number; None where one is not installed."""
    found: dict[str, str | None] = {"pyarith": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
