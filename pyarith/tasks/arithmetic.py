"""Single-digit arithmetic in 36 templates per operator, with four families of corrupted prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pyarith.errors import InputError, check
from pyarith.prompts import MISALIGNED, Aligner, PromptPairs
from pyarith.tasks.sampling import Candidate, collect
from pyarith.tasks.tables import ALIASES, LEXICON, NULLS, STYLES, arithmetic_templates, operand_pairs, solve
from pyarith.tasks.templates import Template

CORRUPTIONS = ("operator", "operand_a", "operand_b", "operands")
_REFUSALS = {
    "no_null": "no null word has as many tokens as the operator",
    "no_swap": "no other operands of as many digits give another answer",
}


def arithmetic(
    tokenizer: Any,
    operator: str = "+",
    corruption: str = "operator",
    n: int = 200,
    seed: int = 0,
    styles: Sequence[str] = STYLES,
    on_misaligned: str = "drop",
    operands: tuple[int, int] = (1, 9),
) -> PromptPairs:
    """Pairs of arithmetic prompts with one-token answers.

    `{A} + {B} =`, `The sum of {A} and {B} is`, `Q: What is the sum of {A} and {B}? A:` and 33 more per
    operator. (template, A, B) are drawn without replacement, so no prompt comes twice.

    Args:
        tokenizer: any Hugging Face tokenizer; where it splits an answer such as `12`, that pair is left out.
        operator: `+ - * /`, or add, sub, mul, div, or the signs for times and divided by.
        corruption: `"operator"` puts a null word or symbol in its place ("nothing", "<"; per template the first
            of equal token length); `"operand_a"`, `"operand_b"` and `"operands"` swap one or both operands for
            those of another valid problem of the same template, of as many digits, with another answer.
        n: how many pairs.
        seed: of the draw; the clean prompts are the same for each corruption as far as none is left out.
        styles: which of equation, statement, question.
        on_misaligned: `"drop"` leaves out what breaks an alignment rule and counts it in `.settings`;
            `"raise"` stops at the first.
        operands: smallest and largest operand. `-`: only A >= B. `/`: A = B * C with B and C from the range
            (for 1..9 A goes up to 81), so the division is exact.
    Returns:
        `PromptPairs` with roles operand_a, operand_b and operator, and strata template, style, operator, operand_a,
        operand_b, pair, corrupted_operand_a, corrupted_operand_b, null.
    Raises:
        InputError: unknown operator, corruption, style or `on_misaligned`; a bad `n` or `operands`.
        AlignmentError: fewer than `n` pairs remain (the message counts why), or `on_misaligned="raise"`.
    Notes: deterministic in all arguments. Under `"operator"` the corrupted prompt promises no other answer.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3 (templates, null words).
    """
    sign = _known("operator", ALIASES.get(str(operator).strip().lower(), operator), tuple(LEXICON), tuple(ALIASES))
    _known("corruption", corruption, CORRUPTIONS)
    _known("on_misaligned", on_misaligned, MISALIGNED)
    check(not isinstance(styles, str), f"styles: expected a sequence such as {STYLES}, got the string {styles!r}")
    chosen = tuple(style for style in STYLES if style in [_known("styles", style, STYLES) for style in styles])
    check(len(chosen) > 0, f"styles: expected at least one of {STYLES}, got none")
    check(isinstance(n, int | np.integer) and n > 0, f"n: expected a positive whole number, got {n!r}")
    whole = len(operands) == 2 and all(isinstance(number, int | np.integer) for number in operands)
    low, high = operands if whole else (1, 0)
    check(0 <= low <= high, f"operands: expected whole numbers 0 <= smallest <= largest, got {operands!r}")
    templates = tuple(one for one in arithmetic_templates(sign) if one.style in chosen)
    aligner = Aligner(tokenizer)
    candidates = _candidates(sign, corruption, templates, operand_pairs(sign, (int(low), int(high))), seed, aligner)
    settings = {"task": "arithmetic", "operator": sign, "corruption": corruption, "seed": seed, "styles": list(chosen)}
    settings |= {"operands": [int(low), int(high)]}
    return collect(candidates, aligner, int(n), on_misaligned=on_misaligned, settings=settings, reasons=_REFUSALS)


def _known(name: str, value: Any, known: tuple[str, ...], also: tuple[str, ...] = ()) -> Any:
    """`value` if it is known, else an error that lists what is."""
    names = f" (or {', '.join(also)})" if also else ""
    if value not in known:
        raise InputError(f"{name}: expected one of {', '.join(known)}{names}, got {value!r}")
    return value


def shuffled(
    sign: str, templates: tuple[Template, ...], pairs: tuple[tuple[int, int], ...], seed: int
) -> Iterator[tuple[Template, tuple[int, int]]]:
    """Every (template, (A, B)) once, in the order of the seed."""
    order = np.random.default_rng([seed, list(LEXICON).index(sign)]).permutation(len(templates) * len(pairs))
    for number in order:
        yield templates[number // len(pairs)], pairs[number % len(pairs)]


def _candidates(
    sign: str,
    corruption: str,
    templates: tuple[Template, ...],
    pairs: tuple[tuple[int, int], ...],
    seed: int,
    aligner: Aligner,
) -> Iterator[Candidate]:
    """Every (template, A, B) once, in the order of the seed."""
    swaps = np.random.default_rng([seed, 4 + CORRUPTIONS.index(corruption)])
    nulls: dict[str, str | None] = {}
    for template, (a, b) in shuffled(sign, templates, pairs, seed):
        clean = template.render({"A": a, "B": b})
        null, other, refused = None, (a, b), None
        if corruption == "operator":
            if template.name not in nulls:
                nulls[template.name] = first_null(sign, template, pairs, aligner)
            null = nulls[template.name]
            refused = "no_null" if null is None else None
        else:
            options = _swaps(sign, corruption, (a, b), pairs)
            refused = None if options else "no_swap"
            other = options[swaps.integers(len(options))] if options else other
        swapped = {"operator": ("operator",), "operand_a": ("A",), "operand_b": ("B",), "operands": ("A", "B")}
        yield Candidate(
            prompt=clean.text,
            corrupted=template.render({"A": other[0], "B": other[1]}, null).text,
            answer=str(solve(sign, a, b)),
            corrupted_answer=None if corruption == "operator" or refused else str(solve(sign, *other)),
            replaced=tuple(clean.spans[slot] for slot in swapped[corruption]),
            roles={"operand_a": clean.spans["A"], "operand_b": clean.spans["B"], "operator": clean.spans["operator"]},
            strata={
                **{"template": template.name, "style": template.style, "operator": sign},
                **{"operand_a": a, "operand_b": b, "pair": f"{a},{b}"},
                **{"corrupted_operand_a": other[0], "corrupted_operand_b": other[1], "null": null or ""},
            },
            refused=refused,
        )


def first_null(
    sign: str, template: Template, pairs: Sequence[tuple[int, int]], aligner: Aligner, looks: int = 3
) -> str | None:
    """The first null word or symbol that keeps the number of tokens of this template, None if none does.

    Looked at on `looks` operand pairs; each pair that is used later is checked again on its own.
    """
    kind = "word" if template.operator.isalpha() else "symbol"
    step = max(1, len(pairs) // looks)
    samples = [template.render({"A": a, "B": b}) for a, b in pairs[::step][:looks]]
    clean = aligner.encode([sample.text for sample in samples])
    for null in NULLS[sign][kind]:
        texts = [template.render({"A": a, "B": b}, null).text for a, b in pairs[::step][:looks]]
        changed = aligner.encode(texts)
        rows = zip(samples, texts, clean, changed, strict=True)
        if all(aligner.difference(one.text, text, x, y, [one.spans["operator"]]) is None for one, text, x, y in rows):
            return null
    return None


def _swaps(
    sign: str, corruption: str, pair: tuple[int, int], pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Valid problems with another answer that differ from `pair` in just the operands to be swapped."""
    moved = (corruption != "operand_b", corruption != "operand_a")

    def fits(other: tuple[int, int]) -> bool:
        places = zip(pair, other, moved, strict=True)
        same_digits = all(len(str(x)) == len(str(y)) for x, y in zip(pair, other, strict=True))
        return same_digits and all((x != y) == move for x, y, move in places)

    return [other for other in pairs if fits(other) and solve(sign, *other) != solve(sign, *pair)]
