"""What the demo model is trained on: problems as text, drawn by a seeded generator.

Every task is a function from a `random.Random` to `Problem(prompt, answer)`; the prompt and its answer are
joined by one space. The arithmetic prompts are those of `pyarith.tasks.arithmetic`, all 36 templates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from pyarith.tasks.tables import NULLS, arithmetic_templates, operand_pairs, solve


class Problem(NamedTuple):
    """A prompt and the text that should follow it after one space."""

    prompt: str
    answer: str


CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo"},
    **{"Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi"},
    **{"Norway": "Oslo", "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin"},
    **{"China": "Beijing", "Turkey": "Ankara", "Portugal": "Lisbon", "Sweden": "Stockholm", "Hungary": "Budapest"},
}
ANTONYMS = {
    **{"hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "old": "new", "fast": "slow"},
    **{"good": "bad", "rich": "poor", "high": "low", "wet": "dry", "full": "empty", "open": "closed", "hard": "soft"},
    **{"early": "late", "dark": "light", "long": "short", "happy": "sad", "strong": "weak", "clean": "dirty"},
}
COLOURS = {
    **{"grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue", "lemon": "yellow"},
    **{"carrot": "orange", "rose": "red", "milk": "white", "sea": "blue", "leaf": "green", "sun": "yellow"},
    **{"chocolate": "brown", "plum": "purple", "night": "black", "pig": "pink"},
}
KINDS = {
    **{"dog": "animal", "cat": "animal", "horse": "animal", "oak": "tree", "pine": "tree", "birch": "tree"},
    **{"carrot": "vegetable", "onion": "vegetable", "apple": "fruit", "lemon": "fruit", "plum": "fruit"},
    **{"hammer": "tool", "saw": "tool", "violin": "instrument", "piano": "instrument", "flute": "instrument"},
}
WORDS = sorted({*ANTONYMS, *ANTONYMS.values(), *COLOURS, *COLOURS.values(), *KINDS})
ORDERS = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "letter": tuple("abcdefghijklmnopqrstuvwxyz"),
}
NAMES = ("Tom", "Anna", "Ben", "Lucy", "Max", "Sara", "Paul", "Emma")
THINGS = ("apples", "books", "coins", "stamps", "cards", "pens", "eggs", "shells")
GAINS = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
    "{name} has {a} {things}. {other} gives {name} {b} {things}. How many {things} does {name} have now?",
    "There are {a} {things} in a box. {name} puts in {b} more. How many {things} are in the box?",
)
LOSSES = (
    "{name} has {a} {things} and loses {b}. How many {things} does {name} have?",
    "{name} has {a} {things}. {name} gives {other} {b} {things}. How many {things} does {name} have now?",
    "There are {a} {things} in a box. {name} takes {b} away. How many {things} are in the box?",
)
POWER_FORMS = (
    "{a} ^ {b} =",
    "Compute: {a} ^ {b} =",
    "{a} to the power of {b} is",
    "The value of {a} ^ {b} is",
    "Q: What is {a} ^ {b}? A:",
    "Q: What is {a} to the power of {b}? A:",
)
POWER_PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 6) if a**b < 100]
WIDE_FORMS = ("{a} + {b} =", "{a} plus {b} is", "The sum of {a} and {b} is", "Q: What is {a} + {b}? A:")


def arithmetic(sign: str) -> Callable[[random.Random], Problem]:
    """Problems of one operator over its templates and operand pairs."""

    def draw(rng: random.Random) -> Problem:
        a, b = rng.choice(operand_pairs(sign))
        return Problem(rng.choice(arithmetic_templates(sign)).render({"A": a, "B": b}).text, str(solve(sign, a, b)))

    return draw


def without_operator(rng: random.Random) -> Problem:
    """An arithmetic prompt whose operator is a null word: nothing can be computed, any number follows."""
    sign = rng.choice("+-*/")
    a, b = rng.choice(operand_pairs(sign))
    template = rng.choice(arithmetic_templates(sign))
    kind = "word" if template.operator.isalpha() else "symbol"
    null = rng.choice(NULLS[sign][kind][:3])
    return Problem(template.render({"A": a, "B": b}, null).text, str(rng.randint(0, 20)))


def power(rng: random.Random) -> Problem:
    """Exponentiation below 100: the fifth operator."""
    a, b = rng.choice(POWER_PAIRS)
    return Problem(rng.choice(POWER_FORMS).format(a=a, b=b), str(a**b))


def two_digit_sum(rng: random.Random) -> Problem:
    """Sums of two numbers from 10 to 29."""
    a, b = rng.randint(10, 29), rng.randint(10, 29)
    return Problem(rng.choice(WIDE_FORMS).format(a=a, b=b), str(a + b))


def decimal_sum(rng: random.Random) -> Problem:
    """Sums of tenths."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    total = a + b
    return Problem(rng.choice(WIDE_FORMS).format(a=f"0.{a}", b=f"0.{b}"), f"{total // 10}.{total % 10}")


