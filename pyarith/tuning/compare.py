"""``compare``: ways of training one model side by side - same data order, same evaluation, a rate sweep for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyarith.errors import InputError, NonFiniteError, check
from pyarith.stats import Clusters, benjamini_hochberg, bootstrap_mean, sign_flip
from pyarith.tuning.arms import Arm
from pyarith.tuning.batches import Batches
from pyarith.tuning.data import Examples
from pyarith.tuning.loop import train
from pyarith.tuning.settings import TuneSettings

Correct = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        arm, rate, seed: which.
        about: what was trained.
        n_parameters: trainable numbers.
        correct: task -> bool [item] after training; empty where the run failed.
        seconds: of the training, evaluation not counted.
        loss: mean over the last epoch.
        failed: why there is no result (a loss that was not finite), or "".
    """

    arm: str
    rate: float
    seed: int
    about: str
    n_parameters: int
    correct: dict[str, np.ndarray]
    seconds: float
    loss: float
    failed: str = ""


@dataclass(frozen=True)
class ArmSummary:
    """One arm at its best rate: the one with the highest mean accuracy on the validation task over seeds.

    ``target``, ``retention`` and others are means over seeds, with the lowest and highest seed in ``*_range``; changes
    are against the untrained model. ``against`` is the first arm: the mean difference in target accuracy to it, with
    interval and p by clusters of items, and q adjusted over the arms.
    """

    arm: str
    rate: float
    at_edge: bool
    n_parameters: int
    seeds: int
    target: float
    target_change: float
    target_range: tuple[float, float]
    retention: float
    retention_change: float
    retention_range: tuple[float, float]
    accuracies: dict[str, float]
    seconds: float
    difference: float
    low: float
    high: float
    p: float
    q: float


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison.

    Attributes:
        arms: names, in order; the first is what the others are compared with.
        target, validation, retention: names of tasks: what was trained for, what rates are chosen by, and what should
            stay.
        base: task -> bool [item], the untrained model.
        points: one per arm, rate and seed.
        clusters: of the target's items.
        settings: of the training.
    """

    arms: tuple[str, ...]
    target: str
    validation: str
    retention: tuple[str, ...]
    base: dict[str, np.ndarray]
    points: tuple[Point, ...]
    clusters: Clusters
    settings: dict[str, Any] = field(default_factory=dict)

    def accuracy(self, correct: Correct, task: str) -> float:
        """Share of a task's items; of the retention tasks' mean with the name "retention"."""
        if task == "retention":
            return float(np.mean([correct[name].mean() for name in self.retention]))
        return float(correct[task].mean())

    def frontier(self) -> list[dict[str, Any]]:
        """Every run as a point of gain (change of the target's accuracy) and retention (change of the others')."""
        start = {name: self.accuracy(self.base, name) for name in (self.target, "retention")}
        return [
            {
                **{"arm": one.arm, "rate": one.rate, "seed": one.seed, "n_parameters": one.n_parameters},
                "gain": self.accuracy(one.correct, self.target) - start[self.target],
                "retention": self.accuracy(one.correct, "retention") - start["retention"],
            }
            for one in self.points
            if not one.failed
        ]

    def rates(self, arm: str) -> dict[float, float]:
        """Rate -> mean accuracy on the validation task over seeds; rates at which a run failed are left out."""
        found: dict[float, list[float]] = {}
        failed = {one.rate for one in self.points if one.arm == arm and one.failed}
        for one in self.points:
            if one.arm == arm and one.rate not in failed:
                found.setdefault(one.rate, []).append(self.accuracy(one.correct, self.validation))
        return {rate: float(np.mean(values)) for rate, values in found.items()}

    def summary(self, *, resamples: int = 10_000, seed: int = 0) -> list[ArmSummary]:
        """One line an arm, at its best rate (of equally good ones the lowest).

        Raises:
            InputError: every rate of an arm failed.
        """
        best = {}
        for arm in self.arms:
            rates = self.rates(arm)
            check(bool(rates), f"rates: no run of arm {arm!r} gave finite losses; try lower rates")
            best[arm] = max(sorted(rates), key=rates.__getitem__)
        chosen = {arm: [one for one in self.points if (one.arm, one.rate) == (arm, best[arm])] for arm in self.arms}
        means = {arm: np.mean([one.correct[self.target] for one in runs], 0) for arm, runs in chosen.items()}
        tests = [
            self._against(means[arm] - means[self.arms[0]], resamples, seed) if arm != self.arms[0] else (np.nan,) * 4
            for arm in self.arms
        ]
        adjusted = benjamini_hochberg([test[3] for test in tests])
        return [
            self._line(arm, best[arm], chosen[arm], test, float(q))
            for arm, test, q in zip(self.arms, tests, adjusted, strict=True)
        ]

    def _against(self, difference: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float, float]:
        interval = bootstrap_mean(difference, self.clusters, resamples=resamples, seed=seed)
        test = sign_flip(difference, self.clusters, flips=resamples, seed=seed)
        return float(difference.mean()), float(interval.low), float(interval.high), float(test.p)

    def _line(
        self, arm: str, rate: float, runs: list[Point], test: tuple[float, float, float, float], q: float
    ) -> ArmSummary:
        targets = [self.accuracy(one.correct, self.target) for one in runs]
        kept = [self.accuracy(one.correct, "retention") for one in runs]
        tried = sorted(self.rates(arm))
        tasks = [name for name in runs[0].correct]
        return ArmSummary(
            arm=arm,
            rate=rate,
            at_edge=len(tried) > 1 and rate in (tried[0], tried[-1]),
            n_parameters=round(float(np.mean([one.n_parameters for one in runs]))),
            seeds=len(runs),
            target=float(np.mean(targets)),
            target_change=float(np.mean(targets)) - self.accuracy(self.base, self.target),
            target_range=(min(targets), max(targets)),
            retention=float(np.mean(kept)),
            retention_change=float(np.mean(kept)) - self.accuracy(self.base, "retention"),
            retention_range=(min(kept), max(kept)),
            accuracies={name: float(np.mean([one.correct[name].mean() for one in runs])) for name in tasks},
            seconds=float(np.median([one.seconds for one in runs])),
            difference=test[0],
            low=test[1],
            high=test[2],
            p=test[3],
            q=q,
        )


def compare(
    model: Any,
    examples: Examples,
    arms: Sequence[Arm],
    score: Callable[[Any], Correct],
    *,
    target: str,
    validation: str,
    retention: Sequence[str],
    clusters: Any,
    rates: Sequence[float] | Mapping[str, Sequence[float]],
    seeds: Sequence[int] = (0, 1, 2),
    settings: TuneSettings | None = None,
    done: Mapping[tuple[str, float, int], Point] | None = None,
    keep: Callable[[Point], None] = lambda point: None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Train a model in several ways and evaluate each alike; the model is given back as it was after every run.

    All arms see the same examples in the same order for one seed, with the same schedule, clipping and number of steps;
    each has its own sweep of learning rates, since what is good for one is not for another. The best rate is chosen on
    ``validation``, never on ``target``.

    Args:
        model: a supported Hugging Face causal LM.
        examples: to train on.
        arms: what is compared; the first is what the others are tested against.
        score: model -> task -> bool [item], right or wrong; called before all training and after each run.
        target, validation, retention: names among its tasks.
        clusters: of the target's items, what ``Clusters.of`` takes.
        rates: learning rates for all arms, or by name of the arm.
        seeds: of data order, random choices and initial values.
        settings: of the training; its ``lr`` and ``seed`` are not used, nor ``grad_scale``, ``replay`` and ``packing``.
        done: points of an earlier, interrupted comparison, which are taken as they are.
        keep: called with every new point, to store it.
        progress: called with (runs done, runs).
    Returns:
        A ``Comparison``.
    Raises:
        InputError: no arms, tasks that ``score`` does not give, rates or seeds missing.
        NotAvailableError: LoRA without peft.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 5; why each arm has its own rates: arXiv:2405.02596.
    """
    chosen = settings or TuneSettings()
    names = [arm.name for arm in arms]
    check(bool(names) and len(set(names)) == len(names), f"arms: expected different names, got {names}")
    check(bool(seeds), "seeds: expected at least one, got none")
    by_arm = {name: tuple(rates[name] if isinstance(rates, Mapping) else rates) for name in names}
    empty = [name for name, some in by_arm.items() if not some]
    check(not empty, f"rates: expected at least one for each arm, got none for {', '.join(empty)}")
    base = dict(score(model))
    missing = [name for name in (target, validation, *retention) if name not in base]
    check(not missing and bool(retention), f"score: expected tasks {missing or 'for retention'}, got {list(base)}")
    grid = [(arm, rate, seed) for arm in arms for rate in by_arm[arm.name] for seed in seeds]
    points = []
    for number, (arm, rate, seed) in enumerate(grid):
        point = (done or {}).get((arm.name, rate, seed))
        if point is None:
            point = _run(model, examples, arm, rate, seed, chosen, score)
            keep(point)
        points.append(point)
        if progress is not None:
            progress(number + 1, len(grid))
    record = {**chosen.record(), "rates": by_arm, "seeds": list(seeds), "data": examples.record()}
    for unused in ("lr", "seed", "lr_scale", "grad_scale", "task_weight", "replay_batch_size", "packing"):
        del record[unused]
    return Comparison(
        tuple(names), target, validation, tuple(retention), base, tuple(points), Clusters.of(clusters), record
    )


