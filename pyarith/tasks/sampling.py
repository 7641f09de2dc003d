"""From candidate prompts to `PromptPairs`: what every task of this package ends with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from pyarith.errors import AlignmentError
from pyarith.prompts import REASONS, Aligner, PromptPairs, count_dropped
from pyarith.tasks.templates import Span


@dataclass(frozen=True)
class Candidate:
    """A pair before the tokenizer has seen it; `refused` says why the task itself cannot make one."""

    prompt: str
    corrupted: str
    answer: str
    strata: dict[str, Any]
    replaced: tuple[Span, ...] = ()
    roles: dict[str, Any] = field(default_factory=dict)
    corrupted_answer: str | None = None
    refused: str | None = None


def collect(
    candidates: Iterable[Candidate],
    aligner: Aligner,
    n: int,
    *,
    on_misaligned: str,
    settings: dict[str, Any],
    reasons: dict[str, str] | None = None,
) -> PromptPairs:
    """The first `n` candidates that keep the alignment rules.

    Args:
        candidates: distinct, in the order they are to be taken; strata must have `"template"`.
        aligner: holds the tokenizer.
        on_misaligned: `"raise"` at the first pair that breaks a rule, or `"drop"` and count.
        settings: what to record; the counts, the side of the answer's space and the number tried are added.
        reasons: in words, what `Candidate.refused` may say.
    Returns:
        `n` pairs. The strata are those of the candidates.
    Raises:
        AlignmentError: fewer than `n` remain, with the counts by reason; or a rule is broken and
            `on_misaligned="raise"`.
    """
    words = REASONS | (reasons or {})
    stream, space = iter(candidates), None
    kept: list[Candidate] = []
    tried: list[tuple[str, str | None]] = []  # template and reason of each candidate looked at
    size = n if on_misaligned == "raise" else max(2 * n, 64)
    while len(kept) < n and (block := list(islice(stream, size))):
        able = [one for one in block if one.refused is None]
        verdict = {id(one): one.refused for one in block}
        if able:
            given = [one.corrupted_answer for one in able if one.corrupted_answer is not None]
            aligned = aligner.align(
                [one.prompt for one in able],
                [one.corrupted for one in able],
                [one.answer for one in able],
                given if len(given) == len(able) else None,
                [one.replaced for one in able],
                space,
            )
            space = aligned.space
            verdict |= {id(one): reason for one, reason in zip(able, aligned.reasons, strict=True)}
        for one in block:
            reason = verdict[id(one)]
            if reason is not None and on_misaligned == "raise":
                raise AlignmentError(
                    f"{one.prompt!r} with corrupted {one.corrupted!r}, answer {one.answer!r}: {words[reason]}; "
                    "pass on_misaligned='drop' to leave such pairs out"
                )
            tried.append((str(one.strata["template"]), reason))
            kept += [one] if reason is None else []
            if len(kept) == n:
                break
    counts = count_dropped([reason for _, reason in tried], [template for template, _ in tried])
    if len(kept) < n:
        why = ", ".join(f"{number} because {words[reason]}" for reason, number in counts["dropped"].items())
        raise AlignmentError(
            f"n: asked for {n} pairs, {len(kept)} remain of {len(tried)} distinct ones"
            + (f"; left out: {why}" if why else "")
            + "; ask for fewer, or change styles, operands or corruption"
        )
    pairs = PromptPairs.from_text(
        [one.prompt for one in kept],
        [one.corrupted for one in kept],
        [one.answer for one in kept],
        aligner.tokenizer,
        replaced=[one.replaced for one in kept],
        roles=[one.roles for one in kept],
        strata={name: [one.strata[name] for one in kept] for name in kept[0].strata},
        space=space,
    )
    record = {"n": n, "tried": len(tried), "on_misaligned": on_misaligned}
    return replace(pairs, settings=pairs.settings | settings | counts | record)
