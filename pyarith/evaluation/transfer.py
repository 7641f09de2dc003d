"""``transfer``: heads found on one task, ablated on other tasks, beside as many random heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.ablation_result import Ablation
from pyarith.engine.ablation import ablated
from pyarith.engine.baselines import Baseline, MeanAblation, ZeroAblation
from pyarith.engine.sweep import ablation_sweep
from pyarith.errors import AlignmentError, InputError, InputTypeError, check
from pyarith.evaluation.generate import generate
from pyarith.evaluation.heads import HeadList, as_head_list
from pyarith.evaluation.items import Items, as_items
from pyarith.evaluation.transfer_result import Cell, Control, TransferResult
from pyarith.models.sites import ModelSites, resolve
from pyarith.prompts import Aligner, PromptPairs
from pyarith.stats import Clusters, accuracy_difference, mcnemar
from pyarith.tasks import arithmetic, draw_problems, problem_pairs
from pyarith.types import Head

CONTROLS = ("random", "same_layer")
_BASELINES = ("mean", "zero")
_OPERATORS = ("+", "-", "*", "/")
_LEAST = 5  # clusters of a factor that an interval needs

Task = PromptPairs | Items


def transfer(
    model: Any,
    tokenizer: Any,
    tasks: Any,
    head_lists: Any,
    *,
    baseline: Any = "mean",
    controls: Sequence[str] = CONTROLS,
    draws: int = 10,
    seed: int = 0,
    n: int = 100,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    resamples: int = 2000,
    **options: Any,
) -> TransferResult:
    """Ablate lists of heads on tasks they were not found on, and compare with the intact model, item by item.

    For a task and a list H, with right_0 and right_H bool [item] of the intact and the ablated model:

        accuracy               = mean(right_H)
        relative_drop          = (mean(right_H) - mean(right_0)) / mean(right_0), over all items
        relative_drop_correct  = mean(right_H over items with right_0) - 1, over initially correct items

    z of the heads is replaced at all positions, those of generated tokens included, everything downstream recomputed.
    Tasks with one-token answers are read off at END; others are generated and compared by exact match.

    Args:
        model: a supported Hugging Face causal LM; never changed.
        tokenizer: its tokenizer.
        tasks: name -> ``PromptPairs``, ``Items`` or a list of (prompt, answer); or a list of names: operators
            (``"+"``) and tasks of ``pyarith.tasks`` (``"power"``, ``"capital"``), drawn with ``n`` and ``seed``.
        head_lists: name -> heads, ``HeadList``, ``PatchResult.top(k)`` or the path of a saved list.
        baseline: ``"mean"``: for each task the mean of z over all positions of that task's own prompts (without
            answers); ``"zero"``; or one ``Baseline`` for all tasks, such as the mean of the task the heads come from.
        controls: ``"random"``: as many heads of the whole model; ``"same_layer"``: as many in each layer, heads of
            the list only where a layer has too few others. Both are drawn ``draws`` times per list, the same for all
            tasks.
        draws, seed: of the controls; the seed also of the tasks given by name and of the resampling.
        n: items of a task given by name (fewer where it has fewer).
        max_new_tokens, batch_size: of generation.
        resamples: of the interval of the difference.
        options: for ``ablation_sweep`` (``memory_budget``, ``backend``, ``verify``, ``progress``).
    Returns:
        A ``TransferResult``: a cell per task and list with the paired tests and the controls.
    Raises:
        InputError, InputTypeError: an argument is wrong; a list that does not fit the model.
        Whatever ``ablation_sweep``, ``ablated`` and ``generate`` raise.
    Notes: the difference to the intact model is bootstrapped and sign-flipped by clusters of items (operand pair and
        template where there are at least 5 of each, else the item); McNemar's exact test beside it takes every item as
        independent. p of a control = (1 + draws at or below the list's accuracy) / (1 + draws). A task that the intact
        model never gets right has no relative drop (NaN) and says so.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 4 (transfer of key heads); the tests: see ``pyarith.stats``.
    """
    sites = resolve(model)
    for name, value, least in (("draws", draws, 1), ("n", n, 1), ("resamples", resamples, 100)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        check(whole, f"{name}: expected a whole number >= {least}, got {value!r}")
    unknown = [name for name in ([controls] if isinstance(controls, str) else controls) if name not in CONTROLS]
    check(not unknown and not isinstance(controls, str), f"controls: expected some of {CONTROLS}, got {controls!r}")
    fits = baseline in _BASELINES if isinstance(baseline, str) else isinstance(baseline, Baseline)
    check(fits, f"baseline: expected one of {_BASELINES} or a Baseline, got {baseline!r:.80}")
    lists = _lists(head_lists, sites)
    given = as_tasks(tasks, tokenizer, n, seed)
    sets = {name: _sets(one, controls, draws, seed, sites) for name, one in lists.items()}
    flat = list(dict.fromkeys(s for some in sets.values() for arm in some.values() for s in arm))
    cells, names = [], {}
    intact: dict[str, np.ndarray] = {}
    for task, items in given.items():
        values = _baseline(model, tokenizer, items, baseline)
        names[task] = values.name
        if isinstance(items, PromptPairs):
            right, by_set = _swept(model, items, flat, values, options)
        else:
            right, by_set = _generated(model, tokenizer, items, flat, values, max_new_tokens, batch_size)
        intact[task] = right
        clusters = clusters_of(items)
        for name, some in sets.items():
            arms = {arm: np.array([by_set[s] for s in drawn]) for arm, drawn in some.items()}
            cells.append(_cell(task, name, lists[name], right, arms, some, clusters, resamples, seed))
    settings = {
        **{"draws": draws, "seed": seed, "n": n, "resamples": resamples, "max_new_tokens": max_new_tokens},
        "baselines": names,
        "baseline_of": {"mean": "each task's own prompts", "zero": ""}.get(str(baseline), "given by the caller"),
        "tasks": {task: _described(items) for task, items in given.items()},
    }
    return TransferResult(tuple(given), tuple(lists), tuple(cells), intact, settings)


def _described(items: Task) -> dict[str, Any]:
    """How a task's answers were read, and where it comes from."""
    way = "most probable token" if isinstance(items, PromptPairs) else f"greedy continuation, {items.kind}"
    return {"items": len(items), "answers": way, "source": {k: str(v) for k, v in items.settings.items()}}


def _lists(head_lists: Any, sites: ModelSites) -> dict[str, HeadList]:
    given = head_lists if isinstance(head_lists, Mapping) else {"heads": head_lists}
    check(len(given) > 0, "head_lists: expected at least one, got none")
    found = {
        str(name): as_head_list(Path(one) if isinstance(one, str) else one, f"head_lists[{name!r}]")
        for name, one in given.items()
    }
    for name, one in found.items():
        try:
            one.check_sites(sites)
        except InputError as error:
            raise InputError(f"head_lists[{name!r}]: {error}") from None
    return found


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
    if name in _OPERATORS:
        return arithmetic(tokenizer, name, n=n, seed=seed)
    try:
        return problem_pairs(tokenizer, name, n, seed, fewer=True)
    except AlignmentError:
        return Items.from_problems(draw_problems(name, n, seed))


def _baseline(model: Any, tokenizer: Any, items: Task, baseline: Any) -> Baseline:
    """What replaces z on one task."""
    if isinstance(baseline, Baseline):
        return baseline
    if baseline == "zero":
        return ZeroAblation()
    if isinstance(items, PromptPairs):
        inputs = items.inputs()
        return MeanAblation.from_inputs(model, inputs["clean"], inputs["attention_mask"])
    rows = Aligner(tokenizer).encode(items.prompts)
    by_length: dict[int, list[list[int]]] = {}
    for ids in rows:
        by_length.setdefault(len(ids), []).append(ids)
    return MeanAblation.from_inputs(model, list(by_length.values()))


def _sets(
    one: HeadList, controls: Iterable[str], draws: int, seed: int, sites: ModelSites
) -> dict[str, tuple[Ablation, ...]]:
    """The list itself under ``"key"``, and the draws of each control."""
    every = [Head(layer, head) for layer in range(sites.n_layers) for head in range(sites.n_heads)]
    sets: dict[str, tuple[Ablation, ...]] = {"key": (Ablation.parse(list(one.heads)),)}
    for number, name in enumerate(CONTROLS):
        if name in controls:
            rng = np.random.default_rng([seed, number])
            pick = _random if name == "random" else _same_layers
            sets[name] = tuple(Ablation.parse(pick(one.heads, every, rng)) for _ in range(draws))
    return sets


def _random(heads: Sequence[Head], every: list[Head], rng: np.random.Generator) -> list[Head]:
    """As many heads of the whole model; by chance some of the list may be among them."""
    return [every[i] for i in rng.permutation(len(every))[: len(heads)]]


def _same_layers(heads: Sequence[Head], every: list[Head], rng: np.random.Generator) -> list[Head]:
    """As many other heads in each layer; heads of the list only where a layer has too few others."""
    drawn: list[Head] = []
    for layer in sorted({head.layer for head in heads}):
        own = [head for head in heads if head.layer == layer]
        others = [head for head in every if head.layer == layer and head not in own]
        picked = [others[i] for i in rng.permutation(len(others))[: len(own)]]
        drawn += picked + [own[i] for i in rng.permutation(len(own))[: len(own) - len(picked)]]
    return drawn


def _swept(
    model: Any, pairs: PromptPairs, flat: list[Ablation], baseline: Baseline, options: dict[str, Any]
) -> tuple[np.ndarray, dict[Ablation, np.ndarray]]:
    """bool [item] of the intact model and of each set, one-token answers."""
    settings = {"progress": False, **options}
    sweep = ablation_sweep(model, pairs, sets=flat, baseline=baseline, predictions=True, **settings)
    assert sweep.predictions is not None and sweep.clean_predictions is not None
    answers = np.asarray(pairs.answers)
    return sweep.clean_predictions == answers, {s: sweep.predictions[sweep.of(s)] == answers for s in flat}


def _generated(
    model: Any, tokenizer: Any, items: Items, flat: list[Ablation], baseline: Baseline, limit: int, batch_size: int
) -> tuple[np.ndarray, dict[Ablation, np.ndarray]]:
    """The same for free answers: one generation of all items per set."""

    def right() -> np.ndarray:
        texts = generate(model, tokenizer, items.prompts, max_new_tokens=limit, batch_size=batch_size)
        return items.is_correct(texts)

    intact, found = right(), {}
    for one in flat:
        with ablated(model, one.heads, baseline):
            found[one] = right()
    return intact, found


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


def _cell(
    task: str,
    name: str,
    heads: HeadList,
    intact: np.ndarray,
    arms: dict[str, np.ndarray],
    sets: dict[str, tuple[Ablation, ...]],
    clusters: Clusters | None,
    resamples: int,
    seed: int,
) -> Cell:
    """One task under one list; ``arms`` bool [draw, item]."""
    right = arms["key"][0]
    test = mcnemar(right, intact)
    difference = (
        None if clusters is None else accuracy_difference(right, intact, clusters, resamples=resamples, seed=seed)
    )
    controls = {
        arm: Control(
            heads=tuple(one.heads for one in sets[arm]),
            accuracy=tuple(float(value) for value in drawn.mean(1)),
            relative_drop=tuple(_relative(one, intact) for one in drawn),
            relative_drop_correct=tuple(_relative_correct(one, intact) for one in drawn),
            p=float((1 + (drawn.sum(1) <= right.sum()).sum()) / (1 + len(drawn))),
        )
        for arm, drawn in arms.items()
        if arm != "key"
    }
    nan = float("nan")
    return Cell(
        task=task,
        heads=name,
        head_names=tuple(map(str, heads.heads)),
        n=len(intact),
        right_intact=int(intact.sum()),
        right=int(right.sum()),
        relative_drop=_relative(right, intact),
        relative_drop_correct=_relative_correct(right, intact),
        difference=float(right.mean() - intact.mean()),
        low=nan if difference is None else difference.low,
        high=nan if difference is None else difference.high,
        p=nan if difference is None else difference.p,
        lost=test.only_b,
        gained=test.only_a,
        p_mcnemar=test.p,
        method="too few items for an interval" if difference is None else difference.method,
        correct=right,
        controls=controls,
    )


def _relative(right: np.ndarray, intact: np.ndarray) -> float:
    """(accuracy - intact accuracy) / intact accuracy, NaN where the intact model is never right."""
    return float((int(right.sum()) - int(intact.sum())) / int(intact.sum())) if intact.any() else float("nan")


def _relative_correct(right: np.ndarray, intact: np.ndarray) -> float:
    """The same over the items that the intact model gets right."""
    return float(right[intact].mean() - 1) if intact.any() else float("nan")
