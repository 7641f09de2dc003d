"""The words of the arithmetic prompts, as data: operators, their words, 36 frames per operator, null words.

A frame becomes a template by putting an operator's words into it: `{S}` the symbol, `{W}` the infix word,
`{N}` the noun, `{G}` the noun of the action, `{P}` its preposition. The operator, which the corruption
replaces, stands in square brackets; `{A}` and `{B}` are the operands.
"""

from __future__ import annotations

import re
from functools import lru_cache

from pyarith.tasks.templates import Template

STYLES = ("equation", "statement", "question")

# sign -> other accepted names, then the words of the frames
LEXICON: dict[str, dict[str, str]] = {
    "+": {"S": "[+]", "W": "[plus]", "N": "[sum]", "G": "[addition]", "P": "and"},
    "-": {"S": "[-]", "W": "[minus]", "N": "[difference]", "G": "[subtraction]", "P": "and"},
    "*": {"S": "[*]", "W": "[times]", "N": "[product]", "G": "[multiplication]", "P": "and"},
    "/": {"S": "[/]", "W": "[divided] by", "N": "[quotient]", "G": "[division]", "P": "by"},
}
NAMES = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
ALIASES: dict[str, str] = {
    **{"add": "+", "addition": "+", "plus": "+"},
    **{"sub": "-", "subtraction": "-", "minus": "-", "\u2212": "-"},
    **{"mul": "*", "multiplication": "*", "times": "*", "\u00d7": "*"},
    **{"div": "/", "division": "/", "\u00f7": "/"},
}

FRAMES: dict[str, tuple[str, ...]] = {
    "equation": (
        "{A} {S} {B} =",
        "{A} {W} {B} =",
        "( {A} {S} {B} ) =",
        "Compute: {A} {S} {B} =",
        "Compute: {A} {W} {B} =",
        "Equation: {A} {S} {B} =",
        "Solve: {A} {S} {B} =",
        "The equation is {A} {S} {B} =",
        "x = {A} {S} {B}; x =",
        "x = {A}, y = {B}, x {S} y =",
        "Let x = {A} {W} {B}. Then x =",
        "Answer: {A} {S} {B} =",
    ),
    "statement": (
        "{A} {W} {B} equals to",
        "{A} {W} {B} equals",
        "{A} {W} {B} is",
        "{A} {S} {B} is equal to",
        "The {N} of {A} and {B} is",
        "The {G} of {A} {P} {B} is",
        "The result of {A} {W} {B} is",
        "The value of {A} {S} {B} is",
        "The {N} of the numbers {A} and {B} equals",
    ),
    "question": (
        "Q: What is the {N} of {A} and {B}? A:",
        "Q: What is {A} {W} {B}? A:",
        "Q: What is {A} {S} {B}? A:",
        "Q: What is the {G} of {A} {P} {B}? A:",
        "Q: How much is {A} {W} {B}? A:",
        "Q: How much is {A} {S} {B}? A:",
        "Question: What does {A} {W} {B} equal? Answer:",
        "Question: What is the result of {A} {S} {B}? Answer:",
        "Q: Can you compute {A} {W} {B}? A:",
        "Question: Find the {N} of {A} and {B}. Answer:",
    ),
}
# Frames that only one operator's grammar allows.
OWN_FRAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "+": {
        "statement": (
            "If you [add] {B} to {A}, you get",
            "When {B} is [added] to {A}, the result is",
            "{A} [increased] by {B} gives",
        ),
        "question": (
            "Q: If you [add] {B} to {A}, what do you get? A:",
            "Q: What is the result when {B} is [added] to {A}? A:",
        ),
    },
    "-": {
        "statement": (
            "If you [subtract] {B} from {A}, you get",
            "When {B} is [subtracted] from {A}, the result is",
            "{A} [decreased] by {B} gives",
        ),
        "question": (
            "Q: If you [subtract] {B} from {A}, what do you get? A:",
            "Q: What is the result when {B} is [subtracted] from {A}? A:",
        ),
    },
    "*": {
        "statement": (
            "If you [multiply] {A} by {B}, you get",
            "When {A} is [multiplied] by {B}, the result is",
            "{A} [multiplied] by {B} gives",
        ),
        "question": (
            "Q: If you [multiply] {A} by {B}, what do you get? A:",
            "Q: What is the result when {A} is [multiplied] by {B}? A:",
        ),
    },
    "/": {
        "statement": (
            "If you [divide] {A} by {B}, you get",
            "When {A} is [divided] by {B}, the result is",
            "{A} [split] by {B} gives",
        ),
        "question": (
            "Q: If you [divide] {A} by {B}, what do you get? A:",
            "Q: What is the result when {A} is [divided] by {B}? A:",
        ),
    },
}

# What replaces an operator; of each list the first that keeps the number of tokens is taken, per template.
_NULL_SYMBOLS = ("<", "@", "#", "&", ">", "~", "|", "<>", "@@")
_NULL_WORDS = ("nothing", "none", "something", "null", "nowhere", "blank", "emptiness", "nothingness", "nonexistence")
NULLS: dict[str, dict[str, tuple[str, ...]]] = {
    sign: {"symbol": _NULL_SYMBOLS, "word": _NULL_WORDS} for sign in LEXICON
}


@lru_cache
def arithmetic_templates(sign: str) -> tuple[Template, ...]:
    """The 36 templates of an operator, 12 per style, in a fixed order."""
    found = []
    for style in STYLES:
        frames = FRAMES[style] + OWN_FRAMES[sign].get(style, ())
        for number, frame in enumerate(frames):
            text = re.sub(r"\{([SWNGP])\}", lambda m: LEXICON[sign][m[1]], frame)
            found.append(Template(text, f"{NAMES[sign]}/{style}/{number}", style))
    return tuple(found)


def solve(sign: str, a: int, b: int) -> int:
    """`a sign b` for whole numbers; division is exact for the operand pairs used here."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]


@lru_cache
def operand_pairs(sign: str, operands: tuple[int, int] = (1, 9)) -> tuple[tuple[int, int], ...]:
    """Operand pairs whose answer is a non-negative whole number.

    `+` and `*`: all pairs of the range. `-`: those with a >= b. `/`: a = b * c with b and c from the range,
    so a goes up to 81 for 1..9 and the division is exact.
    """
    numbers = range(operands[0], operands[1] + 1)
    if sign == "/":
        return tuple((b * c, b) for b in numbers for c in numbers if b)
    return tuple((a, b) for a in numbers for b in numbers if sign != "-" or a >= b)
