"""Discovery: which heads and MLPs carry a behaviour."""

from pyarith.discovery.adaptive import TopHeads
from pyarith.discovery.discover import discover
from pyarith.discovery.knockout import knockout_curve
from pyarith.discovery.patching import fast_patch

__all__ = ["TopHeads", "discover", "fast_patch", "knockout_curve"]
