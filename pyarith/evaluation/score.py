"""``accuracy``: how often a model, as it is or under an intervention, gives the right answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyarith.errors import InputTypeError, check
from pyarith.evaluation.generate import first_choices, generate
from pyarith.evaluation.items import as_items
from pyarith.prompts import PromptPairs
from pyarith.stats import wilson


@dataclass(frozen=True, eq=False, repr=False)
class Accuracy:
    """Right and wrong, item by item.

    Attributes:
        correct: bool [item].
        predictions: what the model answered, one text an item (a token, or the continuation).
        answers: the right answers.
        low, high: Wilson interval of the accuracy, each item counted as independent.
        level: its nominal coverage.
        method: how the answers came about and were compared.
        strata: of the items, for statistics by cluster.
        settings: of the items, and of the generation.
    """

    correct: np.ndarray
    predictions: tuple[str, ...]
    answers: tuple[str, ...]
    low: float
    high: float
    level: float
    method: str
    strata: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.correct)

    @property
    def right(self) -> int:
        """Number of items answered rightly."""
        return int(self.correct.sum())

    @property
    def value(self) -> float:
        """right / n."""
        return self.right / self.n

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary an item: item, prediction, answer, correct."""
        columns = zip(self.predictions, self.answers, self.correct, strict=True)
        return [
            {"item": i, "prediction": said, "answer": right, "correct": bool(correct)}
            for i, (said, right, correct) in enumerate(columns)
        ]

    def __repr__(self) -> str:
        never = ""
        if not self.right:
            never = f"; never right: the first answer is {self.predictions[0]!r} instead of {self.answers[0]!r}"
        bounds = f"{self.level:.0%} interval {self.low:.1%} to {self.high:.1%}"
        return f"Accuracy({self.right} of {self.n} = {self.value:.1%}, {bounds}; {self.method}{never})"


def accuracy(
    model: Any,
    items: Any,
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 64,
    stop: Any = ("\n",),
    batch_size: int = 16,
    level: float = 0.95,
) -> Accuracy:
    """Share of items that a model answers rightly.

        PromptPairs:  correct[i] = (argmax of the logits at END of clean prompt i == answer token i)
        free answers: correct[i] = is_match(greedy continuation of prompt i, answer i), see ``evaluation.answers``

    Args:
        model: a supported Hugging Face causal LM; inside ``pa.ablated(model, ...)`` the ablated model answers.
        items: ``PromptPairs`` (one-token answers), ``Items``, or a list of (prompt, answer).
        tokenizer: needed for free answers; with pairs only to write the predictions as text (else as token ids).
        max_new_tokens, stop, batch_size: as in ``generate``; not used for pairs.
        level: of the interval.
    Returns:
        An ``Accuracy``; 0 right answers are no error, and its text says so.
    Raises:
        InputTypeError, InputError: items are something else, or the tokenizer is missing; whatever ``generate`` raises.
    References: the interval: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if isinstance(items, PromptPairs):
        check(len(items) > 0, "items: expected at least one pair, got none")
        choices = first_choices(model, items).numpy()
        correct = choices == items.answers
        said = tuple(str(token) if tokenizer is None else tokenizer.decode([int(token)]).strip() for token in choices)
        answers, strata, settings = items.answer_texts, items.strata, dict(items.settings)
        method = "most probable token behind the prompt"
    else:
        found = as_items(items, "items")
        check(tokenizer is not None, "tokenizer: expected one for free answers, got None", InputTypeError)
        said = tuple(
            generate(model, tokenizer, found.prompts, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)
        )
        correct = found.is_correct(said)
        answers, strata = found.answers, found.strata
        settings = {**found.settings, "max_new_tokens": max_new_tokens, "stop": list(stop)}
        method = f"greedy continuation, exact match of the {found.kind}"
    low, high = wilson(int(correct.sum()), len(correct), level=level)
    return Accuracy(correct, said, answers, low, high, level, method, strata, settings)