def _run(
    model: Any,
    examples: Examples,
    arm: Arm,
    rate: float,
    seed: int,
    settings: TuneSettings,
    score: Callable[[Any], Correct],
) -> Point:
    own = replace(settings, lr=rate, seed=seed)
    batches = Batches(examples, own.batch_size, own.micro_batch_size, seed)
    with arm.attach(model, own, rate, seed) as attached:
        start = time.perf_counter()
        try:
            history = train(attached.trainee, batches, own, progress=False)
        except NonFiniteError as error:
            return Point(arm.name, rate, seed, attached.about, attached.n_parameters, {}, 0.0, float("nan"), str(error))
        seconds = time.perf_counter() - start
        losses = history.arrays()["loss"][-batches.steps_per_epoch :]
        attached.finish()
        correct = {name: np.asarray(values, dtype=bool) for name, values in score(model).items()}
        return Point(
            arm.name, rate, seed, attached.about, attached.n_parameters, correct, seconds, float(losses.mean())
        )


def pack(point: Point) -> dict[str, Any]:
    """A point as JSON holds it."""
    return {**vars(point), "correct": {k: "".join("01"[int(v)] for v in some) for k, some in point.correct.items()}}


def unpack(record: Mapping[str, Any]) -> Point:
    """What ``pack`` gave.

    Raises:
        InputError: something else.
    """
    try:
        correct = {k: np.array([mark == "1" for mark in text]) for k, text in record["correct"].items()}
        return Point(
            **{**record, "correct": correct, "loss": float("nan") if record["loss"] is None else record["loss"]}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"point: expected one that compare kept, got {record!r:.80} ({error})") from None
