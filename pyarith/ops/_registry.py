"""The one table that knows backends: op x backend -> function, devices, and why it cannot run.

torch dispatches on the device only, so each op registers one function for every device key; that
function asks this table. A backend asked for by name runs or raises `BackendError` with the reason;
"auto" takes the first of an op's own list that can run, and `backend_of` says which.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import increment_version

from pyarith.errors import BackendError, InputError

LIBRARY = torch.library.Library("pyarith", "DEF")
NAMES = ("cpu", "cuda", "triton", "reference")
DEVICE_KEYS = ("CPU", "CUDA", "MPS")

_log = logging.getLogger(__name__)


def runs_anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """The ``why_not`` of a backend without conditions of its own."""
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        function: takes the op's schema arguments without ``backend``.
        devices: device types it runs on; empty means every one.
        why_not: (device, dtype) -> the reason why it cannot run there, or None.
        guarded: the function itself refuses all that the op's check refuses, by a ValueError and before it changes
            anything. The check then runs only to say what is wrong: for ops of so many tensors that looking at each
            of them in Python takes a good part of the op's time.
    """

    function: Callable[..., None]
    devices: tuple[str, ...] = ()
    why_not: Callable[[torch.device, torch.dtype], str | None] = runs_anywhere
    guarded: bool = False

    def reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.devices and device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device.type}"
        return self.why_not(device, dtype)


_table: dict[str, dict[str, Backend]] = {}
_chosen: dict[tuple[str, str, torch.device, torch.dtype], tuple[str, Callable[..., None]]] = {}


def define(op: str, schema: str, check: Callable[..., torch.dtype], backends: dict[str, Backend]) -> Any:
    """Register an op whose results go into mutated arguments, and return its torch entry.

    Args:
        op: name in the namespace ``pyarith``.
        schema: torch schema without the name: first a tensor or a list of them (their device is the op's), results in
            mutated arguments, nothing returned, ``str backend="auto"`` as the last keyword.
        check: the op's contract; raises or returns the dtype that decides on the backend, for an op with a guarded
            backend that of the first tensor. It is the fake function too, so both paths refuse the same inputs.
        backends: name (of `NAMES`) -> implementation, in the order in which "auto" tries them; ``reference``, which
            runs everywhere, comes last.
    """
    unknown = set(backends) - set(NAMES)
    if unknown or list(backends)[-1:] != ["reference"] or op in _table:
        raise InputError(
            f"define {op!r}: new op with backends of {NAMES}, the reference last, expected; got {list(backends)}"
        )
    _table[op] = backends

    def fake(*args: Any, backend: str = "auto") -> None:
        check(*args)

    guards = any(one.guarded for one in backends.values())

    def real(*args: Any, backend: str = "auto") -> None:
        first = args[0]
        if isinstance(first, list):
            first = first[0] if first else check(*args)
        key = (op, backend, first.device, first.dtype if guards else check(*args))
        name, function = _chosen.get(key) or _choose(*key)
        if not guards:
            function(*args)
        elif backends[name].guarded:
            try:
                function(*args)
            except ValueError as error:
                check(*args)
                raise InputError(f"{op}: {error}") from error
        else:
            check(*args)
            function(*args)
        # Kernels write through raw pointers: say so, or autograd would use what it saved of these tensors before.
        for i in mutated:
            increment_version(args[i])

    LIBRARY.define(op + schema, tags=(torch.Tag.needs_exact_strides,))
    entry = getattr(torch.ops.pyarith, op).default
    arguments = entry._schema.arguments
    mutated = [i for i, arg in enumerate(arguments) if arg.alias_info is not None and arg.alias_info.is_write]
    torch.library.register_fake(f"pyarith::{op}", fake, lib=LIBRARY)
    for key in DEVICE_KEYS:
        LIBRARY.impl(op, real, key)
    return entry


def _backends(op: str) -> dict[str, Backend]:
    if op not in _table:
        raise InputError(f"op: expected one of {', '.join(sorted(_table))}; got {op!r}")
    return _table[op]


def _choose(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Callable[..., None]]:
    known = _backends(op)
    if backend != "auto" and backend not in NAMES:
        raise InputError(f"backend: expected one of auto, {', '.join(NAMES)}; got {backend!r}")
    for name in known if backend == "auto" else (backend,):
        reason = why_not(op, name, device, dtype)
        if reason is None:
            _log.info("%s on %s %s: %s", op, device, dtype, name)
            return _chosen.setdefault((op, backend, device, dtype), (name, known[name].function))
        if name == backend:
            raise BackendError(f"{op}: backend {name!r} cannot run on {device} in {dtype}: {reason}")
    raise BackendError(f"{op}: no backend can run on {device} in {dtype}")


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` there, or None if it can."""
    found = _backends(op).get(backend)
    return f"{op} has no {backend} implementation" if found is None else found.reason(device, dtype)


def backend_of(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that "auto" takes for ``op`` on ``device`` in ``dtype``."""
    return _choose(op, "auto", torch.device(device), dtype)[0]


@dataclass(frozen=True)
class ReportRow:
    """One line of `report`: can this backend run this op on its own device?"""

    op: str
    backend: str
    available: bool
    reason: str | None


def report(dtype: torch.dtype = torch.float32) -> list[ReportRow]:
    """Every op and every backend name with the reason why it cannot run (None where it can)."""
    rows = []
    for op, known in sorted(_table.items()):
        for name in NAMES:
            devices = known[name].devices if name in known else ()
            reason = why_not(op, name, torch.device(devices[0] if devices else "cpu"), dtype)
            rows.append(ReportRow(op, name, reason is None, reason))
    return rows
