"""The step ``tune``: which heads of a run are trained, and on what."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyarith import tasks
from pyarith.errors import check
from pyarith.evaluation.heads import HeadList, load_heads
from pyarith.reporting.files import file_hash
from pyarith.reporting.saved import SavedRun
from pyarith.rows import SUFFIXES
from pyarith.tasks.tables import ALIASES
from pyarith.tuning.data import BAD, Examples, load_examples, task_examples
from pyarith.types import Head

TASKS = (*tasks.OPERATORS, *tasks.ARITHMETIC_TASKS, *tasks.CONTROL_TASKS)


@dataclass(frozen=True)
class ChosenHeads:
    """Heads to train, and how they came about.

    Attributes:
        heads: strongest first, or as given.
        words: where they come from, in a sentence.
        effects: head -> operator -> relative effect, of heads of the run.
    """

    heads: tuple[Head, ...]
    words: str
    effects: dict[Head, dict[str, float]]

    @property
    def not_negative(self) -> tuple[Head, ...]:
        """Those of them that lower the answer's logit for no operator."""
        return tuple(head for head in self.heads if not any(effect < 0 for effect in self.effects[head].values()))


def choose_heads(
    run: SavedRun,
    *,
    top: int | None = None,
    heads: Sequence[str] = (),
    file: Path | None = None,
    operator: str | None = None,
) -> ChosenHeads:
    """The heads that a command names: the top of the run's ranking, a list, or a file of ``save_heads``.

    Args:
        top: so many with the most negative effect, by ``operator`` or else by the mean rank over the run's operators.
        heads: texts such as ``"12.22"``.
        file: a list of heads.
        operator: one of the run's.
    Raises:
        InputError: not just one way is used, an operator that the run does not have, more heads than there are, heads
            that the model does not have or that stand twice (all are named).
    """
    ways = [name for name, given in (("--heads", top), ("--head", heads), ("--head-file", file)) if given]
    check(len(ways) <= 1, f"heads: expected one of --heads, --head and --head-file, got {' and '.join(ways)}")
    check(top is None or top >= 1, f"heads: expected a whole number >= 1, got {top}")
    operator = None if operator is None else ALIASES.get(operator.lower(), operator)
    check(
        operator is None or operator in run.signs,
        f"operator: expected one of the run's ({', '.join(run.signs)}), got {operator!r}",
    )
    check(operator is None or top is not None, "operator: expected --heads N beside it, whose ranking it names")
    signs = run.signs if operator is None else (operator,)
    effects = {sign: run.effects(sign) for sign in run.signs}
    shape = effects[run.signs[0]].shape
    if top is not None:
        most = int(np.prod(shape))
        check(top <= most, f"heads: expected at most the {most} heads of the model, got {top}")
        chosen = pooled_ranking([run.ranking(sign) for sign in signs], [effects[sign] for sign in signs])[:top]
        words = (
            f"top {top} by effect on {signs[0]}"
            if len(signs) == 1
            else f"top {top} by mean rank over {' '.join(signs)}"
        )
    elif file is not None:
        found: HeadList = load_heads(file)
        sizes = (found.n_layers, found.n_heads)
        check(
            None in sizes or sizes == shape,
            f"head-file: {file} was made for a model with {sizes[0]} layers of {sizes[1]} heads, the run's has "
            f"{shape[0]} of {shape[1]}",
        )
        chosen, words = found.heads, f"from {file}"
    else:
        chosen, words = tuple(Head.parse(text) for text in heads), "as given"
    wrong = [str(head) for head in chosen if not (head.layer < shape[0] and head.head < shape[1])]
    twice = sorted({str(head) for head in chosen if chosen.count(head) > 1})
    text = f"heads: expected heads 0.0 to {shape[0] - 1}.{shape[1] - 1}, each once"
    check(not wrong, f"{text}, got {', '.join(wrong)}")
    check(not twice, f"{text}, got twice {', '.join(twice)}")
    own = {head: {sign: float(effects[sign][head]) for sign in signs} for head in chosen}
    return ChosenHeads(chosen, words, own)


def pooled_ranking(rankings: Sequence[Sequence[Head]], effects: Sequence[np.ndarray]) -> tuple[Head, ...]:
    """All heads by the mean, over operators, of their place in the operator's ranking.

    Equal means are ordered by the mean effect. With one operator this is its own ranking.
    """
    places: dict[Head, list[int]] = {}
    for ranking in rankings:
        for place, head in enumerate(ranking):
            places.setdefault(head, []).append(place)
    means = {head: float(np.mean([np.nan_to_num(one[head]) for one in effects])) for head in places}
    return tuple(sorted(places, key=lambda head: (sum(places[head]), means[head], head)))


def data_identity(data: str, n: int, seed: int) -> dict[str, Any]:
    """What the settings of a step say of its data: the file's hash, or the task and its draw.

    Raises:
        InputError: a path that ends like a file of rows and is none.
    """
    if data in TASKS:
        return {"task": data, "n": n, "seed": seed}
    path = Path(data)
    if path.suffix.lower() not in SUFFIXES:
        return {"name": data}
    check(path.is_file(), f"data: expected a file or one of the tasks {', '.join(TASKS)}, got {data!r}")
    return {"file": data, "hash": file_hash(path)}


def read_data(data: str, tokenizer: Any, n: int, seed: int, **options: Any) -> Examples:
    """Examples of a task by its name, of a file, or of a data set of the hub; what is left out is in the settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the command says it in a line of its own
        if data in TASKS:
            named = [name for name in ("prompt", "completion") if options.pop(name, None) is not None]
            check(not named, f"{', '.join(named)}: expected none with the task {data!r}, which has no columns")
            return task_examples(tokenizer, data, n, seed, **options)
        return load_examples(data, tokenizer, **options)


def left_out(examples: Examples) -> list[str]:
    """In words, which rows are missing and why."""
    rows = examples.settings.get("dropped_rows", {})
    return [
        f"{len(found)} left out: {BAD[reason]} (row {', '.join(map(str, found[:8]))}"
        f"{f' and {len(found) - 8} more' if len(found) > 8 else ''})"
        for reason, found in rows.items()
    ]
