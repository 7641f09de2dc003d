"""What is ablated together, and the result of an ablation sweep: arrays on the host with named axes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyarith.errors import InputError, check
from pyarith.types import Head

Array = NDArray[Any]

_TENSORS = "ablation.safetensors"
_RECORD = "ablation.json"
_FORMAT = 1
_SHOWN = 5


class Ablation(NamedTuple):
    """Heads and whole MLPs (by layer) that are ablated together; prints as ``9.6+10.0+mlp3``."""

    heads: tuple[Head, ...] = ()
    mlps: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "+".join([*map(str, self.heads), *(f"mlp{layer}" for layer in self.mlps)])

    @property
    def first_layer(self) -> int:
        return min([*(head.layer for head in self.heads), *self.mlps])

    @classmethod
    def parse(cls, value: Any) -> Ablation:
        """Sorted and without repetitions, from an ``Ablation``, one head, or a list of heads and ``("mlp", layer)``.

        Raises:
            InputError: something in it is neither a head nor an MLP, or nothing is in it.
        """
        if isinstance(value, Ablation):
            items: list[Any] = [*value.heads, *(("mlp", layer) for layer in value.mlps)]
        elif _is_head(value) or _is_mlp(value):
            items = [value]
        else:
            check(
                isinstance(value, Iterable) and not isinstance(value, str),
                f"sets: expected lists of (layer, head) and ('mlp', layer), or Ablation; got {value!r}",
            )
            items = list(value)
        wrong = [item for item in items if not (_is_head(item) or _is_mlp(item))]
        check(not wrong, f"sets: expected (layer, head) or ('mlp', layer) in each set, got {wrong}")
        check(bool(items), "sets: expected at least one head or MLP in every set, got an empty one")
        heads = sorted({Head(int(item[0]), int(item[1])) for item in items if _is_head(item)})
        return cls(tuple(heads), tuple(sorted({int(item[1]) for item in items if _is_mlp(item)})))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_head(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))


def _is_mlp(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and value[0] == "mlp" and _is_number(value[1])


def parse_sets(sets: Iterable[Any] | None, n_layers: int, n_heads: int) -> tuple[Ablation, ...]:
    """The sets of a sweep; None is every head alone, layer by layer.

    Raises:
        InputError: no set, an empty set, or heads and MLPs that the model does not have: all of them are named.
    """
    if sets is None:
        heads = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        return tuple(Ablation((head,)) for head in heads)
    check(
        isinstance(sets, Iterable) and not isinstance(sets, str | Ablation),
        f"sets: expected None or a list of sets, got {sets!r}",
    )
    found = []
    for number, value in enumerate(sets):
        try:
            found.append(Ablation.parse(value))
        except InputError as error:
            raise InputError(f"{error} (set {number})") from None
    check(bool(found), "sets: expected at least one set, got an empty list; None means every head alone")
    absent = sorted({h for s in found for h in s.heads if not (0 <= h.layer < n_layers and 0 <= h.head < n_heads)})
    mlps = sorted({layer for s in found for layer in s.mlps if not 0 <= layer < n_layers})
    names = [*map(str, absent), *(f"mlp{layer}" for layer in mlps)]
    check(
        not names,
        f"sets: expected heads of a model with {n_layers} layers of {n_heads} heads (counted from 0), "
        f"got {', '.join(names)}",
    )
    return tuple(found)


@dataclass(frozen=True, repr=False)
class AblationSweep:
    """Total effect of ablating each set of heads and MLPs, everything downstream recomputed.

    change of a set and prompt = logit of the answer with the set ablated - the same in the identity row, which went
    through the same arithmetic with nothing ablated; effect of a set = mean over prompts whose clean logit is > 0 of
    change / clean logit (SEMANTICS, "all-position ablation" and "END-only ablation").

    Attributes:
        sets: what was ablated together, in the order that was asked for.
        logits: [n_sets, batch] logit of the answer at END; fp32, fp64 for fp64 models.
        identity_logits: [batch] the same path with nothing ablated.
        clean_logits: [batch] the model's own.
        predictions, clean_predictions: int64 [n_sets, batch], [batch] most probable token at END, or None.
        foil_logits: [n_sets, batch, k], with identity_foil_logits and clean_foil_logits [batch, k]; None without foils.
        verification_error: max |literal re-run - sweep| in logits over the verified sets, or None.
        semantics: which quantity this is.
        settings: everything that made the run: model, baseline, positions, plan, forecast, backends, timings.
    """

    sets: tuple[Ablation, ...]
    logits: Array
    identity_logits: Array
    clean_logits: Array
    predictions: Array | None = None
    clean_predictions: Array | None = None
    foil_logits: Array | None = None  # [n_sets, batch, foil]
    identity_foil_logits: Array | None = None  # [batch, foil]
    clean_foil_logits: Array | None = None  # [batch, foil]
    verification_error: float | None = None
    semantics: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> Array:
        """[n_sets, batch] ablated logit minus the identity row."""
        return self.logits - self.identity_logits

    @property
    def noise_floor(self) -> float:
        """max over prompts of |identity row - the model's own clean logit|."""
        return float(np.abs(self.identity_logits - self.clean_logits).max())

    @property
    def effects(self) -> Array:
        """[n_sets] mean relative effect (-0.05 = the answer's logit is 5 % lower)."""
        usable = self.clean_logits > 0
        if not usable.any():
            warnings.warn(
                "every clean answer logit is <= 0: relative effects are meaningless and given as NaN; use changes",
                RuntimeWarning,
                stacklevel=2,
            )
            return np.full(len(self.sets), np.nan)
        return (self.changes[:, usable] / self.clean_logits[usable]).mean(-1, dtype=np.float64)

    @property
    def n_ratio_excluded(self) -> int:
        """Prompts left out of relative effects because their clean logit is <= 0."""
        return int((self.clean_logits <= 0).sum())

    def of(self, ablation: Any) -> int:
        """Row of a set, given as in the call: ``sweep.logits[sweep.of((9, 6))]``.

        Raises:
            InputError: it is not among the sets.
        """
        wanted = Ablation.parse(ablation)
        check(wanted in self.sets, f"ablation: expected one of the {len(self.sets)} sets of this sweep, got {wanted}")
        return self.sets.index(wanted)

    def rows(self) -> Iterable[dict[str, Any]]:
        """One dictionary per set: set, effect, logit_change."""
        mean = self.changes.mean(-1, dtype=np.float64)
        for ablation, effect, change in zip(self.sets, self.effects, mean, strict=True):
            yield {"set": str(ablation), "effect": float(effect), "logit_change": float(change)}

    def save(self, directory: str | Path) -> None:
        """Write ``ablation.safetensors`` and ``ablation.json`` (never pickle)."""
        from safetensors.numpy import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: np.ascontiguousarray(v) for name, v in values.items() if isinstance(v, np.ndarray)}
        save_file(arrays, directory / _TENSORS)
        record = {
            "format": _FORMAT,
            "sets": [{"heads": [list(head) for head in s.heads], "mlps": list(s.mlps)} for s in self.sets],
            "verification_error": self.verification_error,
            "semantics": self.semantics,
            "settings": self.settings,
        }
        (directory / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> AblationSweep:
        """Read what ``save`` wrote.

        Raises:
            InputError: the directory holds no sweep, or one of another format.
        """
        from safetensors.numpy import load_file

        directory = Path(directory)
        for name in (_RECORD, _TENSORS):
            check(
                (directory / name).is_file(), f"directory: expected a saved AblationSweep with {name}, got {directory}"
            )
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        found = record.pop("format", None)
        check(found == _FORMAT, f"directory: expected format {_FORMAT}, got {found} in {directory / _RECORD}")
        sets = tuple(Ablation(tuple(Head(*h) for h in s["heads"]), tuple(s["mlps"])) for s in record.pop("sets"))
        arrays: dict[str, Any] = load_file(directory / _TENSORS)
        return cls(sets, **arrays, **record)

    def __repr__(self) -> str:
        verified = self.verification_error
        lines = [
            f"AblationSweep: {len(self.sets)} sets, {len(self.clean_logits)} prompts, "
            f"{self.settings.get('model', 'model')}",
            f"  {self.semantics}",
            f"  clean logit {self.clean_logits.mean():.3f}; noise floor {self.noise_floor:.2e} logits"
            + ("" if verified is None else f", literal re-runs agree to {verified:.2e}"),
        ]
        if "quantised" in self.settings:
            lines.append(f"  quantised weights: {self.settings['quantised']}")
        if self.n_ratio_excluded:
            lines.append(f"  {self.n_ratio_excluded} prompts with clean logit <= 0 left out of relative effects")
        mean = self.changes.mean(-1, dtype=np.float64)
        for i in np.argsort(mean, kind="stable")[:_SHOWN]:
            lines.append(f"  {self.sets[i]!s:>12}  {mean[i]:+.4f} logits")
        return "\n".join(lines)
