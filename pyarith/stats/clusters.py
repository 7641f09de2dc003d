"""Which prompts belong together: the factors that a resampling scheme draws from.

Arithmetic prompts are crossed: every prompt is one operand pair in one template. Prompts that share a pair or a
template are not independent, so both are resampled, never single prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyarith.errors import InputError, check

Array = NDArray[Any]

MIN_CLUSTERS = 5  # of each factor: with fewer, a resample is one of a few hundred and no tail can be read off
CROSSED = ("pair", "template")
SINGLE = "item"
_HELP = (
    "pass pairs made by pa.tasks (strata pair and template), PromptPairs.from_text(..., strata={'item': ...}), or the "
    "factors themselves, such as {'pair': [...], 'template': [...]} or {'item': [...]} with one value a prompt; where "
    "every prompt is an independent item of its own: {'item': range(n)}"
)


@dataclass(frozen=True, eq=False)
class Clusters:
    """One or two factors of a set of prompts.

    Attributes:
        names: of the factors. The first is the one whose signs are flipped and that splits go by.
        codes: int64 [batch] for each factor, 0 .. size - 1.
        labels: [size] of each factor, the value that a code stands for.
    """

    names: tuple[str, ...]
    codes: tuple[Array, ...]
    labels: tuple[Array, ...]

    def __len__(self) -> int:
        return len(self.codes[0])

    @property
    def sizes(self) -> dict[str, int]:
        """Number of clusters of each factor."""
        return {name: len(labels) for name, labels in zip(self.names, self.labels, strict=True)}

    @property
    def cells(self) -> Array:
        """int64 [batch]: which combination of all factors a prompt is; equal for prompts that share every factor."""
        combined = np.zeros(len(self), np.int64)
        for codes, labels in zip(self.codes, self.labels, strict=True):
            combined = combined * len(labels) + codes
        return combined

    @property
    def n_repeated(self) -> int:
        """Prompts that share all factors with an earlier prompt."""
        return len(self) - len(np.unique(self.cells))

    def only(self, name: str) -> Clusters:
        """The single factor ``name``.

        Raises:
            InputError: there is no such factor.
        """
        check(name in self.names, f"name: expected one of {list(self.names)}, got {name!r}")
        at = self.names.index(name)
        return Clusters((name,), (self.codes[at],), (self.labels[at],))

    def take(self, prompts: Array) -> Clusters:
        """The factors of the prompts at int or bool ``prompts``; clusters without a prompt are gone."""
        return Clusters.of({n: lab[c[prompts]] for n, c, lab in zip(self.names, self.codes, self.labels, strict=True)})

    def require(self, least: int = MIN_CLUSTERS) -> None:
        """Refuse factors with fewer than ``least`` clusters.

        Raises:
            InputError: with the numbers.
        """
        few = {name: size for name, size in self.sizes.items() if size < least}
        if few:
            others = [name for name in self.names if name not in few]
            way = (
                f", or give {others} alone, which makes statements about these very values of {list(few)}"
                if others
                else ""
            )
            raise InputError(
                f"clusters: resampling needs at least {least} of each factor, got {few} in {len(self)} prompts; "
                f"use prompts with more of them{way}"
            )

    @classmethod
    def of(cls, source: Any, batch: int | None = None) -> Clusters:
        """Factors from what a caller has at hand.

        Args:
            source: ``Clusters``; an object with ``strata`` such as ``PromptPairs``: its strata pair and template
                (operand_a and operand_b stand in for pair), else its stratum item; a sequence of such objects, one
                a batch; a mapping name -> one value a prompt, with one or two names; or one array [batch].
            batch: how many prompts there must be; None = as many as are given.
        Raises:
            InputError: no factors are found, there are more than two, or their length is wrong.
        """
        found = source if isinstance(source, Clusters) else cls._read(source)
        lengths = {name: len(codes) for name, codes in zip(found.names, found.codes, strict=True)}
        same = set(lengths.values()) == {len(found) if batch is None else batch}
        wanted = "equal lengths" if batch is None else f"{batch} values, one a prompt"
        check(same, f"clusters: expected {wanted}, got {lengths}; give the pairs that the effects were measured on")
        check(len(found) > 0, "clusters: expected at least one prompt, got none")
        return found

    @classmethod
    def _read(cls, source: Any) -> Clusters:
        if isinstance(source, list | tuple) and source and all(hasattr(one, "strata") for one in source):
            factors = _joined([_from_strata(one.strata) for one in source])
        else:
            factors = _from_strata(source.strata) if hasattr(source, "strata") else source
        if not isinstance(factors, Mapping):
            if not isinstance(factors, np.ndarray | Sequence | range) or isinstance(factors, str):
                raise InputError(f"clusters: expected factors of the prompts, got {type(source).__name__}; {_HELP}")
            factors = {SINGLE: factors}
        number = len(factors)
        check(1 <= number <= 2, f"clusters: expected one or two factors, got {number}: {list(factors)}; {_HELP}")
        codes, labels = [], []
        for name, values in factors.items():
            array = np.asarray(values)
            check(array.ndim == 1, f"clusters[{name!r}]: expected one value a prompt, got shape {array.shape}; {_HELP}")
            unique, inverse = np.unique(array, return_inverse=True)
            labels.append(unique)
            codes.append(inverse.astype(np.int64).reshape(-1))
        return cls(tuple(map(str, factors)), tuple(codes), tuple(labels))


def _from_strata(strata: Mapping[str, Any]) -> dict[str, Any]:
    """The crossed factors if they are there, else the items."""
    factors = dict(strata)
    if "pair" not in factors and {"operand_a", "operand_b"} <= factors.keys():
        operands = zip(factors["operand_a"], factors["operand_b"], strict=True)
        factors["pair"] = np.array([f"{a},{b}" for a, b in operands])
    if all(name in factors for name in CROSSED):
        return {name: factors[name] for name in CROSSED}
    if SINGLE in factors:
        return {SINGLE: factors[SINGLE]}
    raise InputError(f"pairs: expected strata {' and '.join(CROSSED)}, or {SINGLE}, got {sorted(strata)}; {_HELP}")


def _joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The factors of several batches, one after the other."""
    names = [tuple(batch) for batch in batches]
    check(len(set(names)) == 1, f"pairs: expected the same strata in every batch, got {sorted(set(names))}; {_HELP}")
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names[0]}


