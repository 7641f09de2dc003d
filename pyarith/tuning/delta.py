"""Deltas on disk: the new values of trained slices, beside what they were trained from. Never pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyarith.errors import InputError, StorageError, check
from pyarith.models.fingerprint import identify
from pyarith.tuning.checkpoint import write_whole
from pyarith.tuning.slices import Ranges, Slice
from pyarith.types import Head

if TYPE_CHECKING:
    from pyarith.tuning.selective import SelectiveTuner

RECORD = "delta.json"
LOADED = "pyarith_delta"  # the attribute by which a model holds the delta that is loaded
FORMAT = 1
SHOWN = 4
_PACKAGES = ("torch", "transformers", "safetensors")
_BLOCK = 1 << 24  # bytes of a slice that are gathered at once to be hashed
_OURS = re.compile(r"(delta-[0-9a-f]{12}\.safetensors|\.delta-[0-9a-f]{12}\.safetensors\.partial)")


@dataclass(frozen=True)
class SliceRecord:
    """A slice as a delta names it.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        dim: axis that ``ranges`` counts.
        ranges: (start, stop) pairs.
        base: ``slice_hash`` of what the parameter held there before training.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    ranges: Ranges
    base: str

    @property
    def compact(self) -> tuple[int, ...]:
        """Shape of the slice's values."""
        shape = list(self.shape)
        shape[self.dim] = sum(stop - start for start, stop in self.ranges)
        return tuple(shape)


@dataclass(frozen=True)
class Base:
    """The model that slices are trained from, as it was before.

    Attributes:
        kind: class of the model.
        config: ``Identity.config``.
        dtype: of the weights.
        fingerprint: of the model.
        tensors: digests of the model's tensors, in order of their names; see ``Identity``.
        slices: the slices, with hashes of all their values.
        versions: of pyarith and the libraries.
    """

    kind: str
    config: dict[str, Any]
    dtype: str
    fingerprint: str
    tensors: tuple[str, ...]
    slices: tuple[SliceRecord, ...]
    versions: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, slices: Sequence[Slice]) -> Base:
        """A model as it is now; reads every value of the slices once, a block at a time."""
        from pyarith import __version__

        found = identify(model)
        records = tuple(
            SliceRecord(one.name, tuple(one.weight.shape), one.dim, one.ranges, slice_hash(one)) for one in slices
        )
        return cls(
            kind=found.kind,
            config=found.config,
            dtype=str(slices[0].weight.dtype),
            fingerprint=found.fingerprint,
            tensors=tuple(found.tensors.values()),
            slices=records,
            versions={"pyarith": __version__, **{name: metadata.version(name) for name in _PACKAGES}},
        )


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """What ``save_delta`` wrote.

    Attributes:
        folder: where it lay.
        heads, mlps, kv: what was trained.
        base: what it was trained from.
        values: name of the parameter -> new values of its slice, in the weights' dtype, on the CPU.
        settings: what the caller of ``save_delta`` gave.
    """

    folder: Path
    heads: tuple[Head, ...]
    mlps: tuple[int, ...]
    kv: str
    base: Base
    values: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def n_parameters(self) -> int:
        """New numbers."""
        return sum(value.numel() for value in self.values.values())

    def __repr__(self) -> str:
        return (
            f"Delta: {len(self.heads)} heads, {len(self.mlps)} MLPs, {self.n_parameters:,} parameters in "
            f"{self.base.dtype.removeprefix('torch.')}, from {self.folder}"
        )


def save_delta(tuner: SelectiveTuner, folder: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
    """``SelectiveTuner.save_delta``.

    The values go first, under a name of their own; the record names them, and renaming it into place is what makes the
    new delta the one that counts. What the old record named is deleted last.
    """
    folder, record = Path(folder), {**_record(tuner), "settings": dict(settings or {})}
    check(folder.is_dir() or not folder.exists(), f"folder: expected a folder, got the file {str(folder)!r}")
    try:
        json.dumps(record["settings"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"settings: expected what JSON holds, got {error}") from None
    if tuner.attached:
        tuner.sync_changed()
    _check_rest(tuner)
    values = {one.name: torch.cat(one.views(), one.dim).cpu() for one in tuner.slices}
    record["values"] = values_hash(values)
    place = values_path(folder, record["values"])
    is_new, size = not place.exists(), sum(value.nbytes for value in values.values())
    lines = ",\n".join(f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in record.items())
    write_whole(place, lambda at: _save(values, at), size)
    try:
        write_whole(folder / RECORD, lambda at: at.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8"))
    except StorageError:
        if is_new:
            place.unlink()
        raise
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file != place:
            file.unlink()
    return folder


def _save(values: dict[str, Tensor], at: Path) -> None:
    from safetensors.torch import save_file

    at.touch()
    mode = at.stat().st_mode  # that of any new file; safetensors makes its own readable by the owner alone
    save_file(values, at)
    at.chmod(mode)


def _record(tuner: SelectiveTuner) -> dict[str, Any]:
    base = tuner.base
    return {
        "tool": "pyarith",
        "kind": "delta",
        "format": FORMAT,
        "heads": [list(head) for head in tuner.heads],
        "mlps": list(tuner.mlps),
        "kv": tuner.kv,
        "class": base.kind,
        "config": base.config,
        "dtype": base.dtype,
        "fingerprint": base.fingerprint,
        "tensors": "".join(base.tensors),
        "slices": [asdict(one) for one in base.slices],
        "versions": base.versions,
    }


def _check_rest(tuner: SelectiveTuner) -> None:
    """Refuse a model that its base and the slices do not give: in another dtype, or with changes elsewhere."""
    found, own = str(tuner.slices[0].weight.dtype), {one.weight.data_ptr() for one in tuner.slices}
    check(
        found == tuner.base.dtype,
        f"model: expected weights in {tuner.base.dtype}, as when the tuner was attached, got {found}",
    )
    state, now = tuner.model.state_dict(), identify(tuner.model).tensors
    check(
        len(now) == len(tuner.base.tensors),
        f"model: expected {len(tuner.base.tensors)} tensors, as when the tuner was attached, got {len(now)}",
    )
    changed = [
        name
        for (name, digest), before in zip(now.items(), tuner.base.tensors, strict=True)
        if digest != before and state[name].data_ptr() not in own
    ]
    check(
        not changed,
        f"model: expected changes in the tuner's slices only, which are all that a delta holds; changed are also "
        f"{some(changed)}: save the whole model with save_pretrained",
    )


def values_path(folder: Path, digest: str) -> Path:
    """Where the values of a record with this ``values_hash`` lie."""
    return folder / f"delta-{digest[:12]}.safetensors"


def some(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    left = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {left} more" if left > 0 else "")


def slice_hash(one: Slice) -> str:
    """SHA-256 over the bytes of a slice's values, [rows, columns] of the compact slice, in hex."""
    digest = hashlib.sha256()
    for block in _blocks(one.views(), one.dim):
        digest.update(_bytes(block))
    return digest.hexdigest()


def values_hash(values: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in order of names, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(values: Tensor) -> Any:
    return values.contiguous().reshape(-1).cpu().view(torch.uint8).numpy()


def _blocks(views: Sequence[Tensor], dim: int) -> Iterator[Tensor]:
    """The rows of views put side by side along ``dim``, some at a time."""
    width = sum(view[:1].nbytes for view in views)
    rows = max(1, _BLOCK // width)
    if dim == 0:
        for view in views:
            yield from view.split(rows)
    else:
        for parts in zip(*(view.split(rows) for view in views), strict=True):
            yield torch.cat(parts, dim)
