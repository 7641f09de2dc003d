"""Comparisons of ways of training on arithmetic: how prompts are divided, the usual arms, and the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyarith import tasks
from pyarith.errors import InputError, check
from pyarith.evaluation.generate import first_choices
from pyarith.evaluation.tasks import named_task
from pyarith.models.sites import resolve
from pyarith.prompts import PromptPairs
from pyarith.tuning.arms import Arm, full_arm, head_arm, lora_arm, mask_arm, random_control, same_layer_control
from pyarith.tuning.compare import ArmSummary, Comparison, Point, pack, unpack
from pyarith.tuning.data import Examples, load_examples
from pyarith.tuning.selective import SelectiveTuner
from pyarith.types import Head

TARGET, VALIDATION, UNSEEN = "target", "validation", "unseen pairs"
ARMS = ("key heads", "same layers", "random heads", "bottom heads", "random mask", "LoRA", "early LoRA", "full")
RATES = dict.fromkeys(ARMS, (1e-3, 3e-3, 1e-2)) | {"full": (1e-4, 3e-4, 1e-3)}  # which full tuning needs lower


@dataclass(frozen=True)
class Split:
    """Prompts of one operator divided for training, and the tasks that should stay.

    No prompt of ``tests`` was trained on: those of "target" and "validation" have trained operand pairs in templates
    that were not trained, those of "unseen pairs" have operand pairs that were not trained.
    """

    train: PromptPairs
    tests: dict[str, PromptPairs]
    retention: dict[str, PromptPairs]

    def examples(self, tokenizer: Any) -> Examples:
        """What is trained on: prompts with their one-token answers."""
        return load_examples(self.train, tokenizer)

    def score(self) -> Callable[[Any], dict[str, np.ndarray]]:
        """model -> task -> bool [item]: its most probable token is the answer."""
        every = {**self.tests, **self.retention}
        return lambda model: {
            name: first_choices(model, pairs).numpy() == np.asarray(pairs.answers) for name, pairs in every.items()
        }

    @property
    def sizes(self) -> dict[str, int]:
        parts = {"train": self.train, **self.tests, **self.retention}
        return {name: len(pairs) for name, pairs in parts.items()}


def split_task(tokenizer: Any, sign: str, *, n: int, seed: int, retention: Sequence[str], items: int) -> Split:
    """Divide prompts of an operator: a quarter of the operand pairs and a third of the templates are not trained.

    Args:
        sign: the operator.
        n: prompts drawn, to be divided.
        seed: of the draw and the division.
        retention: names of tasks with one-token answers; "target" itself not among them.
        items: prompts of each of these, fewer where a task has fewer.
    Raises:
        InputError: a part is left without prompts, or a task of ``retention`` has free answers.
    """
    check(sign not in retention, f"retention: expected tasks other than {sign!r}, got it among {list(retention)}")
    pairs = tasks.arithmetic(tokenizer, sign, n=n, seed=seed)
    rng = np.random.default_rng([seed, 13])
    new_pair = _chosen(pairs.strata["pair"], 0.25, rng)
    templates = rng.permutation(np.unique(pairs.strata["template"]))
    third = max(1, len(templates) // 3)
    held, half = templates[:third], max(1, third // 2)
    validated = np.isin(pairs.strata["template"], held[:half])
    tested = np.isin(pairs.strata["template"], held[half:])
    parts = {
        "train": ~new_pair & ~validated & ~tested,
        TARGET: ~new_pair & tested,
        VALIDATION: ~new_pair & validated,
        UNSEEN: new_pair,
    }
    few = [name for name, rows in parts.items() if not rows.any()]
    check(not few, f"n: expected prompts enough for every part, got none for {', '.join(few)} of {n}; draw more")
    others = {}
    for name in retention:
        found = named_task(tokenizer, name, items, seed)
        if not isinstance(found, PromptPairs):
            raise InputError(f"retention: expected tasks with one-token answers, got {name!r}, which has free ones")
        others[name] = found
    chosen = {name: pairs.subset(np.flatnonzero(rows)) for name, rows in parts.items()}
    return Split(chosen.pop("train"), chosen, others)


def _chosen(values: Any, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool [row]: the value is among a share of the different ones."""
    names = rng.permutation(np.unique(values))
    return np.isin(values, names[: max(1, round(share * len(names)))])


