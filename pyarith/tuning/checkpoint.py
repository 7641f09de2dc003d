"""Checkpoints of a training run: one file with everything, written whole or not at all. Never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyarith.errors import InputError, StorageError, check

NAME = "checkpoint.safetensors"
_FORMAT = 1
_SHOWN = 4


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        values: what JSON holds, such as the step.
        tensors: name -> tensor on the CPU.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix/``, without it."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(f"{prefix}/")}


@dataclass(frozen=True)
class Checkpoint:
    """The place of a run's checkpoint, and which run it is.

    Attributes:
        path: the file.
        identity: everything that makes two runs the same (settings, data, model, heads), as JSON holds it.
        every: steps between two.
    """

    path: Path
    identity: dict[str, Any]
    every: int

    def save(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint.

        Raises:
            StorageError: it could not be written (a full disk); the one before is still there.
        """
        from safetensors.torch import save_file

        header = {"format": _FORMAT, "identity": self.identity, **values}
        flat = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
        size = sum(value.nbytes for value in flat.values())
        write_whole(self.path, lambda at: save_file(flat, at, {"pyarith": json.dumps(header, allow_nan=False)}), size)

    def load(self) -> Saved | None:
        """The checkpoint of this very run; None where there is none.

        Raises:
            InputError: it cannot be read, is newer, or of another run; the message names what differs.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})["pyarith"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"resume: {self.path} cannot be read as a checkpoint ({error}); delete it, or pass resume=False"
            ) from None
        found = header.pop("format", None)
        check(found == _FORMAT, f"resume: expected format {_FORMAT} in {self.path}, got {found}; pass resume=False")
        other = differences(header.pop("identity"), json.loads(json.dumps(self.identity)))
        check(
            not other,
            f"resume: {self.path} is the checkpoint of another run: {'; '.join(other[:_SHOWN])}"
            f"{f' and {len(other) - _SHOWN} more' if len(other) > _SHOWN else ''}; resume=False starts anew and "
            "replaces it",
        )
        return Saved(header, tensors)

    def remove(self) -> None:
        """Delete the file, when the run is over."""
        self.path.unlink(missing_ok=True)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """In words, where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = (
            differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
            for key in dict.fromkeys([*old, *new])
        )
        return [one for some in inner for one in some]
    return [] if old == new else [f"{name} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_whole(path: Path, write: Callable[[Path], Any], size: int = 0) -> None:
    """Write a file under a temporary name and rename it: a kill or a full disk leaves the old one as it was.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.
        size: about how many bytes, for the message.
    Raises:
        StorageError: it could not be written.
    """
    from safetensors import SafetensorError

    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        before = "the one before is still there" if path.exists() else "nothing was there before"
        need = f" (about {size / 2**20:.1f} MiB)" if size else ""
        raise StorageError(
            f"cannot write {path}{need}: {error}; {before}; free space or choose another place"
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of any torch optimizer as JSON values and tensors."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for number, own in state["state"].items():
        for key, value in own.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{key}"] = value
            else:
                values[f"{number}/{key}"] = value
    return {"groups": state["param_groups"], "state": values}, tensors


def unpack_optimizer(optimizer: torch.optim.Optimizer, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what ``pack_optimizer`` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*values["state"].items(), *tensors.items()]:
        number, key = name.split("/", 1)
        state.setdefault(int(number), {})[key] = value
    lists = [name for name in values["groups"][0] if isinstance(values["groups"][0][name], list) and name != "params"]
    groups = [{**one, **{name: tuple(one[name]) for name in lists}} for one in values["groups"]]  # JSON has no tuples
    optimizer.load_state_dict({"state": state, "param_groups": groups})