def effects_array(effects: Any, name: str = "effects", least_ndim: int = 1) -> Array:
    """fp64 [..., batch]; NaN is allowed, infinity is not.

    Raises:
        InputError: it is no array of numbers, has too few axes, or holds infinity.
    """
    array = np.asarray(effects)
    numeric = array.dtype.kind in "fiub"
    check(numeric, f"{name}: expected numbers [..., batch], got dtype {array.dtype}; pass a numpy array")
    wanted = "[sender, batch]" if least_ndim > 1 else "[..., batch]"
    check(array.ndim >= least_ndim, f"{name}: expected {wanted}, got shape {array.shape}")
    array = array.astype(np.float64)
    check(not np.isinf(array).any(), f"{name}: expected finite numbers or NaN, got infinity; leave such prompts out")
    return array


def group_sums(values: Array, codes: Array, size: int) -> Array:
    """Sums of [..., batch] over prompts of equal code: [..., size]."""
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    sums = np.zeros((*values.shape[:-1], size), np.float64)
    sums[..., present] = np.add.reduceat(values[..., order], starts, axis=-1)
    return sums


def check_level(level: float, name: str = "level") -> None:
    """Raise unless 0 < level < 1."""
    fits = isinstance(level, float | int) and 0 < level < 1
    check(fits, f"{name}: expected a number between 0 and 1 such as 0.95, got {level!r}")


def check_count(number: int, name: str, least: int = 1) -> None:
    """Raise unless ``number`` is a whole number >= least."""
    fits = isinstance(number, int | np.integer) and not isinstance(number, bool) and number >= least
    check(fits, f"{name}: expected a whole number >= {least}, got {number!r}")
