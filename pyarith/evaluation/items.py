"""Questions with free-form answers: from files (JSON lines, JSON, CSV, TSV), from ``datasets``, or from problems."""

from __future__ import annotations

import csv
import importlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.errors import InputError, InputTypeError, NotAvailableError, check
from pyarith.evaluation.answers import KINDS, gold_of, is_match, kind_of

# name, columns that must be there, prompt as a template of columns, column of the answer; the first that fits is taken
KNOWN: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("generic", ("prompt", "answer"), "{prompt}", "answer"),
    ("svamp", ("Body", "Question", "Answer"), "Q: {Body} {Question}\nA:", "Answer"),
    ("addsub", ("sQuestion", "lSolutions"), "Q: {sQuestion}\nA:", "lSolutions"),
    ("gsm8k", ("question", "answer"), "Q: {question}\nA:", "answer"),
)
_SUFFIXES = {".jsonl": "json lines", ".ndjson": "json lines", ".json": "json", ".csv": ",", ".tsv": "\t"}
ON_BAD = ("raise", "drop")
_SHOWN = 5
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
                f"answers: expected a number each for kind 'number', got {', '.join(wrong[:_SHOWN])}{_more(wrong)}; "
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
    path = Path(source)
    rows = _from_file(path) if path.suffix.lower() in _SUFFIXES else _from_hub(str(source), split, subset)
    return items_from_rows(islice(rows, limit), str(source), prompt=prompt, answer=answer, kind=kind, on_bad=on_bad)


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
    columns = list(dict.fromkeys(key for row in table if isinstance(row, Mapping) for key in row))
    layout, template, column = _layout(columns, prompt, answer, name)
    needed = [*_slots(template), column]
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
    _report(bad, len(table), len(prompts), name, on_bad)
    settings = {"source": name, "layout": layout, "prompt": template, "answer": column, "rows": len(table)}
    settings |= {"dropped": {reason: len(found) for reason, found in bad.items()}, "dropped_rows": bad}
    strata = {"item": np.array(numbers)}
    return Items(tuple(prompts), tuple(answers), kind or kind_of(answers), strata, settings)


def _layout(columns: list[str], prompt: str | None, answer: str | None, name: str) -> tuple[str, str, str]:
    """(name of the layout, template of the prompt, column of the answer)."""
    known = [one for one in KNOWN if set(one[1]) <= set(columns)]
    template = None if prompt is None else prompt if _slots(prompt) else f"{{{prompt}}}"
    if template is not None and answer is not None:
        layout, column = "given", answer
    elif known:
        layout, _, recognised, right = known[0]
        template, column = template or recognised, answer or right
    else:
        lists = "; ".join(f"{one[0]}: {', '.join(one[1])}" for one in KNOWN)
        raise InputError(
            f"{name}: expected columns that are recognised ({lists}), got {columns}; say which hold the question and "
            "the answer: prompt='...', answer='...'"
        )
    missing = [slot for slot in [*_slots(template), column] if slot not in columns]
    check(not missing, f"{name}: expected columns {missing} (prompt={prompt!r}, answer={answer!r}), got {columns}")
    return layout, template, column


def _slots(template: str) -> list[str]:
    try:
        return [slot for _, slot, _, _ in string.Formatter().parse(template) if slot]
    except ValueError as error:
        raise InputError(
            f"prompt: expected a column or a template with {{columns}}, got {template!r} ({error})"
        ) from None


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


def _report(bad: dict[str, list[int]], total: int, left: int, name: str, on_bad: str) -> None:
    if not bad or (on_bad == "drop" and left):
        return
    parts = []
    for reason, found in bad.items():
        shown = ", ".join(map(str, found[:_SHOWN])) + _more(found)
        parts.append(f"{BAD[reason]} in {len(found)} (row {shown})")
    what = "correct them or pass on_bad='drop'" if left else "none is left"
    raise InputError(f"{name}: expected a prompt and an answer in each of {total} rows, got {'; '.join(parts)}: {what}")


def _more(found: Sequence[Any]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""


def _from_file(path: Path) -> Iterable[Any]:
    check(path.is_file(), f"source: expected a file, got {path}, which does not exist; check the path")
    form = _SUFFIXES[path.suffix.lower()]
    if form == "json":
        value = _parse(path.read_text(encoding="utf-8-sig"), str(path))
        check(
            isinstance(value, list),
            f"{path}: expected a list of objects, got {type(value).__name__}; one object a line belongs in a .jsonl",
        )
        return list(value)
    if form == "json lines":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file, delimiter=form))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected JSON, got {text[:60]!r} ({error})") from None


def _from_hub(name: str, split: str, subset: str | None) -> Iterable[Any]:
    check(bool(name), "source: expected a path or the name of a data set, got an empty text")
    endings = ", ".join(_SUFFIXES)
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise NotAvailableError(
            f"source: {name!r} does not end in {endings}, and data sets by name need the package datasets; "
            "pip install 'pyarith[eval]'"
        ) from error
    loaded: Iterable[Any] = datasets.load_dataset(name, subset, split=split)
    return loaded


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
