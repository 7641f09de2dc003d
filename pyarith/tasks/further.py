"""Problems of the further tasks: drawn without repetition, as they are or as prompt pairs with one-token answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from pyarith.errors import InputError, check
from pyarith.prompts import MISALIGNED, Aligner, PromptPairs
from pyarith.tasks.arithmetic import shuffled
from pyarith.tasks.problems import CONTROL, FURTHER, Drawn, operator_problem
from pyarith.tasks.sampling import Candidate, collect
from pyarith.tasks.tables import LEXICON, arithmetic_templates, operand_pairs

ARITHMETIC_TASKS = tuple(FURTHER)
CONTROL_TASKS = tuple(CONTROL)
OPERATORS = tuple(LEXICON)
_MAKERS = {**FURTHER, **CONTROL}
_PATIENCE = 2000  # draws in a row without a new prompt, after which a task counts as exhausted
_REFUSALS = {"no_swap": "no other problem of the same form and length has another answer"}
_FEW_FORMS = 5  # with fewer, forms are no factor to resample over


def draw_problems(task: str, n: int = 200, seed: int = 0, *, fewer: bool = False) -> tuple[Drawn, ...]:
    """Different problems of a task, for answers of any length.

    Args:
        task: one of ``ARITHMETIC_TASKS`` (power, two_digit_sum, decimal_sum, year_span, word_problem) or of
            ``CONTROL_TASKS``, without arithmetic (copy, sort, compare, successor, capital, antonym, colour, kind); or
            an operator, whose problems come in the order of ``tasks.arithmetic``'s clean prompts of the same seed.
        n: how many.
        seed: of the draw; the first of more problems are the fewer problems of the same seed.
        fewer: where there are no ``n`` different problems, take all there are.
    Returns:
        ``n`` problems ``(prompt, answer, form, item, roles)``; no prompt comes twice.
    Raises:
        InputError: an unknown task, a bad ``n``, or a task with fewer than ``n`` different prompts without ``fewer``.
    """
    found = _of_operator(task, n, seed) if task in OPERATORS else _different(task, n, seed)
    check(
        len(found) == n or fewer,
        f"n: asked for {n} problems of {task!r}, which has {len(found)} different ones; ask for fewer",
    )
    return found


def problem_pairs(
    tokenizer: Any, task: str, n: int = 200, seed: int = 0, on_misaligned: str = "drop", *, fewer: bool = False
) -> PromptPairs:
    """Pairs of problems of the same form, for tasks whose answers are one token.

    The corrupted prompt is another problem of the same form, with as many tokens and another answer.

    Args:
        tokenizer: any Hugging Face tokenizer.
        task, n, seed: as in ``draw_problems``.
        on_misaligned: ``"drop"`` leaves out what breaks an alignment rule and counts it, ``"raise"`` stops there.
        fewer: where there are no ``n`` pairs (there are 40 prompts about capitals), take all there are.
    Returns:
        ``PromptPairs`` with roles operand_a, operand_b and operator, as far as the task has them (years and stories
        have no operator, controls none of these). Strata: template (the form), item (what the problem is about) and,
        where there are at least 5 forms, pair (the same as item), so that statistics resample forms and items.
    Raises:
        InputError: as ``draw_problems``; an unknown ``on_misaligned``.
        AlignmentError: fewer than ``n`` pairs remain, such as where answers are several tokens.
    References: Zhang & Nanda 2023, arXiv:2309.16042 (corruption by a swap with a valid prompt).
    """
    check(on_misaligned in MISALIGNED, f"on_misaligned: expected one of {MISALIGNED}, got {on_misaligned!r}")
    pool = _different(task, max(4 * n, 400) if _whole(n) else n, seed)
    aligner = Aligner(tokenizer)
    settings = {"task": task, "corruption": "problem", "seed": seed}
    candidates = list(_candidates(task, pool, seed, aligner))
    if fewer and on_misaligned == "drop":
        able = [one for one in candidates if one.refused is None]
        texts = ([one.prompt for one in able], [one.corrupted for one in able], [one.answer for one in able])
        aligned = aligner.align(*texts, None, [one.replaced for one in able]) if able else None
        n = min(n, sum(reason is None for reason in aligned.reasons) if aligned else 0) or n
    return collect(candidates, aligner, n, on_misaligned=on_misaligned, settings=settings, reasons=_REFUSALS)


def _whole(n: Any) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool) and bool(n > 0)


def _of_operator(sign: str, n: int, seed: int) -> tuple[Drawn, ...]:
    """Up to ``n`` problems of an operator over all of its templates and operand pairs."""
    check(_whole(n), f"n: expected a positive whole number, got {n!r}")
    drawn = islice(shuffled(sign, arithmetic_templates(sign), operand_pairs(sign), seed), n)
    return tuple(operator_problem(template, sign, a, b) for template, (a, b) in drawn)


def _different(task: str, n: int, seed: int) -> tuple[Drawn, ...]:
    """Up to ``n`` problems with different prompts, fewer where the task has no more."""
    if task not in _MAKERS:
        raise InputError(
            f"task: expected one of {', '.join(_MAKERS)}, got {task!r}; pairs of the operators are tasks.arithmetic"
        )
    check(_whole(n), f"n: expected a positive whole number, got {n!r}")
    rng = random.Random(f"{seed} {task}")
    found: dict[str, Drawn] = {}
    in_vain = 0
    while len(found) < n and in_vain < _PATIENCE:
        drawn = _MAKERS[task](rng)
        in_vain = in_vain + 1 if drawn.prompt in found else 0
        found.setdefault(drawn.prompt, drawn)
    return tuple(found.values())


def _candidates(task: str, pool: tuple[Drawn, ...], seed: int, aligner: Aligner) -> Iterator[Candidate]:
    """Each problem once, with another of its form and number of tokens as the corrupted one."""
    alike: dict[tuple[str, int], list[Drawn]] = defaultdict(list)
    lengths = [len(ids) for ids in aligner.encode([one.prompt for one in pool])]
    for one, length in zip(pool, lengths, strict=True):
        alike[one.form, length].append(one)
    crossed = len({one.form for one in pool}) >= _FEW_FORMS
    rng = np.random.default_rng([seed, list(_MAKERS).index(task)])
    for one, length in zip(pool, lengths, strict=True):
        others = [other for other in alike[one.form, length] if other.answer != one.answer]
        other = others[rng.integers(len(others))] if others else one
        yield Candidate(
            prompt=one.prompt,
            corrupted=other.prompt,
            answer=one.answer,
            corrupted_answer=other.answer if others else None,
            replaced=((0, len(one.prompt)),),
            roles=dict(one.roles),
            strata={
                **{"template": f"{task}/{one.form}", "item": one.item, "task": task},
                **({"pair": one.item} if crossed else {}),
            },
            refused=None if others else "no_swap",
        )
