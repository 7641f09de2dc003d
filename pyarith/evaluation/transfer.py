"""``transfer``: heads found on one task, ablated on other tasks, beside as many random heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.ablation_result import Ablation
from pyarith.engine.baselines import Baseline
from pyarith.engine.progress import Bar, Progress, check_progress
from pyarith.engine.store import Store, circumstances
from pyarith.errors import InputError, check
from pyarith.evaluation.heads import HeadList, as_head_list
from pyarith.evaluation.tasks import as_tasks, clusters_of, described
from pyarith.evaluation.transfer_cells import make_cell
from pyarith.evaluation.transfer_result import TransferResult
from pyarith.evaluation.transfer_runs import TaskRun, Way
from pyarith.models.sites import ModelSites, resolve
from pyarith.stats import random_heads, same_layer_heads
from pyarith.types import Head

CONTROLS = ("random", "same_layer")
_BASELINES = ("mean", "zero")


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
    progress: Progress = None,
    resume: str | Path | None = None,
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
        progress: None = a bar on a terminal, False = none, or a callable ``(done, total)`` in answered items: those of
            all tasks, by the intact model and under every set of heads.
        resume: a folder in which finished parts are kept as they are done (a set of heads on a task that is generated,
            chunks of sets on one that is read off): the same call after a kill goes on from there and gives the same
            result, see ``ablation_sweep``. None = keep nothing.
        options: for ``ablation_sweep`` (``memory_budget``, ``backend``, ``verify``).
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
    sites, store = resolve(model), Store(resume)
    check_progress(progress)
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
    flat = tuple(dict.fromkeys(s for some in sets.values() for arm in some.values() for s in arm))
    parts = store.under(
        lambda: {
            "what": "transfer",
            "baseline": baseline.identity() if isinstance(baseline, Baseline) else baseline,
            "circumstances": circumstances(sites),
        }
    )
    way = Way(model, tokenizer, flat, baseline, max_new_tokens, batch_size, options, parts)
    cells, names, done = [], {}, 0
    intact: dict[str, np.ndarray] = {}
    total = sum(map(len, given.values())) * (1 + len(flat))
    with Bar(progress, total, "item", "transfer") as bar:
        for task, items in given.items():
            intact[task], right, names[task] = TaskRun(way, items, partial(bar.call, before=done)).run()
            done += len(items) * (1 + len(flat))
            clusters = clusters_of(items)
            for name, some in sets.items():
                arms = {arm: np.array([right[s] for s in drawn]) for arm, drawn in some.items()}
                cells.append(make_cell(task, name, lists[name], intact[task], arms, some, clusters, resamples, seed))
    settings = {
        **{"draws": draws, "seed": seed, "n": n, "resamples": resamples, "max_new_tokens": max_new_tokens},
        "baselines": names,
        "baseline_of": {"mean": "each task's own prompts", "zero": ""}.get(str(baseline), "given by the caller"),
        "tasks": {task: described(items) for task, items in given.items()},
    }
    return TransferResult(tuple(given), tuple(lists), tuple(cells), intact, settings)


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


def _sets(
    one: HeadList, controls: Iterable[str], draws: int, seed: int, sites: ModelSites
) -> dict[str, tuple[Ablation, ...]]:
    """The list itself under ``"key"``, and the draws of each control."""
    every = [Head(layer, head) for layer in range(sites.n_layers) for head in range(sites.n_heads)]
    sets: dict[str, tuple[Ablation, ...]] = {"key": (Ablation.parse(list(one.heads)),)}
    for number, name in enumerate(CONTROLS):
        if name in controls:
            rng = np.random.default_rng([seed, number])
            if name == "random":
                drawn = [random_heads(len(one.heads), every, rng) for _ in range(draws)]
            else:
                drawn = [same_layer_heads(one.heads, every, rng) for _ in range(draws)]
            sets[name] = tuple(map(Ablation.parse, drawn))
    return sets
