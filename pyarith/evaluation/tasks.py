"""Tasks by name or as they are given, what is said of them in a record, and what statistics resample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyarith.errors import AlignmentError, InputError, InputTypeError, check
from pyarith.evaluation.items import Items, as_items
from pyarith.prompts import PromptPairs
from pyarith.stats import Clusters
from pyarith.tasks import OPERATORS, arithmetic, draw_problems, problem_pairs

_LEAST = 5  # clusters of a factor that an interval needs

Task = PromptPairs | Items


def as_tasks(tasks: Any, tokenizer: Any, n: int, seed: int) -> dict[str, Task]:
    """Tasks by name, from a mapping or from names of tasks; see ``transfer``.

    Raises:
        InputError, InputTypeError: none, an unknown name, or items that are none.
    """
    if not isinstance(tasks, Mapping):
        listed = isinstance(tasks, list | tuple) and all(isinstance(name, str) for name in tasks)
        check(listed, "tasks: expected a mapping of names to items, or a list of names of tasks", InputTypeError)
        tasks = {name: named_task(tokenizer, name, n, seed) for name in tasks}
    check(len(tasks) > 0, "tasks: expected at least one, got none")
    return {
        str(name): one if isinstance(one, PromptPairs) else as_items(one, f"tasks[{name!r}]")
        for name, one in tasks.items()
    }


def named_task(tokenizer: Any, name: str, n: int = 100, seed: int = 0) -> Task:
    """A task of ``pyarith.tasks`` by its name: ``PromptPairs`` where its answers are one token, else ``Items``.

    Args:
        name: an operator, or one of ``tasks.ARITHMETIC_TASKS`` and ``tasks.CONTROL_TASKS``.
        n: pairs or items; fewer where the task has fewer.
    Raises:
        InputError: an unknown name.
    """
    if name in OPERATORS:
        return arithmetic(tokenizer, name, n=n, seed=seed)
    try:
        return problem_pairs(tokenizer, name, n, seed, fewer=True)
    except AlignmentError:
        return Items.from_problems(draw_problems(name, n, seed, fewer=True))


def described(items: Task) -> dict[str, Any]:
    """How a task's answers were read, and where it comes from."""
    way = "most probable token" if isinstance(items, PromptPairs) else f"greedy continuation, {items.kind}"
    return {"items": len(items), "answers": way, "source": {k: str(v) for k, v in items.settings.items()}}


def clusters_of(items: Task) -> Clusters | None:
    """What the statistics of a task resample: pair and template, the one with 5 values, or items; None: too few."""
    try:
        found = Clusters.of(items)
    except InputError:
        found = Clusters.of({"item": np.arange(len(items))})
    enough = [name for name, size in found.sizes.items() if size >= _LEAST]
    if len(enough) == len(found.names):
        return found
    return found.only(enough[0]) if enough else None
