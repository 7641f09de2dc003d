"""Reading deltas. What a file says is not trusted: every field is checked before anything is done with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from pyarith.errors import InputError, check
from pyarith.tuning.delta import FORMAT, RECORD, SHOWN, Base, Delta, SliceRecord, values_hash, values_path
from pyarith.tuning.slices import KV
from pyarith.types import Head

_HASH, _DIGESTS = re.compile(r"[0-9a-f]{64}"), re.compile(r"([0-9a-f]{8})*")
_DTYPES = ("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16")


def read_delta(folder: str | Path) -> Delta:
    """The delta in a folder, whole and as it was written.

    Raises:
        InputError: there is none; it is half written, changed, or of a newer format. The message names the file and
            what is wrong in it.
    """
    folder = Path(folder)
    path = folder / RECORD
    check(path.is_file(), f"folder: expected a delta with {RECORD}, got {str(folder)!r} without one")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"folder: expected {path} to be whole JSON, got {type(error).__name__}: {error}") from None
    is_delta = isinstance(record, dict) and (record.get("tool"), record.get("kind")) == ("pyarith", "delta")
    check(is_delta, f"folder: expected {path} to be the record of a delta, which pyarith did not write")
    field = _Fields(record, str(path))
    version = field("format", _is_count, "a number")
    check(
        version == FORMAT,
        f"folder: expected format {FORMAT} in {path}, got {version}"
        + ("; a newer pyarith wrote it: update pyarith" if version > FORMAT else ""),
    )
    digest = field("values", _is_hash, "a SHA-256 in hex")
    slices = field("slices", lambda x: isinstance(x, list) and len(x) > 0, "a list of slices")
    records = tuple(_slice(_Fields(one, f"{path}, slice {number}")) for number, one in enumerate(slices))
    names = [one.name for one in records]
    check(len(set(names)) == len(names), f"folder: {path}: expected each parameter once in slices, got {names}")
    digests = field("tensors", lambda x: _is_text(x) and bool(_DIGESTS.fullmatch(x)), "digests of 8 hex digits")
    base = Base(
        kind=field("class", _is_text, "text"),
        config=field("config", _is_object, "an object"),
        dtype=field("dtype", lambda x: x in _DTYPES, f"one of {', '.join(_DTYPES)}"),
        fingerprint=field("fingerprint", _is_text, "text"),
        tensors=tuple(digests[i : i + 8] for i in range(0, len(digests), 8)),
        slices=records,
        versions=field("versions", lambda x: _is_object(x) and all(map(_is_text, x.values())), "texts by name"),
    )
    return Delta(
        folder=folder,
        heads=tuple(Head(*one) for one in field("heads", _is_pairs, "pairs (layer, head)")),
        mlps=tuple(field("mlps", _is_counts, "layer numbers")),
        kv=field("kv", lambda x: x in KV, f"one of {', '.join(KV)}"),
        base=base,
        values=_values(values_path(folder, digest), base, digest),
        settings=field("settings", _is_object, "an object"),
    )


class _Fields:
    """Fields of a JSON object, each checked."""

    def __init__(self, record: Any, where: str) -> None:
        check(isinstance(record, dict), f"folder: {where}: expected an object, got {_short(record)}")
        self._record, self._where = record, where

    def __call__(self, name: str, fits: Callable[[Any], bool], expected: str) -> Any:
        check(name in self._record, f"folder: {self._where}: expected {name!r}, which is not there")
        value = self._record[name]
        check(fits(value), f"folder: {self._where}: expected {name!r} to be {expected}, got {_short(value)}")
        return value


def _slice(field: _Fields) -> SliceRecord:
    shape = field("shape", lambda x: _is_counts(x) and len(x) in (1, 2) and 0 not in x, "one or two sizes")
    dim = field("dim", lambda x: _is_count(x) and x < len(shape), f"an axis of {shape}")

    def inside(ranges: Any) -> bool:
        if not _is_pairs(ranges) or not ranges:
            return False
        edges = [edge for one in ranges for edge in one]
        return all(a < b for a, b in pairwise(edges)) and edges[-1] <= shape[dim]

    ranges = field("ranges", inside, f"rising (start, stop) pairs within {shape[dim]}")
    return SliceRecord(
        name=field("name", _is_text, "text"),
        shape=tuple(shape),
        dim=dim,
        ranges=tuple((start, stop) for start, stop in ranges),
        base=field("base", _is_hash, "a SHA-256 in hex"),
    )


def _values(path: Path, base: Base, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check(path.is_file(), f"folder: expected {path}, which {RECORD} names, and which is not there")
    try:
        values: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"folder: {path} cannot be read: {error}") from None
    expected = {one.name: (one.compact, base.dtype) for one in base.slices}
    found = {name: (tuple(value.shape), str(value.dtype)) for name, value in values.items()}
    wrong = [
        f"{name}: expected {_described(expected.get(name))}, got {_described(found.get(name))}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
    check(not wrong, f"folder: {path} does not hold what {RECORD} names: {'; '.join(wrong[:SHOWN])}")
    got = values_hash(values)
    check(got == digest, f"folder: {path} was changed: expected values with SHA-256 {digest}, got {got}")
    return values


def _described(entry: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if entry is None else f"{list(entry[0])} in {entry[1]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(_is_counts(one) and len(one) == 2 for one in value)
