"""Further tasks as plain problems: a prompt, and the text that should follow it after one space.

One arithmetic task per change of format (another operator, two digits, decimals, years, stories), and control tasks
that need no arithmetic. Each maker is a function from a `random.Random` to `Drawn`; the demo model is trained on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from pyarith.tasks.tables import arithmetic_templates, operand_pairs, solve
from pyarith.tasks.templates import Rendered, Span, Template


class Drawn(NamedTuple):
    """A problem with the number of its form and what it is about, apart from the form (`3,5`, `France`).

    `roles` says at which characters its operands and its operator stand, where it has some.
    """

    prompt: str
    answer: str
    form: str
    item: str
    roles: tuple[tuple[str, Span], ...] = ()


Maker = Callable[[random.Random], Drawn]

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
# Forms are templates (see `tasks.templates`): {A} and {B} are the operands, the operator stands in square brackets.
GAINS = (
    "{name} has {A} {things} and gets {B} more. How many {things} does {name} have?",
    "{name} has {A} {things}. {other} gives {name} {B} {things}. How many {things} does {name} have now?",
    "There are {A} {things} in a box. {name} puts in {B} more. How many {things} are in the box?",
)
LOSSES = (
    "{name} has {A} {things} and loses {B}. How many {things} does {name} have?",
    "{name} has {A} {things}. {name} gives {other} {B} {things}. How many {things} does {name} have now?",
    "There are {A} {things} in a box. {name} takes {B} away. How many {things} are in the box?",
)
POWER_FORMS = (
    "{A} [^] {B} =",
    "Compute: {A} [^] {B} =",
    "{A} to the [power] of {B} is",
    "The value of {A} [^] {B} is",
    "Q: What is {A} [^] {B}? A:",
    "Q: What is {A} to the [power] of {B}? A:",
)
POWER_PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 6) if a**b < 100]
WIDE_FORMS = ("{A} [+] {B} =", "{A} [plus] {B} is", "The [sum] of {A} and {B} is", "Q: What is {A} [+] {B}? A:")
YEAR_FORMS = ("The war lasted from {A} to {B}. Years:", "Q: How many years is it from {A} to {B}? A:")
SUCCESSOR_FORMS = ("The {0} after {1} is", "Q: Which {0} comes after {1}? A:")


def arithmetic_problem(sign: str) -> Maker:
    """Problems of one operator over its templates and operand pairs."""

    def draw(rng: random.Random) -> Drawn:
        a, b = rng.choice(operand_pairs(sign))
        return operator_problem(rng.choice(arithmetic_templates(sign)), sign, a, b)

    return draw


def operator_problem(template: Template, sign: str, a: int, b: int) -> Drawn:
    """One problem of an operator."""
    return _drawn(template.render({"A": a, "B": b}), solve(sign, a, b), template.name, f"{a},{b}")


def _drawn(rendered: Rendered, answer: object, form: str, item: str) -> Drawn:
    """A problem with the places of operands and operator."""
    names = {"A": "operand_a", "B": "operand_b", "operator": "operator"}
    roles = tuple((names[slot], span) for slot, span in rendered.spans.items() if slot in names)
    return Drawn(rendered.text, str(answer), form, item, roles)


def _form(rng: random.Random, forms: tuple[str, ...]) -> tuple[str, str]:
    """One of the forms, and its number."""
    form = rng.choice(forms)
    return form, str(forms.index(form))


def _filled(form: str, **values: object) -> Rendered:
    return Template(form, form, "").render(values)


def power(rng: random.Random) -> Drawn:
    """Exponentiation below 100: the fifth operator."""
    a, b = rng.choice(POWER_PAIRS)
    form, number = _form(rng, POWER_FORMS)
    return _drawn(_filled(form, A=a, B=b), a**b, number, f"{a},{b}")


def two_digit_sum(rng: random.Random) -> Drawn:
    """Sums of two numbers from 10 to 29."""
    a, b = rng.randint(10, 29), rng.randint(10, 29)
    form, number = _form(rng, WIDE_FORMS)
    return _drawn(_filled(form, A=a, B=b), a + b, number, f"{a},{b}")


def decimal_sum(rng: random.Random) -> Drawn:
    """Sums of tenths."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    total = a + b
    form, number = _form(rng, WIDE_FORMS)
    return _drawn(_filled(form, A=f"0.{a}", B=f"0.{b}"), f"{total // 10}.{total % 10}", number, f"{a},{b}")