def usual_arms(model: Any, ranking: Sequence[Head], k: int, names: Sequence[str] = ARMS) -> tuple[list[Arm], int]:
    """The arms by name, all of the size of the top k heads (but "full"), and that size in parameters.

    Args:
        model: as in ``compare``.
        ranking: all heads, the strongest first.
        k: heads of each arm of heads.
    Raises:
        InputError: an unknown arm; k beyond half of the heads, where top and bottom would meet.
    """
    unknown = [name for name in names if name not in ARMS]
    check(not unknown and bool(names), f"arms: expected some of {', '.join(ARMS)}, got {', '.join(unknown) or 'none'}")
    check(1 <= k <= len(ranking) // 2, f"k: expected 1 to {len(ranking) // 2} heads, got {k}")
    sites, top, bottom = resolve(model), list(ranking[:k]), list(ranking[-k:])
    with SelectiveTuner(model, top) as tuner:
        size = tuner.n_parameters
    early = range(max(1, sites.n_layers // 3))
    made: dict[str, Callable[[], Arm]] = {  # an arm may need a package that is not there
        "key heads": lambda: head_arm("key heads", lambda seed: top),
        "same layers": lambda: head_arm("same layers", same_layer_control(sites, top)),
        "random heads": lambda: head_arm("random heads", random_control(sites, k)),
        "bottom heads": lambda: head_arm("bottom heads", lambda seed: bottom),
        "random mask": lambda: mask_arm("random mask", size),
        "LoRA": lambda: lora_arm("LoRA", size),
        "early LoRA": lambda: lora_arm("early LoRA", size, early),
        "full": lambda: full_arm("full"),
    }
    return [made[name]() for name in names], size


def usual_retention(tokenizer: Any, sign: str) -> list[str]:
    """Tasks that should stay while an operator is trained: the other operators, and those without arithmetic whose
    answers are one token."""
    others = [*(other for other in tasks.OPERATORS if other != sign), *tasks.CONTROL_TASKS]
    return [name for name in others if isinstance(named_task(tokenizer, name, 2), PromptPairs)]


def comparison_record(found: Comparison, summary: list[ArmSummary], split: Split) -> dict[str, Any]:
    """Everything of a comparison as JSON holds it."""
    return {
        "arms": found.arms,
        "target": found.target,
        "validation": found.validation,
        "retention": found.retention,
        "prompts": split.sizes,
        "base": {name: float(right.mean()) for name, right in found.base.items()},
        "summary": [vars(one) for one in summary],
        "rates": {arm: {str(rate): value for rate, value in found.rates(arm).items()} for arm in found.arms},
        "frontier": found.frontier(),
        "chosen": {one.arm: one.about for one in found.points if one.seed == found.points[0].seed},
        "failed": [{"arm": one.arm, "rate": one.rate, "seed": one.seed} for one in found.points if one.failed],
        "settings": found.settings,
    }


class Kept:
    """Points of an unfinished comparison in a JSON-lines file, one whole line each.

    A line cut short by a kill, or of another comparison, is done again.

    Args:
        path: the file; its folder exists.
        key: of the comparison.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def points(self) -> dict[tuple[str, float, int], Point]:
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                record = json.loads(line)
                known = record.pop("key") == self.key
                point = unpack(record)
            except (ValueError, KeyError, TypeError, AttributeError):  # half a line
                continue
            if known:
                found[point.arm, point.rate, point.seed] = point
        return found

    def keep(self, point: Point) -> None:
        record = {**pack(point), "loss": None if point.loss != point.loss else point.loss, "key": self.key}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(record, allow_nan=False))  # a new line first: the last one may be cut short
            file.flush()
