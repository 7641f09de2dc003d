"""Questions with free-form answers: from files (JSON lines, JSON, CSV, TSV), from ``datasets``, or from problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.errors import InputTypeError, check
from pyarith.evaluation.answers import KINDS, gold_of, is_match, kind_of
from pyarith.rows import KNOWN, ON_BAD, SHOWN, choose_layout, columns_of, more, read_rows, report_bad, slots

BAD = {
    "not_a_row": "not a JSON object",
    "missing_column": "a column is missing",
    "empty_prompt": "the prompt is empty",
    "empty_answer": "the answer is empty",
    "several_answers": "there are several answers",
}


@dataclass(frozen=True, eq=False, repr=False)
class Items:
    """Prompts with the text or number that should come out.

    Attributes:
        prompts, answers: one text an item; answers alone, without their working.
        kind: ``"number"`` or ``"text"``: how answers are compared, see ``evaluation.answers``.
        strata: name -> array [item]; ``item`` is what statistics resample.
        settings: where the items come from, and how many rows were left out, by reason.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    kind: str
    strata: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.kind in KINDS, f"kind: expected one of {KINDS}, got {self.kind!r}")
        sizes = {"prompts": len(self.prompts), "answers": len(self.answers)}
        sizes |= {name: len(values) for name, values in self.strata.items()}
        check(len(set(sizes.values())) == 1, f"items: expected equal lengths, got {sizes}")
        check(len(self.prompts) > 0, "items: expected at least one, got none")
        if self.kind == "number":
            wrong = [f"{row}: {answer!r}" for row, answer in enumerate(self.answers) if kind_of([answer]) == "text"]
            check(
                not wrong,
                f"answers: expected a number each for kind 'number', got {', '.join(wrong[:SHOWN])}{more(wrong)}; "
                "use kind='text'",
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def is_correct(self, texts: Sequence[str]) -> np.ndarray:
        """bool [item]: which of these free-form answers are right."""
        check(len(texts) == len(self), f"texts: expected {len(self)}, one an item, got {len(texts)}")
        return np.array([is_match(text, right, self.kind) for text, right in zip(texts, self.answers, strict=True)])

    def __repr__(self) -> str:
        left = sum(self.settings.get("dropped", {}).values())
        lines = [f"Items({len(self)} items, answers are {self.kind}s, {left} rows left out)"]
        lines += [
            f"  {prompt!r} -> {answer!r}" for prompt, answer in zip(self.prompts[:3], self.answers[:3], strict=True)
        ]
        return "\n".join(lines + ["  ..."] * (len(self) > 3))

    @classmethod
    def from_problems(cls, problems: Iterable[Any], kind: str | None = None) -> Items:
        """Items of ``(prompt, answer, ...)`` tuples such as ``tasks.draw_problems`` gives.

        Args:
            problems: tuples; an attribute ``item``, where there is one, becomes the stratum ``item``.
            kind: None = ``"number"`` if all answers are numbers, else ``"text"``.
        """
        rows = list(problems)
        check(len(rows) > 0, "problems: expected at least one, got none")
        answers = tuple(str(row[1]) for row in rows)
        names = [getattr(row, "item", number) for number, row in enumerate(rows)]
        strata = {"item": np.array(names)}
        return cls(tuple(str(row[0]) for row in rows), answers, kind or kind_of(answers), strata)


def load_items(
    source: str | Path,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    on_bad: str = "raise",
    split: str = "test",
    subset: str | None = None,
) -> Items:
    """Items of a file or of a data set of the Hugging Face hub.

    Recognised columns (the first that fits): ``prompt, answer``; SVAMP's ``Body, Question, Answer``; AddSub's
    ``sQuestion, lSolutions`` (its one solution); GSM8K's ``question, answer``. Of an answer with ``####`` only what
    stands behind it counts. Questions are put as ``Q: ...`` and, on the next line, ``A:``; ``prompt`` columns stay as
    they are.

    Args:
        source: a path that ends in .jsonl, .ndjson, .json (a list of objects), .csv or .tsv; anything else is a name
            for ``datasets.load_dataset``.
        prompt: a column, or a template such as ``"{context}\\n{question}\\nA:"``; None = recognised.
        answer: a column; None = recognised.
        kind: ``"number"``, ``"text"``, or None = number if all answers are.
        limit: only the first so many rows.
        on_bad: ``"raise"`` names the rows that cannot be used, ``"drop"`` leaves them out and counts them in
            ``settings["dropped"]`` and, with their numbers, in ``settings["dropped_rows"]``.
        split, subset: for ``load_dataset`` (subset is its configuration).
    Returns:
        ``Items``; the stratum ``item`` is the number of the row, counted from 1 (of a CSV file without its header).
    Raises:
        InputError: no such file, not the format, columns missing, bad rows, none left; the message names them.
        NotAvailableError: a hub name without the package ``datasets``.
    References: Cobbe et al. 2021, arXiv:2110.14168 (GSM8K); Patel et al. 2021, arXiv:2103.07191 (SVAMP); Hosseini et
        al. 2014, doi:10.3115/v1/D14-1058 (AddSub).
    """
    check(on_bad in ON_BAD, f"on_bad: expected one of {ON_BAD}, got {on_bad!r}")
    whole = limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0)
    check(whole, f"limit: expected None or a whole number >= 1, got {limit!r}")
    rows = islice(read_rows(source, split, subset), limit)
    return items_from_rows(rows, str(source), prompt=prompt, answer=answer, kind=kind, on_bad=on_bad)


