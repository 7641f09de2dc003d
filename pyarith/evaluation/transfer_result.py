"""What ``transfer`` returns: a cell per task and list of heads, as rows, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.errors import InputError, NotAvailableError, check
from pyarith.stats import benjamini_hochberg
from pyarith.types import Head

_FORMAT = 1


@dataclass(frozen=True)
class Control:
    """Draws of a control: the heads of each, accuracy and relative drops [draw].

    ``p`` = (1 + draws whose accuracy is at most the list's) / (1 + draws): small where the list harms more than it.
    """

    heads: tuple[tuple[Head, ...], ...]
    accuracy: tuple[float, ...]
    relative_drop: tuple[float, ...]
    relative_drop_correct: tuple[float, ...]
    p: float


@dataclass(frozen=True, eq=False)
class Cell:
    """One task under one list of heads.

    Attributes:
        task, heads: names; head_names: the heads, such as ``"9.6"``.
        n, right_intact, right: items, and how many the intact and the ablated model get right.
        relative_drop, relative_drop_correct: see ``transfer``; NaN where the intact model is never right.
        difference, low, high, p: accuracy minus intact accuracy with interval and two-sided p by clusters of items;
            NaN where there are too few.
        lost, gained: items that only the intact, only the ablated model gets right.
        p_mcnemar: exact two-sided McNemar test of lost against gained, items as independent.
        method: of interval and p.
        correct: bool [item], the ablated model.
        controls: by name.
    """

    task: str
    heads: str
    head_names: tuple[str, ...]
    n: int
    right_intact: int
    right: int
    relative_drop: float
    relative_drop_correct: float
    difference: float
    low: float
    high: float
    p: float
    lost: int
    gained: int
    p_mcnemar: float
    method: str
    correct: np.ndarray
    controls: dict[str, Control]

    @property
    def accuracy_intact(self) -> float:
        return self.right_intact / self.n

    @property
    def accuracy(self) -> float:
        return self.right / self.n


@dataclass(frozen=True, eq=False, repr=False)
class TransferResult:
    """Tasks by lists of heads.

    Attributes:
        tasks, head_lists: names, in order.
        cells: task by task, list by list.
        intact: task -> bool [item], the intact model.
        settings: baselines by task, draws, seed, how each task's answers were read.
    """

    tasks: tuple[str, ...]
    head_lists: tuple[str, ...]
    cells: tuple[Cell, ...]
    intact: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    def cell(self, task: str, heads: str) -> Cell:
        """The cell of a task and a list.

        Raises:
            InputError: there is none of these names.
        """
        for one in self.cells:
            if (one.task, one.heads) == (task, heads):
                return one
        raise InputError(
            f"cell: expected a task of {self.tasks} and heads of {self.head_lists}, got {task!r}, {heads!r}"
        )

    def matrix(self, name: str = "relative_drop_correct") -> np.ndarray:
        """fp64 [task, list] of one number of the cells, such as ``accuracy`` or ``relative_drop``."""
        values = [[getattr(self.cell(task, heads), name) for heads in self.head_lists] for task in self.tasks]
        return np.array(values, dtype=np.float64)

    @property
    def never_right(self) -> tuple[str, ...]:
        """Tasks that the intact model never gets right: nothing to knock out."""
        return tuple(task for task in self.tasks if not self.intact[task].any())

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per cell: its numbers, q (Benjamini-Hochberg over all cells' p), and of each control mean,
        minimum and maximum of the accuracy, mean relative drops and p."""
        adjusted = benjamini_hochberg([one.p for one in self.cells])
        rows = []
        for one, q in zip(self.cells, adjusted, strict=True):
            row = {"task": one.task, "heads": one.heads, "k": len(one.head_names), "n": one.n}
            row |= {"accuracy_intact": one.accuracy_intact, "accuracy": one.accuracy}
            numbers = ("relative_drop", "relative_drop_correct", "difference", "low", "high", "p", "lost", "gained")
            row |= {name: getattr(one, name) for name in numbers} | {"p_mcnemar": one.p_mcnemar, "q": float(q)}
            for name, control in one.controls.items():
                accuracies = np.array(control.accuracy)
                row |= {f"{name}_{how.__name__}": float(how(accuracies)) for how in _SUMMARIES}
                row[f"{name}_relative_drop"] = float(np.mean(control.relative_drop))
                row[f"{name}_relative_drop_correct"] = float(np.mean(control.relative_drop_correct))
                row[f"{name}_p"] = control.p
            rows.append(row)
        return rows

    def to_dataframe(self) -> Any:
        """``rows`` as a pandas table.

        Raises:
            NotAvailableError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise NotAvailableError("to_dataframe: needs pandas; pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def save(self, path: str | Path) -> None:
        """Write everything as one JSON file; NaN becomes null."""
        cells = [{**asdict(one), "correct": _packed(one.correct)} for one in self.cells]
        record = {"format": _FORMAT, "tasks": self.tasks, "head_lists": self.head_lists, "cells": cells}
        record |= {"intact": {task: _packed(right) for task, right in self.intact.items()}, "settings": self.settings}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_without_nan(record), indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TransferResult:
        """Read what ``save`` wrote.

        Raises:
            InputError: no such file, or not such a file.
        """
        path = Path(path)
        check(path.is_file(), f"path: expected a file written by save, got {path}, which does not exist")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: expected JSON written by save ({error})") from None
        known = isinstance(record, dict) and record.get("format") == _FORMAT and "cells" in record
        check(known, f"{path}: expected a transfer result of format {_FORMAT}")
        cells = tuple(_cell(one) for one in record["cells"])
        intact = {task: _unpacked(text) for task, text in record["intact"].items()}
        return cls(tuple(record["tasks"]), tuple(record["head_lists"]), cells, intact, record["settings"])

    def __repr__(self) -> str:
        wide = max(12, *(len(task) for task in self.tasks)) + 1
        head = f"{'task':<{wide}}{'items':>6}{'intact':>8}"
        lines = [
            "Transfer: accuracy with the heads ablated, relative drop on initially correct items, mean of the controls",
            head + "".join(f"  {name}" for name in self.head_lists),
        ]
        for task in self.tasks:
            row = [self.cell(task, name) for name in self.head_lists]
            line = f"{task:<{wide}}{row[0].n:>6}{row[0].accuracy_intact:>8.1%}"
            for one in row:
                drop = "never right" if math.isnan(one.relative_drop_correct) else f"{one.relative_drop_correct:+.1%}"
                means = [f"{name} {np.mean(control.accuracy):.1%}" for name, control in one.controls.items()]
                line += f"  {one.accuracy:.1%} ({drop}; {', '.join(means) or 'no controls'})"
            lines.append(line)
        if self.never_right:
            lines.append(f"never right in the intact model, so nothing to knock out: {', '.join(self.never_right)}")
        return "\n".join(lines)


_SUMMARIES: tuple[Callable[[Any], Any], ...] = (np.mean, np.min, np.max)


def _packed(right: np.ndarray) -> str:
    return "".join("01"[int(one)] for one in right)


def _unpacked(text: str) -> np.ndarray:
    return np.array([mark == "1" for mark in text])


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(record: dict[str, Any]) -> Cell:
    floats = {one.name for one in fields(Cell) if one.type == "float"}
    values: dict[str, Any] = {
        name: float("nan") if name in floats and value is None else value for name, value in record.items()
    }
    values |= {"correct": _unpacked(record["correct"]), "head_names": tuple(record["head_names"])}
    values["controls"] = {name: _control(one) for name, one in record["controls"].items()}
    return Cell(**values)


def _control(record: dict[str, Any]) -> Control:
    numbers = {
        name: tuple(float("nan") if value is None else value for value in record[name])
        for name in ("accuracy", "relative_drop", "relative_drop_correct")
    }
    heads = tuple(tuple(Head(*head) for head in draw) for draw in record["heads"])
    return Control(heads, numbers["accuracy"], numbers["relative_drop"], numbers["relative_drop_correct"], record["p"])
