"""Rows for evaluation and tuning: from JSON lines, JSON, CSV, TSV or a data set by name; which columns hold what."""

from __future__ import annotations

import csv
import importlib
import io
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarith.errors import InputError, NotAvailableError, check

# name, columns that must be there, prompt as a template of columns, column of what should follow it
Layout = tuple[str, tuple[str, ...], str, str]

# the first that fits is taken
KNOWN: tuple[Layout, ...] = (
    ("generic", ("prompt", "answer"), "{prompt}", "answer"),
    ("svamp", ("Body", "Question", "Answer"), "Q: {Body} {Question}\nA:", "Answer"),
    ("addsub", ("sQuestion", "lSolutions"), "Q: {sQuestion}\nA:", "lSolutions"),
    ("gsm8k", ("question", "answer"), "Q: {question}\nA:", "answer"),
)
SUFFIXES = {".jsonl": "json lines", ".ndjson": "json lines", ".json": "json", ".csv": ",", ".tsv": "\t"}
ON_BAD = ("raise", "drop")
SHOWN = 5  # rows named in a message before "and n more"


def read_rows(source: str | Path, split: str = "test", subset: str | None = None) -> Iterable[Any]:
    """The rows of a file, or of a data set of the Hugging Face hub.

    Args:
        source: a path that ends in one of ``SUFFIXES``; anything else is a name for ``datasets.load_dataset``.
        split, subset: for ``load_dataset`` (subset is its configuration).
    Raises:
        InputError: no such file, or not the format; the message names the line.
        NotAvailableError: a hub name without the package ``datasets``.
    """
    path = Path(source)
    return _from_file(path) if path.suffix.lower() in SUFFIXES else _from_hub(str(source), split, subset)


def columns_of(table: Iterable[Any]) -> list[str]:
    """The keys of all rows that have some, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in table if isinstance(row, Mapping) for key in row))


def choose_layout(
    columns: list[str], known: Sequence[Layout], prompt: str | None, target: str | None, name: str, target_name: str
) -> tuple[str, str, str]:
    """(name of the layout, template of the prompt, column of what should follow it).

    Args:
        columns: those of the table.
        known: layouts that are recognised, the first that fits first.
        prompt, target: a column or template, and a column, where the caller said so.
        name: of the table, for messages.
        target_name: what ``target`` is called, such as ``"answer"``.
    Raises:
        InputError: nothing is recognised, a column is not there, or a broken template.
    """
    fitting = [one for one in known if set(one[1]) <= set(columns)]
    template = None if prompt is None else prompt if slots(prompt) else f"{{{prompt}}}"
    if template is not None and target is not None:
        layout, column = "given", target
    elif fitting:
        layout, _, recognised, right = fitting[0]
        template, column = template or recognised, target or right
    else:
        lists = "; ".join(f"{one[0]}: {', '.join(one[1])}" for one in known)
        raise InputError(
            f"{name}: expected columns that are recognised ({lists}), got {columns}; say which hold the question and "
            f"the {target_name}: prompt='...', {target_name}='...'"
        )
    missing = [slot for slot in [*slots(template), column] if slot not in columns]
    check(
        not missing, f"{name}: expected columns {missing} (prompt={prompt!r}, {target_name}={target!r}), got {columns}"
    )
    return layout, template, column


def slots(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        InputError: a broken template.
    """
    try:
        return [slot for _, slot, _, _ in string.Formatter().parse(template) if slot]
    except ValueError as error:
        raise InputError(
            f"prompt: expected a column or a template with {{columns}}, got {template!r} ({error})"
        ) from None


def report_bad(
    bad: Mapping[str, Sequence[int]],
    words: Mapping[str, str],
    total: int,
    left: int,
    expected: str,
    on_bad: str,
) -> None:
    """Raise one error that names every kind of bad row with its numbers, unless they may be dropped and some are left.

    Args:
        bad: reason -> numbers of rows.
        words: reason -> in words.
        total, left: rows there were, and rows that can be used.
        expected: beginning of the message, with the name of the table.
        on_bad: ``"raise"`` or ``"drop"``.
    Raises:
        InputError.
    """
    if not bad or (on_bad == "drop" and left):
        return
    parts = []
    for reason, found in bad.items():
        shown = ", ".join(map(str, found[:SHOWN])) + more(found)
        parts.append(f"{words[reason]} in {len(found)} (row {shown})")
    what = "correct them or pass on_bad='drop'" if left else "none is left"
    raise InputError(f"{expected} in each of {total} rows, got {'; '.join(parts)}: {what}")


def more(found: Sequence[Any]) -> str:
    """``" and 3 more"``, or nothing where all were shown."""
    return f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""


def _from_file(path: Path) -> Iterable[Any]:
    check(path.is_file(), f"source: expected a file, got {path}, which does not exist; check the path")
    form = SUFFIXES[path.suffix.lower()]
    text = _text(path)
    if form == "json":
        value = _parse(text, str(path))
        check(
            isinstance(value, list),
            f"{path}: expected a list of objects, got {type(value).__name__}; one object a line belongs in a .jsonl",
        )
        return list(value)
    if form == "json lines":
        lines = text.split("\n")
        return [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=form))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, got other bytes ({error}); convert it") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected JSON, got {text[:60]!r} ({error})") from None


def _from_hub(name: str, split: str, subset: str | None) -> Iterable[Any]:
    check(bool(name), "source: expected a path or the name of a data set, got an empty text")
    endings = ", ".join(SUFFIXES)
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise NotAvailableError(
            f"source: {name!r} does not end in {endings}, and data sets by name need the package datasets; "
            "pip install 'pyarith[eval]'"
        ) from error
    loaded: Iterable[Any] = datasets.load_dataset(name, subset, split=split)
    return loaded
