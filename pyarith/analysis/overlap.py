"""Do different operators, styles or tasks use the same heads? Overlap of key heads and agreement of rankings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from pyarith import stats
from pyarith.analysis.inputs import Array
from pyarith.analysis.states import frame
from pyarith.errors import InputError, InputTypeError, check
from pyarith.result import PatchResult
from pyarith.types import Head


@dataclass(frozen=True, repr=False)
class EffectOverlap:
    """Head effects of several results, two by two. All matrices are symmetric fp64 [result, result].

    Attributes:
        names: of the results, the order of both axes.
        key_heads: name -> its key heads, strongest first.
        jaccard: |A and B| / |A or B| of the key heads; NaN where both sets are empty.
        common: |A and B|.
        expected_jaccard: its mean for unrelated sets of the same sizes.
        p: chance that unrelated sets share as many heads or more.
        spearman: rank correlation of the mean relative effects of all heads; 1 on the diagonal.
        spearman_low, spearman_high: bootstrap interval of it (``stats.rank_correlation``), NaN on the diagonal; None
            where no ``pairs`` were given.
        settings: how key heads were chosen, level and resamples.
    """

    names: tuple[str, ...]
    key_heads: dict[str, tuple[Head, ...]]
    jaccard: Array
    common: Array
    expected_jaccard: Array
    p: Array
    spearman: Array
    spearman_low: Array | None = None
    spearman_high: Array | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def shared(self, *names: str) -> list[Head]:
        """Key heads of all the named results (of every one without names), in the order of the first.

        Raises:
            InputError: there is no result of that name.
        """
        unknown = [name for name in names if name not in self.names]
        check(not unknown, f"names: expected some of {list(self.names)}, got {unknown}")
        sets = [self.key_heads[name] for name in names or self.names]
        return [head for head in sets[0] if all(head in other for other in sets[1:])]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table of ``to_dataframe`` as dictionaries."""
        columns = ("jaccard", "common", "expected_jaccard", "p", "spearman", "spearman_low", "spearman_high")
        for i, j in combinations(range(len(self.names)), 2):
            row: dict[str, Any] = {"a": self.names[i], "b": self.names[j]}
            for column in columns:
                matrix = getattr(self, column)
                row[column] = float("nan") if matrix is None else float(matrix[i, j])
            yield row

    def to_dataframe(self) -> Any:
        """One row per pair of results: a, b, jaccard, common, expected_jaccard, p, spearman and its interval."""
        return frame(self.rows())

    def __repr__(self) -> str:
        lines = [f"EffectOverlap of {', '.join(self.names)}; key heads: {self.settings.get('key', '')}"]
        for row in self.rows():
            a, b = self.key_heads[row["a"]], self.key_heads[row["b"]]
            interval = ""
            if self.spearman_low is not None:
                interval = f" [{row['spearman_low']:.2f}, {row['spearman_high']:.2f}]"
            lines.append(
                f"  {row['a']} / {row['b']}: {int(row['common'])} of {len(a)} and {len(b)} heads shared, Jaccard "
                f"{row['jaccard']:.2f} ({row['expected_jaccard']:.2f} by chance, p {row['p']:.2g}), "
                f"Spearman {row['spearman']:.2f}{interval}"
            )
        return "\n".join(lines)