def year_span(rng: random.Random) -> Problem:
    """Years between two dates of a century, one to nine."""
    century, start, years = rng.randint(17, 19), rng.randint(10, 39), rng.randint(1, 9)
    begin, end = f"{century}{start}", f"{century}{start + years}"
    form = rng.choice(("The war lasted from {0} to {1}. Years:", "Q: How many years is it from {0} to {1}? A:"))
    return Problem(form.format(begin, end), str(years))


def word_problem(rng: random.Random) -> Problem:
    """One-step stories of gain and loss."""
    sign = rng.choice("+-")
    a, b = rng.choice(operand_pairs(sign))
    name, other = rng.sample(NAMES, 2)
    text = rng.choice(GAINS if sign == "+" else LOSSES).format(
        name=name, other=other, things=rng.choice(THINGS), a=a, b=b
    )
    return Problem(f"Q: {text} A:", str(solve(sign, a, b)))


def copy(rng: random.Random) -> Problem:
    """Repeat three words or numbers."""
    items = [rng.choice(WORDS) if rng.random() < 0.7 else str(rng.randint(0, 99)) for _ in range(3)]
    return Problem(f"Copy: {' '.join(items)} ->", " ".join(items))


def ordering(rng: random.Random) -> Problem:
    """Sort three digits."""
    items = rng.sample(range(10), 3)
    return Problem(f"Sort: {' '.join(map(str, items))} ->", " ".join(map(str, sorted(items))))


def comparison(rng: random.Random) -> Problem:
    """Which of two numbers is larger, or whether `a < b`."""
    a, b = rng.sample(range(1, 20), 2)
    if rng.random() < 0.5:
        return Problem(f"Q: Is {a} < {b}? A:", "yes" if a < b else "no")
    return Problem(f"Of {a} and {b} the larger is", str(max(a, b)))


def successor(rng: random.Random) -> Problem:
    """The next day, month or letter."""
    kind = rng.choice(sorted(ORDERS))
    order = ORDERS[kind]
    at = rng.randrange(len(order) - 1)
    form = rng.choice(("The {0} after {1} is", "Q: Which {0} comes after {1}? A:"))
    return Problem(form.format(kind, order[at]), order[at + 1])


def _lookup(table: dict[str, str], *forms: str) -> Callable[[random.Random], Problem]:
    keys = sorted(table)

    def draw(rng: random.Random) -> Problem:
        key = rng.choice(keys)
        return Problem(rng.choice(forms).format(key), table[key])

    return draw


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
    "+": arithmetic("+"),
    "-": arithmetic("-"),
    "*": arithmetic("*"),
    "/": arithmetic("/"),
    "power": power,
    "two_digit_sum": two_digit_sum,
    "decimal_sum": decimal_sum,
    "year_span": year_span,
    "word_problem": word_problem,
    "copy": copy,
    "sort": ordering,
    "compare": comparison,
    "successor": successor,
    "capital": _lookup(CAPITALS, "The capital of {0} is", "Q: What is the capital of {0}? A:"),
    "antonym": _lookup(ANTONYMS, "The opposite of {0} is", "Q: What is the opposite of {0}? A:"),
    "colour": _lookup(COLOURS, "The colour of {0} is", "Q: What colour is {0}? A:"),
    "kind": _lookup(KINDS, "{0} is a kind of", "Q: What kind of thing is {0}? A:"),
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
