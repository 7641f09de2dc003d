"""Writing so that a kill leaves either the old file or the new one, and telling a whole file from half of one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

REPORT = "report.html"


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: numpy scalars and arrays unpacked, NaN and infinity as None, the rest as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name and rename it: whoever reads ``path`` never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # bytes of a command line that were no UTF-8
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of ``value`` as JSON."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; ``path`` is a file that is there as long as one is inside. A kill leaves it unlocked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # the one before may have removed the file that this one waited for
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                break
        except FileNotFoundError:
            pass  # removed between two looks: begin again
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def throw_away(folder: Path) -> None:
    """Delete a folder that another process may be writing into: that one makes a new one then."""
    with suppress(FileNotFoundError):
        os.replace(folder, folder.with_name(f"{folder.name}.{secrets.token_hex(4)}"))
    for gone in folder.parent.glob(f"{folder.name}.*"):  # also what a kill left of an earlier one
        shutil.rmtree(gone, ignore_errors=True)


def is_report(path: Path) -> bool:
    """Whether a file is a report that pyarith wrote."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b'<meta name="generator" content="pyarith report' in file.read(1024)


def file_hash(path: Path) -> str:
    """``sha256:...`` of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """``sha256:...`` of settings, the same for the same values in any order."""
    return f"sha256:{hashlib.sha256(json.dumps(plain(dict(settings)), sort_keys=True).encode()).hexdigest()}"


def whole(folder: Path, hashes: Any) -> bool:
    """Whether every file of ``hashes`` (name -> ``file_hash``) lies in ``folder`` with just these bytes."""
    if not isinstance(hashes, dict) or not hashes:
        return False
    root = folder.resolve()
    for name, expected in hashes.items():
        path = (root / str(name)).resolve()
        if not (path.is_relative_to(root) and path.is_file() and file_hash(path) == expected):
            return False
    return True