def overlap(
    results: Mapping[str, PatchResult],
    *,
    threshold: float = -0.05,
    k: int | None = None,
    pairs: Mapping[str, Any] | None = None,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> EffectOverlap:
    """Overlap of key heads and rank correlation of head effects between results.

    jaccard = |A and B| / |A or B| of the key heads; spearman = rank correlation of ``head_effects`` over all heads.

    Args:
        results: name (operator, style, task) -> ``PatchResult`` of the same model, two or more.
        threshold: key heads are those with a mean relative effect below it (the paper's -5 %).
        k: where given, key heads are the k with the lowest effect instead.
        pairs: name -> the ``PromptPairs`` of that result (or the factors of its prompts: see ``stats.Clusters.of``).
            Adds intervals to the rank correlations. Results that were given one and the same object are resampled
            together, others on their own.
        level, resamples, seed: of the intervals.
    Returns:
        ``EffectOverlap``.
    Raises:
        InputTypeError: an entry is not a ``PatchResult``.
        InputError: fewer than two results, without heads, of different sizes, or without a prompt with clean logit > 0;
            ``k`` larger than the number of heads; ``pairs`` of other names or lengths, or too few clusters.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3 (key heads across operators).
    """
    names, effects = tuple(results), _effects(results)
    means = {name: np.asarray(results[name].head_effects) for name in names}
    size = means[names[0]].size
    check(k is None or 1 <= k <= size, f"k: expected 1 to {size}, the number of heads, got {k}")
    if pairs is not None:
        missing, unknown = [n for n in names if n not in pairs], [n for n in pairs if n not in names]
        check(not (missing or unknown), f"pairs: expected the names {list(names)}, {missing=}, {unknown=}")
    keys = {
        name: tuple(row.head for row in result.top(k)) if k is not None else tuple(result.key_heads(threshold))
        for name, result in results.items()
    }
    square = (len(names), len(names))
    found = {name: np.full(square, np.nan) for name in ("jaccard", "common", "expected_jaccard", "p", "spearman")}
    low, high = np.full(square, np.nan), np.full(square, np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names[: i + 1]):
            sets = stats.overlap(keys[a], keys[b], size)
            rank = 1.0 if i == j else stats.spearman(means[a], means[b])
            if pairs is not None and i != j:
                other = None if pairs[a] is pairs[b] else pairs[b]
                interval = stats.rank_correlation(
                    effects[a], effects[b], pairs[a], other, level=level, resamples=resamples, seed=seed
                )
                low[i, j] = low[j, i] = interval.low
                high[i, j] = high[j, i] = interval.high
            values = (sets.jaccard, sets.common, sets.expected_jaccard, sets.p, rank)
            for matrix, value in zip(found.values(), values, strict=True):
                matrix[i, j] = matrix[j, i] = value
    key = f"relative effect below {threshold:g}" if k is None else f"the {k} with the lowest relative effect"
    settings: dict[str, Any] = {"key": key, "heads": size}
    if pairs is None:
        return EffectOverlap(names, keys, **found, settings=settings)
    settings |= {"level": level, "resamples": resamples, "seed": seed}
    return EffectOverlap(names, keys, **found, spearman_low=low, spearman_high=high, settings=settings)


def _effects(results: Mapping[str, PatchResult]) -> dict[str, Array]:
    """Name -> relative effects [n_layers, n_heads, batch], NaN where the clean logit is <= 0, after all checks."""
    check(isinstance(results, Mapping), f"results: expected a mapping, got {type(results).__name__}", InputTypeError)
    check(len(results) >= 2, f"results: expected two or more, got {list(results)}")
    wrong = {name: type(one).__name__ for name, one in results.items() if not isinstance(one, PatchResult)}
    check(not wrong, f"results: expected PatchResults, got {wrong}; a Discovery holds one as .result", InputTypeError)
    effects, headless, unusable = {}, [], []
    for name, result in results.items():
        changes, clean = result.head_changes, result.clean_logits.astype(np.float64)
        if changes is None:
            headless.append(name)
            continue
        if not (clean > 0).any():
            unusable.append(name)
        effects[name] = changes / np.where(clean > 0, clean, np.nan)
    check(not headless, f"results: expected heads among the senders, {headless} have none")
    check(not unusable, f"results: in {unusable} every clean answer logit is <= 0, so there are no relative effects")
    shapes = {name: one.shape[:-1] for name, one in effects.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"results: expected one shape [n_layers, n_heads] in all of them, got {shapes}")
    return effects
