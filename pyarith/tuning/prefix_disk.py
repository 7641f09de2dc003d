"""The folder of a ``PrefixCache``: one checksummed safetensors file per batch, tied to one model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyarith import __version__
from pyarith.errors import InputError, check
from pyarith.models.fingerprint import identify
from pyarith.models.sites import ModelSites
from pyarith.tuning.checkpoint import differences
from pyarith.tuning.prefix_guard import PrefixGuard

_NAME = re.compile(r"([0-9a-f]{32})\.prefix")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABANDONED = 3600  # seconds after which a half-written file is no longer somebody's
_SHOWN = 4


def origin_of(sites: ModelSites, guard: PrefixGuard) -> dict[str, Any]:
    """What states depend on beside the batch, the weights below hashed in full: equal origins give equal bits."""
    import transformers

    identity = identify(sites.model)
    weights = hashlib.sha256()
    for name, value in guard.weights():
        weights.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        weights.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    on_cuda = sites.device.type == "cuda"
    return {
        "model": identity.kind,
        "config": identity.config,
        "weights below": weights.hexdigest(),
        "first_layer": guard.first_layer,
        "device": torch.cuda.get_device_name(sites.device) if on_cuda else sites.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyarith": __version__,
    }


class PrefixFolder:
    """Files ``<digest>.prefix``: safetensors with one tensor, "states", and in the metadata "about" (JSON: ``origin``,
    digest, what the caller adds), its CRC-32 and that of the tensor's bytes.

    Written under another name and renamed; not forced to the disk at once, since a torn file fails its checksum and
    is computed again. Several processes may share a folder; each counts what it found at its start and wrote itself.

    Args:
        place: the folder, made if it is not there.
        budget: most bytes of all files together; None = half of what is free.
        origin: of every file; a folder with files of another one is refused.
    Raises:
        InputError: the folder cannot be used, or was made for another model or on another machine.
    """

    def __init__(self, place: str | Path, budget: int | None, origin: dict[str, Any]) -> None:
        self.place, self._origin = Path(place), origin
        self.unreadable = 0
        self.full = False
        self._sizes: dict[str, int] = {}
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            for path in self.place.glob("*.prefix.partial"):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
            for path in self.place.iterdir():
                if match := _NAME.fullmatch(path.name):
                    self._sizes[match[1]] = path.stat().st_size
            check(os.access(self.place, os.W_OK), f"disk: expected a folder to write to, {self.place} is read-only")
            free = shutil.disk_usage(self.place).free
        except OSError as error:
            raise InputError(f"disk: {self.place} cannot be used as a folder: {error}") from None
        self.budget = free // 2 if budget is None else budget

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(self._sizes.values())

    def known(self) -> Iterator[dict[str, Any]]:
        """What every readable file says about itself, checked but for the tensor.

        Raises:
            InputError: a file has another origin; the message says what differs.
        """
        for digest in list(self._sizes):
            about = self._about(digest)
            if about is None:
                self.unreadable += 1
                continue
            other = differences(about["origin"], self._origin)
            check(
                not other,
                f"disk: {self.place} holds states that this model would not compute here: {'; '.join(other[:_SHOWN])}; "
                "give another folder, or delete it",
            )
            yield about

    def has_room(self, digest: str, size: int) -> bool:
        """Whether a file of ``size`` bytes may be written."""
        return not self.full and self.bytes - self._sizes.get(digest, 0) + size <= self.budget

    def write(self, digest: str, states: Tensor, about: dict[str, Any]) -> bool:
        """Keep ``states``, a CPU tensor; False where the budget or the disk has no room. Says once that it is full."""
        from safetensors.torch import save

        text = json.dumps({**about, "origin": self._origin, "digest": digest})
        head = {"about": text, "about_crc32": str(zlib.crc32(text.encode())), "crc32": str(_crc(states))}
        data = save({"states": states}, head)
        if not self.has_room(digest, len(data)):
            return False
        partial = self.place / f"{digest}.{os.getpid()}.prefix.partial"
        try:
            partial.write_bytes(data)
            os.replace(partial, self._path(digest))
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno not in _NO_ROOM:
                raise
            self.full = True
            warnings.warn(
                f"PrefixCache: {self.place} has no more room ({error.strerror}); training goes on, and further states "
                "are not written there",
                stacklevel=2,
            )
            return False
        self._sizes[digest] = len(data)
        return True

    def read(self, digest: str) -> Tensor | None:
        """The states, or None where the file is gone or its checksums do not fit."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(digest), "pt") as file:
                head = file.metadata()
                states: Tensor = file.get_tensor("states")
            whole = self._read_about(head, digest) is not None and _crc(states) == int(head["crc32"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return None
        return states if whole else None

    def _about(self, digest: str) -> dict[str, Any] | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(digest), "pt") as file:
                return self._read_about(file.metadata(), digest)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return None

    @staticmethod
    def _read_about(head: dict[str, str], digest: str) -> dict[str, Any] | None:
        if zlib.crc32(head["about"].encode()) != int(head["about_crc32"]):
            return None
        about: dict[str, Any] = json.loads(head["about"])
        return about if about["digest"] == digest else None

    def _path(self, digest: str) -> Path:
        return self.place / f"{digest}.prefix"


def _crc(states: Tensor) -> int:
    """CRC-32 of dtype, shape and bytes."""
    data = states.reshape(-1).view(torch.uint8).numpy().data
    return zlib.crc32(data, zlib.crc32(f"{states.dtype} {tuple(states.shape)}".encode()))
