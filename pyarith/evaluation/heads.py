"""Lists of heads as small JSON files, so that what was found on one task can be applied to another, or elsewhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarith.engine.ablation import check_targets
from pyarith.engine.references import fingerprint
from pyarith.errors import InputError, check
from pyarith.models.sites import ModelSites, resolve
from pyarith.types import Head

_FORMAT = 1


@dataclass(frozen=True)
class HeadList:
    """Heads with where they come from.

    Attributes:
        heads: in the order given, such as the strongest first.
        n_layers, n_heads: sizes of the model they were found in; None where no model was given.
        model: fingerprint (config, dtype and samples of every weight) of that model, or None.
        meta: anything else that JSON holds.
    """

    heads: tuple[Head, ...]
    n_layers: int | None = None
    n_heads: int | None = None
    model: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.heads)

    def check(self, model: Any) -> None:
        """Raise InputError unless the list fits a model.

        Raises:
            InputError: other numbers of layers or heads, or heads that the model does not have (all are named).
        Warns:
            UserWarning: same sizes, but config or weights differ: a model tuned since, or another one.
        """
        self.check_sites(resolve(model))

    def check_sites(self, sites: ModelSites) -> None:
        """``check`` for a model whose sites are at hand."""
        sizes = (self.n_layers, self.n_heads)
        here = (sites.n_layers, sites.n_heads)
        fits = None in sizes or sizes == here
        check(fits, f"heads: made for a model with {sizes[0]} layers of {sizes[1]} heads, this one has {_by(here)}")
        check_targets(sites, self.heads)
        if self.model is not None and self.model != fingerprint(sites):
            warnings.warn(
                "heads: made with another model of the same sizes, or its weights, their dtype or its config have "
                "changed since",
                stacklevel=3,
            )


def _by(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} layers of {sizes[1]}"


def save_heads(
    path: str | Path, heads: Iterable[Any], meta: Mapping[str, Any] | None = None, *, model: Any = None
) -> None:
    """Write a list of heads as JSON.

    Args:
        path: the file; folders are made.
        heads: ``(layer, head)`` tuples, or texts such as ``"9.6"``, each once; the order is kept.
        meta: what else to record (task, threshold, seed ...), as far as JSON holds it.
        model: where given, its sizes and fingerprint are recorded, and the heads are checked against it.
    Raises:
        InputError: no heads, some twice, or some that the model does not have (all are named); meta that is no JSON.
    """
    chosen = _heads(heads, "heads")
    record: dict[str, Any] = {"format": _FORMAT, "heads": [list(head) for head in chosen]}
    if model is not None:
        sites = resolve(model)
        check_targets(sites, chosen)
        record |= {"n_layers": sites.n_layers, "n_heads": sites.n_heads, "model": fingerprint(sites)}
    record["meta"] = dict(meta or {})
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"meta: expected what JSON holds, got {meta!r:.200} ({error})") from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_heads(path: str | Path, model: Any = None) -> HeadList:
    """Read what ``save_heads`` wrote.

    Args:
        path: the file.
        model: where given, the list is checked against it, see ``HeadList.check``.
    Raises:
        InputError: no such file, not such a file, or a list that does not fit ``model``.
    Warns:
        UserWarning: the model's config or weights are not those recorded.
    """
    path = Path(path)
    check(path.is_file(), f"path: expected a file written by save_heads, got {path}, which does not exist")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON written by save_heads ({error})") from None
    fits = isinstance(record, dict) and record.get("format") == _FORMAT and isinstance(record.get("heads"), list)
    check(fits, f"{path}: expected an object with format {_FORMAT} and heads, as save_heads writes it")
    found = HeadList(
        _heads(record["heads"], str(path)),
        record.get("n_layers"),
        record.get("n_heads"),
        record.get("model"),
        record.get("meta") or {},
    )
    if model is not None:
        found.check(model)
    return found


def as_head_list(value: Any, name: str) -> HeadList:
    """A ``HeadList`` as it is; a file; or heads. Result rows with a ``head`` (``PatchResult.top``) count as heads."""
    if isinstance(value, HeadList):
        return value
    if isinstance(value, Path):
        return load_heads(value)
    return HeadList(_heads(value, name))


def _heads(heads: Iterable[Any], name: str) -> tuple[Head, ...]:
    given = [heads] if isinstance(heads, str) else list(heads)
    found, wrong = [], []
    for one in given:
        try:
            found.append(_head(one))
        except (InputError, TypeError, ValueError):
            wrong.append(one)
    check(not wrong, f"{name}: expected (layer, head) pairs or texts such as '9.6', got {wrong[:8]}")
    check(bool(found), f"{name}: expected at least one head, got none")
    twice = sorted({head for head in found if found.count(head) > 1})
    check(not twice, f"{name}: expected each head once, got twice {', '.join(map(str, twice))}")
    return tuple(found)


def _head(one: Any) -> Head:
    if isinstance(one, str):
        return Head.parse(one)
    layer, head = getattr(one, "head", one) if not isinstance(one, Head) else one
    whole = all(not isinstance(i, bool) and int(i) == i and i >= 0 for i in (layer, head))
    check(whole, "not whole numbers")
    return Head(int(layer), int(head))
