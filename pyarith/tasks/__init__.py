"""Behaviours to look for in a model, each a function from a tokenizer to `PromptPairs`."""

from pyarith.tasks.arithmetic import CORRUPTIONS, arithmetic
from pyarith.tasks.tables import STYLES

__all__ = ["CORRUPTIONS", "STYLES", "arithmetic"]
