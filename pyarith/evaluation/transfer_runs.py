"""What an intact model and one with heads ablated answer rightly on a task; what is finished can be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pyarith.ablation_result import Ablation
from pyarith.engine.ablation import ablated
from pyarith.engine.baselines import Baseline, MeanAblation, ZeroAblation
from pyarith.engine.store import Store
from pyarith.engine.sweep import ablation_sweep
from pyarith.evaluation.generate import generate
from pyarith.evaluation.items import Items
from pyarith.evaluation.tasks import Task
from pyarith.prompts import Aligner, PromptPairs

Right = dict[Ablation, np.ndarray]


@dataclass(frozen=True)
class Way:
    """How answers are got; see ``transfer``.

    Attributes:
        sets: what is ablated, each set in turn.
        baseline: ``"mean"``, ``"zero"`` or a ``Baseline``.
        limit, batch_size: of generation.
        options: for ``ablation_sweep``.
        parts: where finished parts are kept; its key says everything but the task.
    """

    model: Any
    tokenizer: Any
    sets: tuple[Ablation, ...]
    baseline: Any
    limit: int
    batch_size: int
    options: dict[str, Any]
    parts: Store


class TaskRun:
    """One task, with the intact model and with each set ablated.

    Args:
        way: how.
        items: the task.
        progress: called with the number of items that were answered, the intact model's and those of all sets.
    """

    def __init__(self, way: Way, items: Task, progress: Callable[[int], None]) -> None:
        self.way, self.items, self.progress = way, items, progress
        self.parts = way.parts.under(lambda: _identity(items, way))

    @cached_property
    def baseline(self) -> Baseline:
        """What replaces z; a mean is measured only where something is left to be run."""
        baseline, items, model = self.way.baseline, self.items, self.way.model
        if isinstance(baseline, Baseline):
            return baseline
        if baseline == "zero":
            return ZeroAblation()
        if isinstance(items, PromptPairs):
            inputs = items.inputs()
            return MeanAblation.from_inputs(model, inputs["clean"], inputs["attention_mask"])
        by_length: dict[int, list[list[int]]] = {}
        for ids in Aligner(self.way.tokenizer).encode(items.prompts):
            by_length.setdefault(len(ids), []).append(ids)
        return MeanAblation.from_inputs(model, list(by_length.values()))

    def run(self) -> tuple[np.ndarray, Right, str]:
        """bool [item] of the intact model and of each set, and the name of the baseline."""
        return self._swept(self.items) if isinstance(self.items, PromptPairs) else self._generated(self.items)

    def _swept(self, pairs: PromptPairs) -> tuple[np.ndarray, Right, str]:
        """One-token answers: one sweep over all sets."""
        way, n = self.way, len(pairs)
        what = ("swept", way.sets, way.options)
        part = self.parts.get(*what)
        if part is None:
            sweep = ablation_sweep(
                way.model,
                pairs,
                sets=way.sets,
                baseline=self.baseline,
                predictions=True,
                progress=lambda done, _: self.progress(n + done),
                resume=way.parts.folder,
                **way.options,
            )
            assert sweep.predictions is not None and sweep.clean_predictions is not None
            answers = np.asarray(pairs.answers)
            found = {"intact": sweep.clean_predictions == answers, "right": sweep.predictions == answers}
            name = self.baseline.name
            self.parts.put(what, found, {"baseline": name})
        else:
            found, name = part.arrays, str(part.record["baseline"])
            self.progress(n * (1 + len(way.sets)))
        return found["intact"], dict(zip(way.sets, found["right"], strict=True)), name

    def _generated(self, items: Items) -> tuple[np.ndarray, Right, str]:
        """Free answers: one generation of all items with the intact model, and one per set."""
        way = self.way
        names: list[str] = []

        def right(number: int, one: Ablation | None) -> np.ndarray:
            what = ("generated", one)
            part = self.parts.get(*what)
            if part is not None:
                correct, name = part.arrays["right"], str(part.record["baseline"])
            else:
                correct, name = self._answer(items, one), "" if one is None else self.baseline.name
                self.parts.put(what, {"right": correct}, {"baseline": name})
            names.append(name)
            self.progress((number + 1) * len(items))
            return correct

        intact = right(0, None)
        found = {one: right(number, one) for number, one in enumerate(way.sets, start=1)}
        return intact, found, names[-1]

    def _answer(self, items: Items, one: Ablation | None) -> np.ndarray:
        way = self.way

        def answered() -> np.ndarray:
            texts = generate(
                way.model, way.tokenizer, items.prompts, max_new_tokens=way.limit, batch_size=way.batch_size
            )
            return items.is_correct(texts)

        if one is None:
            return answered()
        with ablated(way.model, one.heads, self.baseline):
            return answered()


def _identity(items: Task, way: Way) -> dict[str, Any]:
    """What determines the answers of a task beside the model, the sets and the baseline."""
    if isinstance(items, PromptPairs):
        return {"clean": items.clean, "real": items.attention_mask, "answers": items.answers}
    settings = getattr(way.model, "generation_config", None)
    return {
        "prompts": [items.prompts, Aligner(way.tokenizer).encode(items.prompts)],
        "answers": [items.answers, items.kind],
        "generation": [way.limit, way.batch_size, None if settings is None else settings.to_dict()],
        "ends": [way.tokenizer.eos_token_id, way.tokenizer.pad_token_id],
    }
