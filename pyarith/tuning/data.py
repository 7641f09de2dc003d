"""Training examples: token ids, and which of them are to be predicted. From files, rows, problems or prompt pairs."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyarith import tasks
from pyarith.boundary import encode_pairs
from pyarith.errors import InputTypeError, check
from pyarith.prompts import SPACES, Aligner, PromptPairs
from pyarith.rows import KNOWN, ON_BAD, SHOWN, Layout, choose_layout, columns_of, more, read_rows, report_bad, slots
from pyarith.tuning.chat import chat_example

COLUMNS: tuple[Layout, ...] = (("completion", ("prompt", "completion"), "{prompt}", "completion"), *KNOWN)
MESSAGES = "messages"
BAD = {
    "not_a_row": "no object and no (prompt, completion)",
    "missing_column": "a column is missing",
    "not_text": "something that is not text",
    "empty_prompt": "the prompt is empty",
    "empty_completion": "the completion is empty",
    "unknown": "text in the completion that the tokenizer does not know",
    "boundary": "the tokenizer joins the end of the prompt with the beginning of the completion",
    "no_assistant": "no message of the assistant",
    "template": "the chat template refuses the messages",
    "rewritten": "the chat template writes earlier messages differently when later ones follow",
    "too_long": "too many tokens",
}


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Token sequences with the tokens that count in the loss.

    Attributes:
        ids: int64 [pos] each.
        trained: bool [pos] each, True on tokens to be predicted; never on the first, which nothing precedes.
        rows: int64 [example], the number of the row that each came from, counted from 1.
        settings: where the examples come from, how they were made, and how many rows were left out, by reason.
    """

    ids: tuple[np.ndarray, ...]
    trained: tuple[np.ndarray, ...]
    rows: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {"ids": len(self.ids), "trained": len(self.trained), "rows": len(self.rows)}
        check(len(set(sizes.values())) == 1, f"examples: expected equal lengths, got {sizes}")
        check(len(self.ids) > 0, "examples: expected at least one, got none")
        wrong = [
            int(row)
            for row, ids, trained in zip(self.rows, self.ids, self.trained, strict=True)
            if ids.shape != trained.shape or trained.dtype != bool or not trained.any() or trained[0]
        ]
        check(
            not wrong,
            "trained: expected a bool for each token, some of them True and the first False, got others in rows "
            f"{wrong[:SHOWN]}{more(wrong)}",
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [example], tokens."""
        return np.array([len(ids) for ids in self.ids])

    @cached_property
    def targets(self) -> np.ndarray:
        """int64 [example], tokens that count in the loss."""
        return np.array([int(trained.sum()) for trained in self.trained])

    @cached_property
    def hash(self) -> str:
        """``sha256:...`` of ids and of what counts, in order."""
        digest = hashlib.sha256()
        for ids, trained in zip(self.ids, self.trained, strict=True):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, "<i8").tobytes() + trained.tobytes())
        return f"sha256:{digest.hexdigest()}"

    def record(self) -> dict[str, Any]:
        """What a run's record says of its data."""
        sizes = {"examples": len(self), "tokens": int(self.lengths.sum()), "completion_tokens": int(self.targets.sum())}
        return {**self.settings, **sizes, "longest": int(self.lengths.max()), "hash": self.hash}

    def __repr__(self) -> str:
        left, counted, total = sum(self.settings.get("dropped", {}).values()), self.targets.sum(), self.lengths.sum()
        return (
            f"Examples({len(self)} examples of {self.lengths.min()}-{self.lengths.max()} tokens, {counted:,} of "
            f"{total:,} tokens in the loss, {left} rows left out)"
        )


def load_examples(
    data: Any,
    tokenizer: Any,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    space: str | None = None,
    eos: bool | None = None,
    max_length: int | None = None,
    on_bad: str = "raise",
    limit: int | None = None,
    split: str = "train",
    subset: str | None = None,
) -> Examples:
    """Examples for supervised fine-tuning; the loss is on the completion, or on the assistant's messages, only.

        ids = encode(prompt + space + completion) [+ end of text], provided that encode(prompt) is how they begin

    Recognised columns (the first that fits): ``prompt, completion``; ``prompt, answer``; SVAMP's ``Body, Question,
    Answer``; AddSub's ``sQuestion, lSolutions``; GSM8K's ``question, answer`` (the answer with its working); else
    ``messages``, a list of ``{"role": ..., "content": ...}`` that the tokenizer's chat template writes out.

    Args:
        data: a path that ends in .jsonl, .ndjson, .json, .csv or .tsv; the name of a data set of the hub; rows as
            objects; ``(prompt, completion, ...)`` tuples such as ``tasks.draw_problems`` gives; ``PromptPairs``, whose
            ids are taken as they are; or ``Examples``, which are returned.
        tokenizer: any Hugging Face tokenizer; its special tokens are added as it does by default.
        prompt, completion: a column (or a template such as ``"{context}\\n{question}\\nA:"``) and a column; None =
            recognised.
        space: spaces where prompt and completion meet count as one, and one is put where there is no white space.
            ``"answer"``: it belongs to the completion; ``"prompt"``: to the prompt; None: the first of these that lets
            the prompt's tokens stay what they are in all rows, or in most; ``"none"``: joined just as they are.
        eos: put the end-of-text token behind each completion; None = where the tokenizer has one and ``data`` are no
            ``PromptPairs``. Chat templates end their messages themselves.
        max_length: most tokens of an example.
        on_bad: ``"raise"`` names the rows that cannot be used, of all kinds, in one error; ``"drop"`` leaves them out,
            warns, and counts them in ``settings["dropped"]`` and, with their numbers, in ``settings["dropped_rows"]``.
        limit: only the first so many rows.
        split, subset: of a data set of the hub.
    Returns:
        ``Examples``; rows are counted from 1 (of a CSV file without its header). Nothing is ever truncated.
    Raises:
        InputError: no such file, not the format, columns missing, bad rows, none left; the message names them.
        InputTypeError: ``data`` or ``tokenizer`` are something else.
        NotAvailableError: a hub name without the package ``datasets``.
    Warns:
        UserWarning: rows were left out.
    """
    if isinstance(data, Examples):
        return data
    check(on_bad in ON_BAD, f"on_bad: expected one of {ON_BAD}, got {on_bad!r}")
    sides = (None, *SPACES, "none")
    check(space in sides, f"space: expected one of {sides}, got {space!r}")
    for name, value in (("limit", limit), ("max_length", max_length)):
        whole = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
        check(whole, f"{name}: expected None or a whole number >= 1, got {value!r}")
    aligner = Aligner(tokenizer)
    if isinstance(data, PromptPairs):
        made = _of_pairs(data, eos)
        name, table = "PromptPairs", list(range(len(data)))
    else:
        name, table = _table(data, limit, split, subset)
        columns = columns_of(table)
        made = _Made(settings={"source": name})
        if MESSAGES in columns and prompt is None and not any(set(one[1]) <= set(columns) for one in COLUMNS):
            _of_chat(table, tokenizer, made)
        else:
            _of_text(table, columns, name, aligner, prompt, completion, space, eos, made)
    kept = made.within(max_length)
    words = BAD if max_length is None else {**BAD, "too_long": f"more than {max_length} tokens"}
    if made.first_refusal:
        words = {**words, "template": f"{BAD['template']} (first: {made.first_refusal})"}
    report_bad(made.bad, words, len(table), len(kept), f"{name}: expected a prompt and a completion", on_bad)
    dropped = {reason: len(rows) for reason, rows in made.bad.items()}
    if dropped:
        told = ", ".join(f"{number} with {words[reason]}" for reason, number in dropped.items())
        warnings.warn(f"{name}: left out {sum(dropped.values())} of {len(table)} rows: {told}", stacklevel=2)
    settings = {**made.settings, "rows": len(table), "max_length": max_length}
    settings |= {"dropped": dropped, "dropped_rows": made.bad}
    ids, trained = ([column[row] for row in kept] for column in (made.ids, made.trained))
    return Examples(tuple(ids), tuple(trained), np.array(kept), settings)


def task_examples(tokenizer: Any, task: str, n: int = 200, seed: int = 0, **options: Any) -> Examples:
    """Examples of ``tasks.draw_problems(task, n, seed)``: an operator such as ``"/"``, or a task such as ``"power"``.

    Args:
        options: for ``load_examples``.
    """
    made = load_examples(tasks.draw_problems(task, n, seed), tokenizer, **options)
    return Examples(made.ids, made.trained, made.rows, {**made.settings, "source": task, "n": n, "seed": seed})


@dataclass
class _Made:
    """Examples and bad rows by number, while they are made."""

    settings: dict[str, Any]
    ids: dict[int, np.ndarray] = field(default_factory=dict)
    trained: dict[int, np.ndarray] = field(default_factory=dict)
    bad: dict[str, list[int]] = field(default_factory=dict)
    first_refusal: str = ""

    def add(self, number: int, ids: Sequence[int], trained: np.ndarray) -> None:
        self.ids[number], self.trained[number] = np.asarray(ids, np.int64), trained

    def refuse(self, reason: str, number: int) -> None:
        self.bad.setdefault(reason, []).append(number)

    def within(self, max_length: int | None) -> list[int]:
        """The numbers of rows that are not too long; the others are refused."""
        kept = []
        for number, ids in self.ids.items():
            if max_length is None or len(ids) <= max_length:
                kept.append(number)
            else:
                self.refuse("too_long", number)
        return kept


def _table(data: Any, limit: int | None, split: str, subset: str | None) -> tuple[str, list[Any]]:
    """(name, rows)."""
    if isinstance(data, str | Path):
        name, rows = str(data), read_rows(data, split, subset)
    else:
        listed = isinstance(data, Iterable) and not isinstance(data, Mapping | bytes)
        check(
            listed,
            f"data: expected a path, rows, (prompt, completion) tuples, PromptPairs or Examples, got "
            f"{type(data).__name__}",
            InputTypeError,
        )
        name, rows = "data", data
    table = list(islice(rows, limit))
    check(len(table) > 0, f"{name}: expected at least one row, got none")
    return name, table


def _of_pairs(pairs: PromptPairs, eos: bool | None) -> _Made:
    """The clean prompts with their one-token answers."""
    check(not eos, "eos: expected None or False for PromptPairs, whose ids are taken as they are, got True")
    made = _Made({"source": "PromptPairs", **pairs.settings, "eos": False})
    for row, length in enumerate(pairs.lengths):
        ids = [*pairs.clean[row, :length].tolist(), int(pairs.answers[row])]
        made.add(row + 1, ids, np.arange(len(ids)) == length)
    return made


def _of_text(
    table: list[Any],
    columns: list[str],
    name: str,
    aligner: Aligner,
    prompt: str | None,
    completion: str | None,
    space: str | None,
    eos: bool | None,
    made: _Made,
) -> None:
    """Prompts with completions, from objects or tuples."""
    if columns:
        layout, template, column = choose_layout(columns, COLUMNS, prompt, completion, name, "completion")
    else:
        layout, template, column = "tuples", "{prompt}", "completion"
        table = [_named(row) for row in table]
    needed = slots(template)
    plain = template == f"{{{needed[0]}}}"  # the text of one column stays as it is
    texts: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(table, start=1):
        found = _texts(row, needed, column)
        if isinstance(found, str):
            made.refuse(found, number)
            continue
        values, answer = found
        text = (
            values[needed[0]] if plain else template.format_map({key: value.strip() for key, value in values.items()})
        )
        texts[number] = (text, answer)
    end, unknown = aligner.tokenizer.eos_token_id, aligner.tokenizer.unk_token_id
    check(not eos or end is not None, "eos: expected a tokenizer with an end-of-text token, this one has none")
    eos = end is not None if eos is None else eos
    side, rows = encode_pairs(texts, aligner, space)
    for number, (short, full) in rows.items():
        if not short or full[: len(short)] != short:
            made.refuse("boundary" if short else "empty_prompt", number)
        elif len(full) == len(short):
            made.refuse("empty_completion", number)
        elif unknown != end and unknown in full[len(short) :]:
            made.refuse("unknown", number)
        else:
            ids = [*full, end] if eos and full[-1] != end else full
            made.add(number, ids, np.arange(len(ids)) >= len(short))
    made.settings |= {"layout": layout, "prompt": template, "completion": column, "space": side, "eos": eos}


def _named(row: Any) -> Any:
    """A (prompt, completion, ...) tuple as an object."""
    pair = isinstance(row, tuple | list) and len(row) >= 2
    return {"prompt": row[0], "completion": row[1]} if pair else row


def _texts(row: Any, needed: list[str], column: str) -> tuple[dict[str, str], str] | str:
    """The values of a row's columns as text; or why it cannot be used."""
    if not isinstance(row, Mapping):
        return "not_a_row"
    if any(slot not in row for slot in [*needed, column]):
        return "missing_column"
    for slot in [*needed, column]:
        if row[slot] is None or (isinstance(row[slot], str) and not row[slot].strip()):
            return "empty_completion" if slot == column else "empty_prompt"
        if not isinstance(row[slot], str | int | float) or isinstance(row[slot], bool):
            return "not_text"
    return {slot: str(row[slot]) for slot in needed}, str(row[column])


def _of_chat(table: list[Any], tokenizer: Any, made: _Made) -> None:
    """Conversations, written out by the tokenizer's chat template."""
    check(
        bool(getattr(tokenizer, "chat_template", None)),
        "tokenizer: expected one with a chat template for rows with messages, got one without; set "
        "tokenizer.chat_template, or give prompt and completion columns",
    )
    for number, row in enumerate(table, start=1):
        messages = row.get(MESSAGES) if isinstance(row, Mapping) else None
        if messages is None:
            made.refuse("missing_column" if isinstance(row, Mapping) else "not_a_row", number)
            continue
        found = chat_example(tokenizer, messages)
        if isinstance(found, tuple):
            made.add(number, *found)
        else:
            made.refuse(found.reason, number)
            made.first_refusal = made.first_refusal or found.words
    made.settings |= {"layout": "messages", "eos": None}
