"""Reading an answer out of free text, and comparing it with the right one. Exact: no floating point, tolerance 0.

A *number* in a text is, read from left to right:
    - digits, or digits in groups of exactly three after commas (``1,234``; ``3,5`` is the two numbers 3 and 5);
    - with a decimal part only if a digit follows the point (``72.`` is 72; ``.5`` is 1/2), and an exponent (``1e3``);
    - a fraction ``3/4`` without spaces, or a mixed one ``1 3/4`` (``3 / 4`` is the two numbers 3 and 4);
    - a fraction is no part of a date: ``3/4/2020`` is three numbers;
    - with a sign ``-``, ``+`` or U+2212 right before it, only where no letter, digit, point, comma or closing bracket
      stands before the sign (``5-3`` is 5 and 3, ``2020-2024`` two years, ``10 - 7`` is 10 and 7, ``-$7`` is -7);
    - not right behind a letter, as in ``x2``; letters and percent signs behind it do not count (``3rd``, ``50%``: 50).

``extract_number`` takes the first rule that applies:
    1. behind the last ``####``: the first number there (GSM8K);
    2. inside the last ``\\boxed{...}``: the last number there;
    3. behind the last "answer is", "answer:" or "answer =" (any case), up to the end of its line: the number after the
       last ``=`` if there is one, else the first number;
    4. the last number of the text.
A rule whose place holds no number gives way to the next.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from pyarith.errors import InputError, check

KINDS = ("number", "text")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_BEFORE_SIGN = r"(?<![\w.,)\]}])"
_NUMBER = re.compile(
    rf"(?P<sign>{_BEFORE_SIGN}(?:[-+\u2212][$€£]?|[$€£][-+\u2212]))?"
    rf"(?<![A-Za-z_\d])(?:(?P<whole>\d+) (?P<mixed>\d+/[1-9]\d*)(?![\d/])|(?<!/)(?P<fraction>\d+/[1-9]\d*)(?![\d/])"
    rf"|(?P<decimal>{_DECIMAL}(?:[eE][-+]?\d+(?![A-Za-z\d]))?))"
)
_ANSWER = re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text in their order, as exact fractions; see the module for what counts as one."""
    return [_value(found) for found in _NUMBER.finditer(text)]


def _value(found: re.Match[str]) -> Fraction:
    negative = any(mark in (found["sign"] or "") for mark in "-\u2212")
    if found["mixed"]:
        size = int(found["whole"]) + Fraction(found["mixed"])
    else:
        size = Fraction((found["fraction"] or found["decimal"]).replace(",", ""))
    return -size if negative else size


def extract_number(text: str) -> Fraction | None:
    """The number that a free-form answer arrives at, None where there is no number at all.

    Args:
        text: what the model wrote.
    Returns:
        An exact fraction: ``2.50``, ``5/2`` and ``2 1/2`` are equal.
    Notes: rules in the module's text, in the order ``####``, ``\\boxed``, "answer is", last number. What was written
        after the answer (``7. Next: 3 + 4``) misleads the last rule: generation stops at a newline for that reason.
    References: Cobbe et al. 2021, arXiv:2110.14168 (``####``); "answer is" as in Wei et al. 2022, arXiv:2201.11903.
    """
    if "####" in text:
        found = numbers(text.rpartition("####")[2])
        if found:
            return found[0]
    boxed = _BOXED.findall(text)
    if boxed and (found := numbers(boxed[-1])):
        return found[-1]
    if (clause := _behind_answer(text)) is not None:
        result = numbers(clause.rpartition("=")[2]) if "=" in clause else []
        found = result or numbers(clause)
        if found:
            return found[0]
    found = numbers(text)
    return found[-1] if found else None


def _behind_answer(text: str) -> str | None:
    """The rest of the line behind the last "answer is"."""
    marks = list(_ANSWER.finditer(text))
    return text[marks[-1].end() :].strip().split("\n")[0] if marks else None


def extract_text(text: str) -> str:
    """The answer in words: what stands behind the last ``####``, else behind the last "answer is" on its line, else
    the first line that is not empty; normalised as by ``normalise``."""
    if "####" in text:
        return normalise(text.rpartition("####")[2].strip().split("\n")[0])
    clause = _behind_answer(text)
    return normalise(text.strip().split("\n")[0] if clause is None else clause)


def normalise(text: str) -> str:
    """NFKC, no difference of case, single spaces, no quotes or ``. , ; : ! ?`` at either end."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip(" .,;:!?\"'`\u201c\u201d\u2018\u2019")


def kind_of(answers: Any) -> str:
    """``"number"`` if each right answer is one number and nothing else (``$5`` and ``50%`` are), else ``"text"``."""
    return "number" if all(_only_number(answer) is not None for answer in answers) else "text"


def _only_number(text: str) -> Fraction | None:
    """The value of a text that is a single number."""
    bare = text.strip().rstrip("%").rstrip(".").removeprefix("$").strip()
    found = _NUMBER.fullmatch(bare)
    return _value(found) if found else None


def gold_of(answer: str) -> str:
    """The right answer of a worked solution: what stands behind its last ``####``, else all of it."""
    return answer.rpartition("####")[2].strip() if "####" in answer else answer.strip()


def is_match(text: str, answer: str, kind: str = "number") -> bool:
    """Whether a free-form answer is right.

        number: extract_number(text) == the number that ``answer`` is, exactly (tolerance 0)
        text:   extract_text(text) == normalise(answer)

    Args:
        text: what the model wrote.
        answer: the right answer alone.
        kind: ``"number"`` or ``"text"``.
    Raises:
        InputError: an unknown kind, or ``"number"`` with an answer that is none.
    """
    check(kind in KINDS, f"kind: expected one of {KINDS}, got {kind!r}")
    if kind == "text":
        return extract_text(text) == normalise(answer)
    right = _only_number(answer)
    if right is None:
        raise InputError(f"answer: expected a number for kind 'number', got {answer!r}; use kind='text'")
    return extract_number(text) == right
