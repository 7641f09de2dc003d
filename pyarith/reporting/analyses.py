"""The step ``analysis``: every analysis of a run that its model and prompts support, as rows for tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyarith import analysis
from pyarith.errors import InputError, PyarithError, check
from pyarith.prompts import PromptPairs
from pyarith.reporting.saved import SavedRun
from pyarith.types import Head


@dataclass(frozen=True)
class Looked:
    """Where heads look in one prompt.

    Attributes:
        prompt: the text.
        tokens, roles: of its tokens, END last.
        heads, attention: [n_chosen, pos] attention at END.
    """

    prompt: str
    tokens: list[int]
    roles: list[str]
    heads: tuple[Head, ...]
    attention: np.ndarray


@dataclass
class Analyses:
    """What ran, by operator, and one reason for each that did not.

    Attributes:
        attention, cosines, lens, attribution: operator -> result.
        looked: operator -> attention of the same heads over one prompt, its tokens and their roles.
        lens_prompts: operator -> the prompt of the lens, its answer.
        overlap: between the operators, or None.
        reasons: (analysis, operator) -> why not.
    """

    attention: dict[str, analysis.AttentionMass] = field(default_factory=dict)
    looked: dict[str, Looked] = field(default_factory=dict)
    cosines: dict[str, analysis.MlpCosines] = field(default_factory=dict)
    cosines_left_out: dict[str, int] = field(default_factory=dict)
    lens: dict[str, analysis.LogitLens] = field(default_factory=dict)
    lens_prompts: dict[str, tuple[str, str]] = field(default_factory=dict)
    attribution: dict[str, analysis.LogitAttribution] = field(default_factory=dict)
    overlap: analysis.EffectOverlap | None = None
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        """Whether there is a result at all."""
        return bool(self.attention or self.cosines or self.lens or self.attribution or self.overlap)

    def attempt(self, what: str, sign: str, call: Callable[[], None]) -> None:
        """Run one analysis; a reason why it cannot be done is kept, a fault of the program is not."""
        try:
            call()
        except PyarithError as error:
            self.reasons[what, sign] = " ".join(str(error).split())


def analyse(
    model: Any, tokenizer: Any, run: SavedRun, sign: str, heads: list[Head], found: Analyses, prompt: int | None
) -> None:
    """All analyses of one operator on the run's own clean prompts.

    Args:
        heads: the key heads to look at; none gives a reason in place of the attention.
        prompt: the one prompt of lens and token by token attention, by its row in prompts.csv; None takes the first
            that the model answers rightly.
    Raises:
        InputError: the run's prompts cannot be made again.
    """
    pairs = run.pairs(tokenizer, sign)
    row = _one_prompt(run, sign, prompt)

    def attention() -> None:
        check(len(heads) > 0, "no head lies below the threshold")
        mass = analysis.attention_mass(model, pairs, heads)
        found.looked[sign] = _look(model, pairs, row, heads)
        found.attention[sign] = mass

    def cosines() -> None:
        single = single_operands(pairs)
        check(bool(single.any()), "no prompt has both operands as one token each")
        found.cosines[sign] = analysis.mlp_cosines(model, pairs if single.all() else pairs.subset(single))
        found.cosines_left_out[sign] = int((~single).sum())

    def lens() -> None:
        found.lens[sign] = analysis.logit_lens(model, pairs.subset([row]), k=5)
        found.lens_prompts[sign] = pairs.prompts[row], pairs.answer_texts[row]

    def attribution() -> None:
        found.attribution[sign] = analysis.logit_attribution(model, pairs)

    for what, call in (("attention", attention), ("mlp", cosines), ("lens", lens), ("attribution", attribution)):
        found.attempt(what, sign, call)


def single_operands(pairs: PromptPairs) -> np.ndarray:
    """bool [batch]: operand A and operand B are one token each.

    Raises:
        InputError: the prompts have no such roles.
    """
    roles, names = pairs.roles, pairs.role_names
    if roles is None or not {"operand_a", "operand_b"} <= set(names):
        raise InputError("the prompts have no roles operand_a and operand_b")
    single = [(roles == names.index(name)).sum(1) == 1 for name in ("operand_a", "operand_b")]
    return np.asarray(single[0] & single[1])


def _look(model: Any, pairs: PromptPairs, row: int, heads: list[Head]) -> Looked:
    """Attention of the heads over the clean prompt of one row."""
    one = pairs.subset([row])
    mass = analysis.attention_mass(model, one, heads, patterns=True)
    assert mass.patterns is not None and one.roles is not None  # attention_mass needs roles
    length = int(one.lengths[0])
    roles = [one.role_names[code] for code in one.roles[0, :length]]
    return Looked(one.prompts[0], one.clean[0, :length].tolist(), roles, mass.heads, mass.patterns[:, 0, :length])


def _one_prompt(run: SavedRun, sign: str, prompt: int | None) -> int:
    rows = run.prompts[sign]
    if prompt is not None:
        check(0 <= prompt < len(rows), f"prompt: expected 0 to {len(rows) - 1}, got {prompt}")
        return prompt
    return next((i for i, row in enumerate(rows) if row.get("correct") == "1"), 0)


def overlap_of(run: SavedRun, threshold: float, found: Analyses, seed: int = 0) -> None:
    """Overlap between the operators; rank correlations get intervals where the prompts have clusters enough."""

    def call() -> None:
        check(len(run.results) > 1, "the run has one operator; pyarith discover takes --operator several times")
        try:
            factors = {sign: run.factors(sign) for sign in run.signs}
            found.overlap = analysis.overlap(run.results, threshold=threshold, pairs=factors, seed=seed)
        except InputError:  # too few operand pairs or templates for intervals: the numbers themselves need none
            found.overlap = analysis.overlap(run.results, threshold=threshold)

    found.attempt("overlap", "", call)


def tables(found: Analyses, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """File name -> rows, of what ran."""
    made: dict[str, list[dict[str, Any]]] = {
        "attention.csv": [{"operator": s, **row} for s, one in found.attention.items() for row in one.rows()],
        "attention_tokens.csv": [
            {"operator": s, **row} for s, one in found.looked.items() for row in _looked_rows(one, tokenizer)
        ],
        "mlp.csv": [{"operator": s, **row} for s, one in found.cosines.items() for row in one.rows()],
        "lens.csv": [
            {"operator": s, **row, "prompt": found.lens_prompts[s][0], "answer": found.lens_prompts[s][1]}
            for s, one in found.lens.items()
            for row in one.rows(tokenizer)
        ],
        "lens_promoted.csv": [
            {"operator": s, **row, "prompt": found.lens_prompts[s][0], "answer": found.lens_prompts[s][1]}
            for s, one in found.lens.items()
            for row in _promoted_rows(one, tokenizer)
        ],
        "attribution.csv": [{"operator": s, **row} for s, one in found.attribution.items() for row in one.rows()],
        "overlap.csv": [] if found.overlap is None else list(found.overlap.rows()),
    }
    return {name: rows for name, rows in made.items() if rows}


def _looked_rows(one: Looked, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """One row per head and token."""
    for head, pattern in zip(one.heads, one.attention, strict=True):
        for place, (token, role, share) in enumerate(zip(one.tokens, one.roles, pattern, strict=True)):
            row: dict[str, Any] = {"layer": head.layer, "head": head.head, "position": place, "token": token}
            yield row | {
                "text": tokenizer.decode([token]),
                "role": role,
                "attention": float(share),
                "prompt": one.prompt,
            }


def _promoted_rows(one: analysis.LogitLens, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """One row per layer and rank: the tokens whose logit an MLP raises most, of the lens' one prompt."""
    for layer, rank in np.ndindex(one.promoted.shape[0], one.promoted.shape[2]):
        token = int(one.promoted[layer, 0, rank])
        row: dict[str, Any] = {"layer": layer, "rank": rank, "token": token, "text": tokenizer.decode([token])}
        yield row | {"logits": float(one.promoted_by[layer, 0, rank])}


def record(found: Analyses) -> dict[str, Any]:
    """What analysis.json says beside the tables."""
    points = {sign: one.points for sign, one in found.cosines.items()}
    return {
        "attention": {
            sign: {"heads": [str(h) for h in one.heads], "check_error": one.check_error}
            for sign, one in found.attention.items()
        },
        "mlp": {
            sign: {
                "points": None if at is None else at._asdict(),
                "prompts": found.cosines[sign].answer.shape[1],
                "several_tokens_left_out": found.cosines_left_out[sign],
            }
            for sign, at in points.items()
        },
        "lens": {sign: {"prompt": text, "answer": answer} for sign, (text, answer) in found.lens_prompts.items()},
        "attribution": {
            sign: {"semantics": one.semantics, "error": one.error} for sign, one in found.attribution.items()
        },
        "overlap": None
        if found.overlap is None
        else {
            **found.overlap.settings,
            "key_heads": {name: [str(h) for h in heads] for name, heads in found.overlap.key_heads.items()},
        },
        "not_done": [
            {"analysis": what, "operator": sign, "reason": why} for (what, sign), why in found.reasons.items()
        ],
    }
