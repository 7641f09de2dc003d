"""A checkpoint folder of safetensors files, memory-mapped: every tensor a read-only view of its file.

File pages are read when they are touched and dropped by the system when memory is short; the process owns none of them.
"""

from __future__ import annotations

import json
import mmap
import struct
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyarith.errors import InputError, check

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100 * 2**20  # bytes; the format's own limit
_SHOWN = 4


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: file, first byte, and bytes."""

    file: mmap.mmap
    start: int
    size: int


@dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor; start and stop count from the end of the header."""

    name: str
    dtype: str
    shape: torch.Size
    start: int
    stop: int


class Checkpoint:
    """The tensors of a folder with ``model.safetensors``, or with shards and their index.

    Args:
        folder: of a Hugging Face model.
    Attributes:
        tensors: name -> tensor, a view of the file; writing to it ends the process.
    Raises:
        InputError: no such files; a shard that the index names is missing, cut short or damaged; an index and its
            shards that disagree; a dtype that is no plain number. Files and tensors are named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        expected = self._expected()
        missing = sorted(name for name in expected if not (self.folder / name).is_file())
        check(
            not missing,
            f"checkpoint: {self.folder} lacks {len(missing)} of the {len(expected)} files that its index names: "
            f"{_listed(missing)}; fetch them again",
        )
        for name, tensors in expected.items():
            found = self._map(self.folder / name)
            lost = sorted(set(tensors) - set(found))
            check(
                not lost,
                f"checkpoint: {self.folder / name} lacks {len(lost)} tensors that the index places there: "
                f"{_listed(lost)}; the shards are of different checkpoints, fetch the folder again",
            )

    def _expected(self) -> dict[str, list[str]]:
        """Files of the checkpoint, each with the tensors that the index promises."""
        index = self.folder / _INDEX
        if not index.is_file():
            check(
                (self.folder / _SINGLE).is_file(),
                f"checkpoint: expected {_SINGLE} or {_INDEX} in {self.folder}, found neither; weights in another "
                "format cannot be streamed: load the model and save it with save_pretrained",
            )
            return {_SINGLE: []}
        try:
            placed: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            files: dict[str, list[str]] = {}
            for tensor, file in placed.items():
                files.setdefault(file, []).append(tensor)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"checkpoint: cannot read {index}: {error!r}; fetch it again") from error
        return files

    def _map(self, path: Path) -> list[str]:
        """Map one file; the names of its tensors."""
        size = path.stat().st_size
        damaged = f"checkpoint: {path} is cut short or damaged"
        check(size > 8, f"{damaged}: it has {size} bytes; fetch it again")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", mapped[:8])
        whole = length <= min(_LARGEST_HEADER, size - 8)
        check(whole, f"{damaged}: it has {size} bytes, its header alone claims {length}; fetch it again")
        try:
            header: dict[str, Any] = json.loads(mapped[8 : 8 + length])
            header.pop("__metadata__", None)
            entries = [
                _Entry(name, str(entry["dtype"]), torch.Size(entry["shape"]), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{damaged}: its header cannot be read ({error!r}); fetch it again") from error
        first = 8 + length
        described = first + max((entry.stop for entry in entries), default=0)
        check(described == size, f"{damaged}: it has {size} bytes, its header describes {described}; fetch it again")
        for entry in entries:
            self._add(path, mapped, entry, first)
        return list(header)

    def _add(self, path: Path, mapped: mmap.mmap, entry: _Entry, first: int) -> None:
        name, dtype, shape = entry.name, _DTYPES.get(entry.dtype), entry.shape
        check(name not in self.tensors, f"checkpoint: tensor {name} stands in two files, {path.name} is the second")
        if dtype is None:
            raise InputError(
                f"checkpoint: {path}: tensor {name} is stored as {entry.dtype}, which is not supported; expected one "
                f"of {', '.join(_DTYPES)}"
            )
        size = shape.numel() * dtype.itemsize
        check(
            entry.start >= 0 and entry.stop - entry.start == size,
            f"checkpoint: {path}: tensor {name} of shape {list(shape)} in {entry.dtype} should take {size} bytes, its "
            f"header gives {entry.stop - entry.start}; fetch the file again",
        )
        if not size:
            self.tensors[name] = torch.empty(shape, dtype=dtype)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is intended
            flat = torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=first + entry.start)
        self.tensors[name] = flat.view(shape)
        self._places[name] = _Place(mapped, first + entry.start, size)

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors ahead, without waiting for it."""
        if not hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            return
        for name in names:
            place = self._places.get(name)
            if place is not None:
                start = place.start - place.start % mmap.PAGESIZE
                place.file.madvise(mmap.MADV_WILLNEED, start, place.start + place.size - start)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
