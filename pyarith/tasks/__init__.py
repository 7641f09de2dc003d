"""Behaviours to look for in a model, each a function from a tokenizer to `PromptPairs`."""

from pyarith.tasks.arithmetic import CORRUPTIONS, arithmetic
from pyarith.tasks.further import ARITHMETIC_TASKS, CONTROL_TASKS, OPERATORS, draw_problems, problem_pairs
from pyarith.tasks.tables import STYLES

__all__ = [
    "ARITHMETIC_TASKS",
    "CONTROL_TASKS",
    "CORRUPTIONS",
    "OPERATORS",
    "STYLES",
    "arithmetic",
    "draw_problems",
    "problem_pairs",
]
