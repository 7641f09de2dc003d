"""Deltas in a model: loaded and taken out again, switched, or merged for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.ablation import check_targets
from pyarith.errors import InputError, check
from pyarith.models.adapters import refuse_adapters
from pyarith.models.fingerprint import Identity, identify
from pyarith.models.sites import SLICES, ModelSites, resolve
from pyarith.tuning.delta import LOADED, RECORD, SHOWN, Delta, slice_hash, some
from pyarith.tuning.delta_file import read_delta
from pyarith.tuning.slices import Slice, head_slices, mlp_slices


class LoadedDelta:
    """A delta in a model; ``unload()``, or the end of a ``with`` block, gives the base back bit for bit.

    The model holds it as ``model.pyarith_delta`` while it is loaded. One at a time: see ``DeltaBank`` to switch.

    Attributes:
        model: the model.
        delta: what was loaded: heads, settings, values.
    """

    def __init__(self, model: Any, delta: Delta) -> None:
        self._slices = fitting_slices(model, delta)
        self.model: nn.Module = model
        self.delta = delta
        self._put()

    def _put(self) -> None:
        self._before = _exchange(self._slices, self.delta)
        setattr(self.model, LOADED, self)

    @property
    def loaded(self) -> bool:
        """Whether the model still holds it."""
        return getattr(self.model, LOADED, None) is self

    def unload(self) -> None:
        """Put back what the model held before; a second call does nothing.

        Raises:
            InputError: the model was cast to another dtype meanwhile; nothing is changed.
        """
        if not self.loaded:
            return
        found = str(self._slices[0].weight.dtype)
        check(
            found == self.delta.base.dtype,
            f"unload: expected weights in {self.delta.base.dtype}, as when the delta was loaded, got {found}; cast the "
            "model back, or load the base anew",
        )
        _write(self._slices, self._before)
        delattr(self.model, LOADED)
        self._before = []

    def __enter__(self) -> LoadedDelta:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    def __repr__(self) -> str:
        return f"{self.delta!r}{'' if self.loaded else ' (unloaded)'}"


class DeltaBank:
    """Several deltas over one frozen base, of which one or none is in the model at a time.

    Their values stay in memory, on the CPU. Every switch restores the base first, so that deltas may overlap and be
    used in any order, and then checks that the slices hold what the delta was trained from.

    Args:
        model: the base.

    References: Shen et al. 2024, arXiv:2401.07324 (several small specialists).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._deltas: dict[str, Delta] = {}
        self._last: tuple[str, LoadedDelta] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._deltas)

    @property
    def active(self) -> str | None:
        """Name of the delta in the model; None = the base."""
        return self._last[0] if self._last is not None and self._last[1].loaded else None

    def load(self, name: str, folder: str | Path) -> None:
        """Read a delta and check it against the base; what is in the model stays there.

        Raises:
            InputError: the name is taken, or as from ``load_delta``.
        """
        check(name not in self._deltas, f"name: expected a new one, got {name!r}, which the bank has")
        delta, back = read_delta(folder), self._take_out()
        try:
            fitting_slices(self.model, delta)
        finally:
            back()
        self._deltas[name] = delta

    def use(self, name: str | None) -> None:
        """Put a delta into the model in place of the one that is there; None gives the base.

        Raises:
            InputError: no such name; the base was changed meanwhile. What is in the model stays there.
        """
        known = ", ".join(self._deltas) or "no delta"
        check(name is None or name in self._deltas, f"name: expected None or one of {known}, got {name!r}")
        if name == self.active:
            return
        back = self._take_out()
        try:
            self._last = None if name is None else (name, LoadedDelta(self.model, self._deltas[name]))
        except BaseException:
            back()
            raise

    def _take_out(self) -> Callable[[], None]:
        """Restore the base; returns what undoes that."""
        if self.active is None or self._last is None:
            return lambda: None
        self._last[1].unload()
        return self._last[1]._put

    def __enter__(self) -> DeltaBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.use(None)

    def __repr__(self) -> str:
        return f"DeltaBank: {', '.join(self._deltas) or 'no deltas'}; in the model: {self.active or 'the base'}"


def load_delta(model: Any, folder: str | Path) -> LoadedDelta:
    """Write a saved delta into the model that it was trained from.

    Args:
        model: the base, of the same class, config, dtype and weights; it is changed in place.
        folder: what ``SelectiveTuner.save_delta`` wrote.
    Returns:
        A handle with ``unload()``, which is also a context manager.
    Raises:
        InputError: no whole delta in ``folder``, or it was trained from another model (what differs is named); another
            delta is loaded, or a ``SelectiveTuner`` attached. Nothing is changed.
        UnsupportedModelError: the model is not supported.

    Examples:
        >>> import pyarith as pa, tempfile, torch
        >>> model, tokenizer = pa.load_demo()
        >>> folder = tempfile.TemporaryDirectory()
        >>> with pa.SelectiveTuner(model, heads=[(2, 7)]) as tuner:
        ...     zeros = [torch.nn.init.zeros_(value) for value in tuner.parameters()]  # in place of training
        ...     saved = tuner.save_delta(folder.name)
        >>> model, tokenizer = pa.load_demo()
        >>> rows = model.model.layers[2].self_attn.q_proj.weight[7 * 16 : 8 * 16]
        >>> with pa.load_delta(model, folder.name) as loaded:
        ...     print(loaded.delta.heads, bool(rows.any()))
        (Head(layer=2, head=7),) False
        >>> bool(rows.all())
        True
        >>> folder.cleanup()
    """
    return LoadedDelta(model, read_delta(folder))


