"""Finished parts of long runs, kept in a folder, so that a run that was killed goes on where it was.

A part lies under the hash of everything that determines it (model, inputs, settings, versions, threads), so what is
found is what would be computed, bit for bit, and parts of other runs in the same folder are never looked at. A file
begins with the hash of the rest and its own name: one that was cut short, damaged, or put under another name counts as
missing and is computed again. Files are written under a name of their own and renamed, so several processes may share a
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyarith import __version__
from pyarith.errors import InputTypeError, StorageError, check
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.placement import own_forward
from pyarith.models.sites import ModelSites

Array = NDArray[Any]

_MAGIC = b"pyarith part 1\n"
_SUFFIX = ".part"
_TRIES = 5  # to write a part
_SHOWN = 4  # modules named in a message


class Part(NamedTuple):
    """Arrays by name, and whatever else JSON holds."""

    arrays: dict[str, Array]
    record: dict[str, Any]


class Store:
    """A folder of parts; without a folder nothing is kept and nothing found.

    Args:
        folder: made with the first part; None = keep nothing.
    Raises:
        InputTypeError, InputError: not a path, or the path of a file.
    """

    def __init__(self, folder: str | Path | None) -> None:
        given = folder is None or isinstance(folder, str | Path)
        check(given, f"resume: expected None or a folder, got {type(folder).__name__}", InputTypeError)
        self.folder = None if folder is None else Path(folder)
        fits = self.folder is None or self.folder.is_dir() or not self.folder.exists()
        check(fits, f"resume: expected a folder, got the file {folder}")
        self._base = ""

    def under(self, key: Callable[[], Any]) -> Store:
        """The parts of one computation: ``key()`` says what determines them, in types that ``digest`` takes.

        Not called where nothing is kept.
        """
        found = Store(self.folder)
        found._base = "" if self.folder is None else digest([self._base, key()])
        return found

    def get(self, *what: Any) -> Part | None:
        """The part that was put under ``what``, None where there is none or its file is not whole."""
        if self.folder is None:
            return None
        name = digest([self._base, what])
        try:
            content = (self.folder / (name + _SUFFIX)).read_bytes()
        except FileNotFoundError:
            return None
        return unpack(content, name)

    def put(self, what: tuple[Any, ...], arrays: Mapping[str, Array], record: Mapping[str, Any] | None = None) -> None:
        """Keep a part.

        Raises:
            StorageError: it cannot be written; the folder is as it was.
        """
        if self.folder is None:
            return
        name = digest([self._base, what])
        content = pack(arrays, record or {}, name)
        for left in reversed(range(_TRIES)):
            try:
                self._write(content, name)
                return
            except OSError as error:
                if left and isinstance(error, FileNotFoundError):
                    continue  # another process was done with the folder, and threw it away
                raise StorageError(f"resume: cannot keep a part in {self.folder}: {error}") from error

    def _write(self, content: bytes, name: str) -> None:
        assert self.folder is not None
        partial = self.folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._place(partial, name)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                partial.unlink(missing_ok=True)
            raise

    def _place(self, partial: Path, name: str) -> None:
        assert self.folder is not None
        target = self.folder / (name + _SUFFIX)
        try:
            os.replace(partial, target)
        except FileNotFoundError:
            if not target.is_file():
                raise
            return  # another process had this part ready first, and took what seemed left over
        for left in self.folder.glob(f".{name}.*.partial"):  # of runs that were killed while they wrote it
            left.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """Hex SHA-256 of a value of JSON's types, tuples, arrays and tensors; dictionaries in any order are the same.

    Raises:
        TypeError: there is something else in it.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_of_array).encode()).hexdigest()


def _of_array(value: Any) -> Any:
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, torch.Tensor):
        kind, shape = str(value.dtype), list(value.shape)
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        kind, shape, content = value.dtype.str, list(value.shape), np.ascontiguousarray(value)
    else:
        raise TypeError(f"digest: expected JSON's types, arrays and tensors, got {type(value).__name__}")
    return ["array", kind, shape, hashlib.sha256(content.data).hexdigest()]


def pack(arrays: Mapping[str, Array], record: Mapping[str, Any], name: str) -> bytes:
    """A part as bytes, with the hash of the rest in front."""
    from safetensors.numpy import save

    tensors = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    rest = name.encode() + b"\n" + json.dumps(dict(record)).encode() + b"\n" + tensors
    return _MAGIC + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def unpack(content: bytes, name: str) -> Part | None:
    """What ``pack`` took, None where it is not whole or of another name."""
    from safetensors.numpy import load

    stated, _, rest = content.removeprefix(_MAGIC).partition(b"\n")
    if not content.startswith(_MAGIC) or stated != hashlib.sha256(rest).hexdigest().encode():
        return None
    own, record, tensors = rest.split(b"\n", 2)
    return Part(load(tensors), json.loads(record)) if own == name.encode() else None


def circumstances(sites: ModelSites) -> dict[str, Any]:
    """What may change a bit of a result besides its inputs: the model, versions, device, threads, precision.

    Raises:
        InputError: the model has hooks or replaced methods, whose effect nothing tells.
    """
    own = set() if sites.stream is None else sites.stream.hooks
    changed = [
        name or type(module).__name__
        for name, module in sites.model.named_modules()
        if {*module._forward_hooks, *module._forward_pre_hooks} - own or not own_forward(module)
    ]
    check(
        not changed,
        f"resume: expected a model without hooks and replaced forward methods, since parts are recognised by its "
        f"weights, got some on {', '.join(changed[:_SHOWN])}; take them off, or run without resume",
    )
    on_gpu = sites.device.type == "cuda"
    return {
        "model": model_fingerprint(sites.model),
        "dtype": str(sites.dtype),
        "attention": sites.attention,
        "device": torch.cuda.get_device_name(sites.device) if on_gpu else sites.device.type,
        "processor": "" if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "pyarith": __version__,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the libraries that compute; importlib.metadata takes 5 ms a name, these modules are loaded already."""
    return {name: sys.modules[name].__version__ for name in ("torch", "transformers", "numpy")}
