"""The step ``transfer``: lists of heads of a run, ablated on tasks that they were not found on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarith import tasks
from pyarith.errors import InputError, check
from pyarith.evaluation.heads import HeadList, load_heads, save_heads
from pyarith.evaluation.items import load_items
from pyarith.evaluation.tasks import Task, named_task
from pyarith.evaluation.transfer_result import TransferResult
from pyarith.reporting.files import file_hash
from pyarith.reporting.knockouts import choose
from pyarith.reporting.saved import SavedRun
from pyarith.reporting.steps import Step
from pyarith.reporting.tables import write_csv
from pyarith.rows import SUFFIXES
from pyarith.tasks.tables import ALIASES, NAMES

BASELINES = ("mean", "zero")
TASKS = (*tasks.OPERATORS, *tasks.ARITHMETIC_TASKS, *tasks.CONTROL_TASKS)


@dataclass(frozen=True)
class Drawn:
    """Tasks by name, what there is to say about some, and the names of those that cannot be drawn with why."""

    tasks: dict[str, Task] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def key_lists(run: SavedRun, signs: Sequence[str], top: int, threshold: float) -> dict[str, HeadList]:
    """Operator -> its ``top`` strongest heads below ``threshold``."""
    found = {}
    for sign in signs:
        heads = run.key_heads(sign, threshold)[:top]
        effects = {str(head): float(run.effects(sign)[head]) for head in heads}
        meta = {"operator": sign, "effects": effects, "threshold": threshold, "top": top, "run": run.identity}
        found[sign] = HeadList(tuple(heads), meta=meta)
    return found


def read_lists(files: Sequence[Path]) -> dict[str, HeadList]:
    """Lists of heads from files of ``save_heads``, by the names of the files without their ending.

    Raises:
        InputError: a file that is none, or two of one name.
    """
    return {name: load_heads(path) for name, path in _by_name("heads", files).items()}


def fitted(lists: Mapping[str, HeadList], model: Any) -> list[str]:
    """Check lists against a model; what there is to say about some.

    Raises:
        InputError: a list does not fit.
    """
    remarks = []
    for name, one in lists.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                one.check(model)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        remarks += [f"{name}: {warning.message}" for warning in caught]
    return remarks


def default_tasks(lists: Mapping[str, HeadList]) -> list[str]:
    """The operators that some list was not found on, the further arithmetic tasks, and tasks without arithmetic."""
    own = {one.meta.get("operator") for one in lists.values()}
    operators = [sign for sign in tasks.OPERATORS if own - {sign}]
    return [*operators, *tasks.ARITHMETIC_TASKS, *tasks.CONTROL_TASKS]


def known_tasks(names: Sequence[str]) -> list[str]:
    """Names of tasks, operators by their sign, each once.

    Raises:
        InputError: unknown ones; all are named.
    """
    found = [ALIASES.get(name.lower(), name) for name in names]
    unknown = [name for name in found if name not in TASKS]
    check(not unknown, f"task: expected some of {', '.join(TASKS)}, got {', '.join(map(repr, unknown))}")
    return list(dict.fromkeys(found))


def known_files(files: Sequence[Path]) -> dict[str, Path]:
    """Files of prompts and answers, by their names.

    Raises:
        InputError: a file that does not exist or ends otherwise, two of one name, or one that is called like a task.
    """
    for path in files:
        fits = path.suffix.lower() in SUFFIXES
        check(fits, f"data: expected a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")
        check(path.is_file(), f"data: expected a file, got {str(path)!r}, which does not exist")
    found = _by_name("data", files)
    taken = [name for name in found if name in TASKS]
    check(not taken, f"data: expected other names than those of tasks, got {', '.join(taken)}; rename the file")
    return found


def _by_name(what: str, files: Sequence[Path]) -> dict[str, Path]:
    found = {path.stem: path for path in files}
    check(
        len(found) == len(files),
        f"{what}: expected files of different names, got {', '.join(map(str, files))}; rename some",
    )
    return found


def identity(lists: Sequence[Path], data: Mapping[str, Path]) -> dict[str, Any]:
    """What the settings of the step say of files: their hashes."""
    return {
        "heads": [{"file": str(path), "hash": file_hash(path)} for path in lists],
        "data": [{"file": str(path), "hash": file_hash(path)} for path in data.values()],
    }


def draw(
    run: SavedRun, tokenizer: Any, names: Sequence[str], data: Mapping[str, Path], n: int, seed: int, *, strict: bool
) -> Drawn:
    """The items of all tasks: of an operator of the run, prompts that the run does not have.

    Args:
        names: of tasks; data: files by name, of which the first ``n`` rows are taken.
        n, seed: of the draw; fewer where a task has fewer.
        strict: raise where a named task cannot be drawn; else it is left out, with the reason.
    Raises:
        InputError: a file that cannot be read; with ``strict`` also a task that cannot be drawn; no task is left.
    """
    found = Drawn()
    for name in names:
        try:
            if name in run.signs:
                chosen = choose(run, tokenizer, name, "fresh", n, seed)
                found.tasks[name], found.words[name] = chosen.pairs, chosen.words
            else:
                found.tasks[name] = named_task(tokenizer, name, n, seed)
        except InputError as error:
            if strict:
                raise InputError(f"task {name}: {error}") from None
            found.left_out[name] = str(error)
    found.tasks.update({name: load_items(path, limit=n) for name, path in data.items()})
    reasons = "; ".join(f"{name}: {why}" for name, why in found.left_out.items())
    check(bool(found.tasks), f"task: none of the tasks can be drawn with this tokenizer ({reasons})")
    return found


def write_step(step: Step, result: TransferResult, lists: Mapping[str, HeadList], model: Any) -> None:
    """result.json, transfer.csv, and each list of heads as a file that ``--heads`` and ``load_heads`` read."""
    result.save(step.file("result.json"))
    write_csv(step.file("transfer.csv"), result.rows())
    for name, one in lists.items():
        save_heads(step.file(f"heads_{NAMES.get(name, name)}.json"), one.heads, one.meta, model=model)


def content(result: TransferResult, lists: Mapping[str, HeadList], drawn: Drawn) -> dict[str, Any]:
    """What transfer.json says beside the settings."""
    return {
        "lists": {name: [str(head) for head in one.heads] for name, one in lists.items()},
        "tasks": result.settings["tasks"],
        "drawn": drawn.words,
        "not_done": drawn.left_out,
        "never_right": list(result.never_right),
        "rows": result.rows(),
    }
