"""``evaluate``: accuracy and answer probability of a model on several tasks, and what changed between two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pyarith.boundary import encode_pairs
from pyarith.engine.guard import untouched
from pyarith.errors import InputError, check
from pyarith.evaluation.score import Accuracy, accuracy
from pyarith.evaluation.tasks import Task, as_tasks, clusters_of
from pyarith.models.sites import resolve
from pyarith.prompts import Aligner, PromptPairs
from pyarith.stats import Clusters, accuracy_difference, benjamini_hochberg, bootstrap_mean, mcnemar


@dataclass(frozen=True, eq=False)
class Score:
    """One model on one task.

    Attributes:
        accuracy: right and wrong, item by item.
        probability: fp64 [item], P(answer | prompt) = product over the answer's tokens; NaN where the tokenizer joins
            prompt and answer so that the answer has no tokens of its own.
        clusters: of the items, for statistics; None where there are too few.
    """

    accuracy: Accuracy
    probability: np.ndarray
    clusters: Clusters | None

    @property
    def mean_probability(self) -> float:
        """Over the items that have one; NaN where none has."""
        known = self.probability[~np.isnan(self.probability)]
        return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class Change:
    """One task before and after, on the same items.

    ``difference`` of the accuracies with ``low``, ``high`` and ``p`` by clusters (NaN where there are too few), ``q``
    the p adjusted over the tasks (Benjamini-Hochberg); ``lost`` and ``gained`` items with McNemar's exact
    ``p_mcnemar`` (items as independent); mean answer probabilities with an interval of their difference.
    """

    task: str
    n: int
    accuracy_before: float
    accuracy_after: float
    difference: float
    low: float
    high: float
    p: float
    q: float
    lost: int
    gained: int
    p_mcnemar: float
    probability_before: float
    probability_after: float
    probability_low: float
    probability_high: float
    method: str


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Scores by task, in the order asked for, and the settings they came by."""

    scores: dict[str, Score]
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a task: items, right, accuracy with Wilson's interval, mean answer probability, method."""
        return [
            {
                **{"task": task, "n": one.accuracy.n, "right": one.accuracy.right, "accuracy": one.accuracy.value},
                **{"low": one.accuracy.low, "high": one.accuracy.high, "probability": one.mean_probability},
                **{"without_probability": int(np.isnan(one.probability).sum()), "method": one.accuracy.method},
            }
            for task, one in self.scores.items()
        ]

    def __repr__(self) -> str:
        wide = max(len(task) for task in self.scores)
        lines = [f"Evaluation of {len(self.scores)} tasks: accuracy (95% interval), mean probability of the answer"]
        lines += [
            f"  {row['task']:<{wide}}  {row['accuracy']:6.1%} ({row['low']:.1%} to {row['high']:.1%})  "
            f"{row['probability']:.3f}  {row['n']} items"
            for row in self.rows()
        ]
        return "\n".join(lines)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Any,
    *,
    n: int = 200,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """How well a model answers, by exact match and by the probability it gives the right answer.

        P(answer | prompt) = prod over the answer's tokens t of softmax(logits before t)[t]

    Args:
        model: a supported Hugging Face causal LM, as it is or inside ``pa.ablated`` or ``pa.load_delta``.
        tokenizer: its tokenizer.
        tasks: as in ``transfer``: name -> ``PromptPairs``, ``Items`` or (prompt, answer) pairs, or a list of names.
        n, seed: of tasks given by name (fewer items where a task has fewer).
        max_new_tokens, batch_size: of free answers.
        progress: called with (tasks done, tasks).
    Returns:
        An ``Evaluation``; two of the same tasks can be compared with ``changes``.
    Raises:
        InputError, InputTypeError: whatever ``accuracy`` and ``named_task`` raise.
    Notes: of a free answer the probability is that of the bare answer right behind the prompt, so for answers that come
        after some working it is small; the accuracy is what counts there.
    """
    check(batch_size >= 1, f"batch_size: expected a positive whole number, got {batch_size}")
    given = as_tasks(tasks, tokenizer, n, seed)
    scores = {}
    for done, (name, items) in enumerate(given.items()):
        right = accuracy(model, items, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size)
        probability = answer_probability(model, tokenizer, items, batch_size=batch_size)
        scores[name] = Score(right, probability, clusters_of(items))
        if progress is not None:
            progress(done + 1, len(given))
    return Evaluation(scores, {"n": n, "seed": seed, "max_new_tokens": max_new_tokens})


