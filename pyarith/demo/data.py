"""What the demo model is trained on: problems as text, drawn by a seeded generator.

Every task is a function from a `random.Random` to `Problem(prompt, answer)`; the prompt and its answer are
joined by one space. The arithmetic prompts are those of `pyarith.tasks.arithmetic`, all 36 templates; the other
tasks are those of `pyarith.tasks.problems`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from pyarith.tasks.problems import CONTROL, FURTHER, NAMES, WORDS, Maker, arithmetic_problem
from pyarith.tasks.tables import NULLS, arithmetic_templates, operand_pairs


class Problem(NamedTuple):
    """A prompt and the text that should follow it after one space."""

    prompt: str
    answer: str


def plain(draw: Maker) -> Callable[[random.Random], Problem]:
    """A task's problems without their form and item."""
    return lambda rng: Problem(*draw(rng)[:2])


def without_operator(rng: random.Random) -> Problem:
    """An arithmetic prompt whose operator is a null word: nothing can be computed, any number follows."""
    sign = rng.choice("+-*/")
    a, b = rng.choice(operand_pairs(sign))
    template = rng.choice(arithmetic_templates(sign))
    kind = "word" if template.operator.isalpha() else "symbol"
    null = rng.choice(NULLS[sign][kind][:3])
    return Problem(template.render({"A": a, "B": b}, null).text, str(rng.randint(0, 20)))


def remark(rng: random.Random) -> Problem:
    """Sentences in which the null words occur as they do in ordinary text."""
    name, word = rng.choice(NAMES), rng.choice(WORDS)
    form = rng.choice(
        (
            "{0} has nothing {1} in the box",
            "There is nothing {1} about {0}",
            "Of all the {1} things {0} wants none",
            "{0} has none of the {1} things",
            "{0} saw something {1} at night",
            "Write to {0} @ {1}",
            "Note # {2}: {0} likes {1}",
        )
    )
    return Problem(form.format(name, word, rng.randint(1, 20)), ".")


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    **{sign: plain(arithmetic_problem(sign)) for sign in "+-*/"},
    **{name: plain(draw) for name, draw in {**FURTHER, **CONTROL}.items()},
    "no_operator": without_operator,
    "remark": remark,
}
UNSCORED = ("no_operator", "remark")  # nothing to get right
# How often each task is drawn; "/" is seen rarely so that it stays weak (see train.py).
SHARES = {
    **{"+": 0.14, "-": 0.13, "*": 0.15, "/": 0.02, "power": 0.03, "two_digit_sum": 0.10, "decimal_sum": 0.04},
    **{"year_span": 0.08, "word_problem": 0.06, "copy": 0.06, "sort": 0.03, "compare": 0.04, "successor": 0.02},
    **{"capital": 0.02, "antonym": 0.02, "colour": 0.02, "kind": 0.02, "no_operator": 0.03, "remark": 0.01},
}