def year_span(rng: random.Random) -> Drawn:
    """Years between two dates of a century, one to nine."""
    century, start, years = rng.randint(17, 19), rng.randint(10, 39), rng.randint(1, 9)
    begin, end = f"{century}{start}", f"{century}{start + years}"
    form, number = _form(rng, YEAR_FORMS)
    return _drawn(_filled(form, A=begin, B=end), years, number, f"{begin},{end}")


def word_problem(rng: random.Random) -> Drawn:
    """One-step stories of gain and loss."""
    sign = rng.choice("+-")
    a, b = rng.choice(operand_pairs(sign))
    name, other = rng.sample(NAMES, 2)
    form, number = _form(rng, GAINS if sign == "+" else LOSSES)
    story = _filled(f"Q: {form} A:", name=name, other=other, things=rng.choice(THINGS), A=a, B=b)
    return _drawn(story, solve(sign, a, b), f"{sign}{number}", f"{a}{sign}{b}")


def copy(rng: random.Random) -> Drawn:
    """Repeat three words or numbers."""
    items = " ".join(rng.choice(WORDS) if rng.random() < 0.7 else str(rng.randint(0, 99)) for _ in range(3))
    return Drawn(f"Copy: {items} ->", items, "0", items)


def ordering(rng: random.Random) -> Drawn:
    """Sort three digits."""
    items = rng.sample(range(10), 3)
    text = " ".join(map(str, items))
    return Drawn(f"Sort: {text} ->", " ".join(map(str, sorted(items))), "0", text)


def comparison(rng: random.Random) -> Drawn:
    """Which of two numbers is larger, or whether `a < b`."""
    a, b = rng.sample(range(1, 20), 2)
    if rng.random() < 0.5:
        return Drawn(f"Q: Is {a} < {b}? A:", "yes" if a < b else "no", "0", f"{a},{b}")
    return Drawn(f"Of {a} and {b} the larger is", str(max(a, b)), "1", f"{a},{b}")


def successor(rng: random.Random) -> Drawn:
    """The next day, month or letter."""
    kind = rng.choice(sorted(ORDERS))
    order = ORDERS[kind]
    at = rng.randrange(len(order) - 1)
    form, number = _form(rng, SUCCESSOR_FORMS)
    return Drawn(form.format(kind, order[at]), order[at + 1], number, order[at])


def lookup(table: dict[str, str], *forms: str) -> Maker:
    """What a table says of one of its keys."""
    keys = sorted(table)

    def draw(rng: random.Random) -> Drawn:
        key = rng.choice(keys)
        form, number = _form(rng, forms)
        return Drawn(form.format(key), table[key], number, key)

    return draw


FURTHER: dict[str, Maker] = {
    "power": power,
    "two_digit_sum": two_digit_sum,
    "decimal_sum": decimal_sum,
    "year_span": year_span,
    "word_problem": word_problem,
}
CONTROL: dict[str, Maker] = {
    "copy": copy,
    "sort": ordering,
    "compare": comparison,
    "successor": successor,
    "capital": lookup(CAPITALS, "The capital of {0} is", "Q: What is the capital of {0}? A:"),
    "antonym": lookup(ANTONYMS, "The opposite of {0} is", "Q: What is the opposite of {0}? A:"),
    "colour": lookup(COLOURS, "The colour of {0} is", "Q: What colour is {0}? A:"),
    "kind": lookup(KINDS, "{0} is a kind of", "Q: What kind of thing is {0}? A:"),
}