def changes(before: Evaluation, after: Evaluation, *, resamples: int = 10_000, seed: int = 0) -> list[Change]:
    """Task by task, what changed between two evaluations of the same items, with paired intervals and tests.

    Raises:
        InputError: the tasks or their items differ.
    References: McNemar 1947; the bootstrap over operand pairs and templates: see ``pyarith.stats``.
    """
    names = list(before.scores)
    check(names == list(after.scores), f"after: expected the tasks {names}, got {list(after.scores)}")
    rows = []
    for name in names:
        a, b = before.scores[name], after.scores[name]
        same = a.accuracy.answers == b.accuracy.answers
        check(same, f"after: expected the items of task {name!r} that were evaluated before, got others")
        rows.append(_change(name, a, b, resamples, seed))
    adjusted = benjamini_hochberg([row["p"] for row in rows])
    return [Change(**row, q=float(q)) for row, q in zip(rows, adjusted, strict=True)]


def _change(name: str, a: Score, b: Score, resamples: int, seed: int) -> dict[str, Any]:
    was, now = a.accuracy.correct, b.accuracy.correct
    test = mcnemar(now, was)
    nan = float("nan")
    row = {"task": name, "n": len(was), "accuracy_before": a.accuracy.value, "accuracy_after": b.accuracy.value}
    row |= {"difference": b.accuracy.value - a.accuracy.value, "lost": test.only_b, "gained": test.only_a}
    row |= {"p_mcnemar": test.p, "probability_before": a.mean_probability, "probability_after": b.mean_probability}
    row |= dict.fromkeys(("low", "high", "p", "probability_low", "probability_high"), nan)
    if a.clusters is None:
        return row | {"method": "too few items for an interval"}
    found = accuracy_difference(now, was, a.clusters, resamples=resamples, seed=seed)
    row |= {"low": found.low, "high": found.high, "p": found.p, "method": found.method}
    if not np.isnan(a.probability + b.probability).any():
        gain = bootstrap_mean(b.probability - a.probability, a.clusters, resamples=resamples, seed=seed)
        row |= {"probability_low": float(gain.low), "probability_high": float(gain.high)}
    return row


def answer_probability(model: Any, tokenizer: Any, items: Task, *, batch_size: int = 16) -> np.ndarray:
    """fp64 [item]: P(answer | prompt) by one forward pass per batch; NaN as ``Score.probability`` says."""
    if isinstance(items, PromptPairs):
        prompts = [row[:length].tolist() for row, length in zip(items.clean, items.lengths, strict=True)]
        answers = [[int(answer)] for answer in items.answers]
    else:
        pairs = dict(enumerate(zip(items.prompts, items.answers, strict=True)))
        _, encoded = encode_pairs(pairs, Aligner(tokenizer))
        prompts = [ids for ids, _ in encoded.values()]
        answers = [whole[len(ids) :] if whole[: len(ids)] == ids else [] for ids, whole in encoded.values()]
    out = np.full(len(prompts), np.nan)
    usable = [i for i, answer in enumerate(answers) if answer]
    usable.sort(key=lambda i: len(prompts[i]) + len(answers[i]))
    with untouched(model):
        for at in range(0, len(usable), batch_size):
            chosen = usable[at : at + batch_size]
            out[chosen] = _log_probability(model, [prompts[i] for i in chosen], [answers[i] for i in chosen]).exp()
    return out


def _log_probability(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """fp64 [row]: sum over the answer's tokens of log softmax."""
    sites = resolve(model)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=sites.device)
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=sites.device)
    positions = (real.cumsum(1) - 1).clamp_(min=0)
    inputs = {"input_ids": ids, "attention_mask": real, "position_ids": positions, "use_cache": False}
    hidden = sites.decoder(**inputs, return_dict=True).last_hidden_state
    spans = [range(len(p) - 1, len(p) + len(a) - 1) for p, a in zip(prompts, answers, strict=True)]
    places = torch.tensor([(i, at) for i, span in enumerate(spans) for at in span], device=sites.device)
    logits = sites.logits_of(sites.unembed(hidden[places[:, 0], places[:, 1]]).double())
    if not bool(logits.isfinite().all()):
        raise InputError("model: the logits of some prompts are not finite")
    targets = torch.tensor([token for answer in answers for token in answer], device=sites.device)
    each = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, places[:, 0].cpu(), each.cpu())
