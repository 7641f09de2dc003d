"""Discovery: which heads and MLPs carry a behaviour."""

from pyarith.discovery.patching import fast_patch

__all__ = ["fast_patch"]