def merge_delta(model: Any, folder: str | Path) -> Delta:
    """Write a saved delta into the model for good; ``model.save_pretrained`` then saves the tuned model.

    Args, Raises: as for ``load_delta``.
    Returns:
        What was merged.
    """
    delta = read_delta(folder)
    _exchange(fitting_slices(model, delta), delta)
    return delta


def fitting_slices(model: Any, delta: Delta) -> tuple[Slice, ...]:
    """The slices of a model that a delta replaces, once the model is found to be the base of it.

    They are worked out from heads and MLPs again, and must be those that the file names: no file can reach other
    parameters.

    Raises:
        InputError: what differs, with the names of tensors.
    """
    check(not hasattr(model, SLICES), "model: expected one without a SelectiveTuner; end it with .detach() first")
    check(
        not hasattr(model, LOADED),
        f"model: expected the base, got one with a delta loaded ({getattr(model, LOADED, None)!r}); take it out with "
        "model.pyarith_delta.unload() first, or switch between several with DeltaBank",
    )
    refuse_adapters(model, "a delta")
    sites = resolve(model)
    found, what = identify(model), f"model: expected the base of the delta {str(delta.folder)!r}"
    wrong = _other_model(sites, found, delta)
    check(not wrong, f"{what}; {_few(wrong)}")
    try:
        heads, mlps = check_targets(sites, delta.heads, delta.mlps)
    except InputError as error:
        raise InputError(f"folder: {delta.folder / RECORD}: {error}") from None
    slices = (*head_slices(sites, heads, delta.kv), *mlp_slices(sites, mlps))
    wrong = _other_slices(slices, delta)
    check(not wrong, f"folder: {delta.folder / RECORD} does not name the slices of its heads and MLPs: {_few(wrong)}")
    wrong = _other_values(slices, found, delta)
    held = wrong and all(
        torch.equal(part, new)
        for one in slices
        for part, new in zip(one.views(), one.parts(delta.values[one.name].to(one.weight.device)), strict=True)
    )
    check(not wrong, f"{what}; {_few(wrong)}{'. It holds the values of this delta already' if held else ''}")
    return slices


def _other_model(sites: ModelSites, found: Identity, delta: Delta) -> list[str]:
    """Class, dtype, config and shapes that differ."""
    base, own = delta.base, dict(sites.model.named_parameters(remove_duplicate=False))
    pairs: dict[str, tuple[Any, Any]] = {"class": (base.kind, found.kind), "dtype": (base.dtype, str(sites.dtype))}
    keys = {*base.config, *found.config}
    if base.versions.get("transformers") != metadata.version("transformers"):
        keys = {*base.config} & {*found.config}  # another release has other settings beside these
    pairs |= {f"config.{key}": (base.config.get(key), found.config.get(key)) for key in sorted(keys)}
    for one in base.slices:
        shape = list(own[one.name].shape) if one.name in own else "no such parameter"
        pairs[one.name] = (list(one.shape), shape)
    return [f"{name}: expected {expected}, got {got}" for name, (expected, got) in pairs.items() if expected != got]


def _other_slices(slices: Sequence[Slice], delta: Delta) -> list[str]:
    expected = {one.name: (one.dim, one.ranges) for one in slices}
    got = {one.name: (one.dim, one.ranges) for one in delta.base.slices}
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    return [f"{name}: expected (axis, ranges) {expected.get(name)}, got {got.get(name)}" for name in names]


def _other_values(slices: Sequence[Slice], found: Identity, delta: Delta) -> list[str]:
    """Slices whose hash over all values differs, then other tensors whose samples do."""
    expected = {one.name: one.base for one in delta.base.slices}
    hashes = {one.name: (expected[one.name], slice_hash(one)) for one in slices}
    wrong = {
        name: f"{name}: expected SHA-256 {old[:12]} of the slice, got {new[:12]}"
        for name, (old, new) in hashes.items()
        if old != new
    }
    before = delta.base.tensors
    if len(before) != len(found.tensors):
        return [*wrong.values(), f"expected {len(before)} tensors, got {len(found.tensors)}"]
    changed = [name for (name, new), old in zip(found.tensors.items(), before, strict=True) if new != old]
    others = [name for name in changed if name not in wrong]
    return [*wrong.values(), *([f"other values in {some(others)}"] if others else [])]


def _few(wrong: Sequence[str]) -> str:
    left = len(wrong) - SHOWN
    return "; ".join(wrong[:SHOWN]) + (f"; and {left} more" if left > 0 else "")


def _exchange(slices: Sequence[Slice], delta: Delta) -> list[Tensor]:
    """Write a delta's values; returns what the slices held, on the CPU. Interrupted, it leaves them as they were."""
    held = [torch.cat(one.views(), one.dim).cpu() for one in slices]
    try:
        _write(slices, [delta.values[one.name] for one in slices])
    except BaseException:
        _write(slices, held)
        raise
    return held


def _write(slices: Sequence[Slice], values: Sequence[Tensor]) -> None:
    for one, value in zip(slices, values, strict=True):
        for place, part in zip(one.views(), one.parts(value), strict=True):
            place.copy_(part)