def items_from_rows(
    rows: Iterable[Any],
    name: str,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    kind: str | None = None,
    on_bad: str = "raise",
) -> Items:
    """``load_items`` for rows that are already in memory, such as a loaded ``datasets.Dataset``."""
    table = list(rows)
    check(len(table) > 0, f"{name}: expected at least one row, got none")
    layout, template, column = choose_layout(columns_of(table), KNOWN, prompt, answer, name, "answer")
    needed = [*slots(template), column]
    prompts, answers, numbers = [], [], []
    bad: dict[str, list[int]] = {}
    for number, row in enumerate(table, start=1):
        reason = _why_not(row, needed, column)
        if reason is None:
            text = template.format_map({slot: str(row[slot]).strip() for slot in needed[:-1]})
            right = _answer(row[column])
            reason = "several_answers" if right is None else None if right else "empty_answer"
        if reason is not None:
            bad.setdefault(reason, []).append(number)
            continue
        prompts.append(text)
        answers.append(right or "")
        numbers.append(number)
    report_bad(bad, BAD, len(table), len(prompts), f"{name}: expected a prompt and an answer", on_bad)
    settings = {"source": name, "layout": layout, "prompt": template, "answer": column, "rows": len(table)}
    settings |= {"dropped": {reason: len(found) for reason, found in bad.items()}, "dropped_rows": bad}
    strata = {"item": np.array(numbers)}
    return Items(tuple(prompts), tuple(answers), kind or kind_of(answers), strata, settings)


def _why_not(row: Any, needed: list[str], column: str) -> str | None:
    """The reason why a row cannot be used, as far as it shows before its answer is read."""
    if not isinstance(row, Mapping):
        return "not_a_row"
    if any(slot not in row for slot in needed):
        return "missing_column"
    if any(row[slot] is None or not str(row[slot]).strip() for slot in needed[:-1]):
        return "empty_prompt"
    return "empty_answer" if row[column] is None else None


def _answer(value: Any) -> str | None:
    """The answer as a text, None where there are several."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return gold_of(str(value[0])) if len(value) == 1 else None if len(value) else ""
    return gold_of(str(value))


def as_items(value: Any, name: str) -> Items:
    """``Items`` as they are, or made of a list of (prompt, answer).

    Raises:
        InputTypeError: it is neither.
    """
    if isinstance(value, Items):
        return value
    listed = isinstance(value, list | tuple) and len(value) > 0
    fits = listed and all(isinstance(row, tuple | list) and len(row) >= 2 for row in value)
    if not fits:
        raise InputTypeError(
            f"{name}: expected PromptPairs, Items or a list of (prompt, answer), got {type(value).__name__}"
        )
    return Items.from_problems(value)
