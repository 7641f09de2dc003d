"""What a run does and holds: time, FLOP and bytes of every op by phase, and the tensors at the high-water mark.

``Account`` sees every op of torch and of pyarith through torch's dispatcher, which slows the run down: the times of ops
are their own, what lies between them is not. ``PhaseTimes`` only times the phases and leaves the run as it is.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyarith.engine.clock import mark, seconds

OUTSIDE = "other"  # what no phase covers
_FACTORIES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_OVERWRITTEN = ("copy_", "fill_", "zero_", "normal_", "uniform_")  # mutated without being read
_GATHERED = ("index", "embedding", "gather", "index_select")  # read as much as they give, not all of the table


def _attention_flop(query: Tensor, key: Tensor) -> float:
    """Two products of every query with every key: q [batch, head, pos, d_head], k [batch, kv head, key, d_head]."""
    return 4.0 * math.prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]


# FLOP of the ops that torch's own table does not know, from their arguments by name
_FLOP: dict[str, Callable[[dict[str, Any]], float]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda a: _attention_flop(a["query"], a["key"]),
    "aten::_grouped_mm": lambda a: 2.0 * a["self"].numel() * a["mat2"].shape[-1],
    "pyarith::head_write_rows": lambda a: 2.0 * a["dz"].numel() * a["w_o"].shape[-1],
    "pyarith::vocab_logsumexp": lambda a: 2.0 * a["normed"].numel() * a["unembed"].shape[0],
    "pyarith::answer_logits": lambda a: 2.0 * a["row"].shape[0] * a["target_rows"].numel(),
    "pyarith::shared_prefix_attention": lambda a: 4.0 * a["q"].numel() * (a["k"].shape[1] + 1),
}


@dataclass
class OpTotal:
    """Sums over the calls of one op in one phase; ``bytes`` counts each input read once and each result written."""

    calls: int = 0
    seconds: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0


@dataclass
class HighWater:
    """Bytes of tensors beyond those that were there before, at the moment when there were most.

    Attributes:
        bytes: of all of them.
        phase: when that was.
        held: what they were for -> bytes.
    """

    bytes: int = 0
    phase: str = OUTSIDE
    held: dict[str, int] = field(default_factory=dict)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor, of what an expanded dimension repeats only one."""
    count = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
    return count * tensor.element_size()


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


@dataclass(frozen=True)
class _Kind:
    """What the schema of an op says of it."""

    name: str
    is_view: bool
    is_factory: bool
    arguments: tuple[str, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]

    @classmethod
    def of(cls, func: Any) -> _Kind:
        schema, short = func._schema, func._schema.name.split("::")[1]
        changed = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        # what is only written: results in arguments of pyarith's ops and of torch's out= variants
        only = {a.name for a in changed if a.name == "out" or a.kwarg_only or short in _OVERWRITTEN}
        shared = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        names = tuple(a.name for a in schema.arguments)
        return cls(
            schema.name,
            shared and not changed,
            short in _FACTORIES,
            names,
            tuple(name for name in names if name not in only),
            tuple(a.name for a in changed),
        )

    def bytes(self, given: dict[str, Any], result: Any) -> float:
        if self.is_factory:
            return 0.0
        inputs = [sum(map(_size, _tensors(given.get(name)))) for name in self.read]
        if self.name.split("::")[1] in _GATHERED:
            inputs[0] = sum(map(_size, _tensors(result)))
        outputs = [given.get(name) for name in self.written] or [result]
        return float(sum(inputs) + sum(map(_size, _tensors(outputs))))


class Account(TorchDispatchMode):
    """Listener and dispatch mode: totals of ops by (phase, op), and the high-water mark of memory.

    Attributes:
        totals: (phase, op) -> its sums, times filled in by ``settle``.
        high_water: see ``HighWater``.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.totals: dict[tuple[str, str], OpTotal] = defaultdict(OpTotal)
        self.high_water = HighWater()
        self._phase = OUTSIDE
        self._kinds: dict[Any, _Kind] = {}
        self._alive: dict[int, tuple[str, int]] = {}  # storage -> (what it is for, bytes)
        self._held: dict[str, int] = defaultdict(int)
        self._bytes = 0
        self._marks: list[tuple[OpTotal, Any, Any]] = []

    def begin(self, phase: str) -> None:
        self._phase = phase

    def end(self, phase: str) -> None:
        self._phase = OUTSIDE

    def label(self, name: str, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            before, size = self._alive[key]
            self._move(before, -size)
            self._alive[key] = (name, size)
            self._move(name, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _Kind.of(func)
        options = kwargs or {}
        if kind.is_view:
            return func(*args, **options)
        # of a model that is spread, each op where its first tensor is
        device = next((tensor.device for tensor in _tensors((args, options))), self.device)
        begin = mark(device)
        result = func(*args, **options)
        end = mark(device)
        total = self.totals[self._phase, kind.name]
        given = dict(zip(kind.arguments, args, strict=False)) | options
        total.calls += 1
        total.bytes += kind.bytes(given, result)
        total.flop += self._flop(func, kind, given, args, options, result)
        if device.type == "cuda":
            self._marks.append((total, begin, end))
        else:
            total.seconds += seconds(begin, end)
        if not kind.written:  # else the result is an argument, which was there before
            for tensor in _tensors(result):
                self._count(tensor, kind.name)
        return result

    def settle(self) -> None:
        """Wait for the device, and add up the times that were only marked."""
        for total, begin, end in self._marks:
            total.seconds += seconds(begin, end)
        self._marks.clear()

    def _flop(self, func: Any, kind: _Kind, given: Any, args: Any, options: Any, result: Any) -> float:
        own = _FLOP.get(kind.name)
        if own is not None:
            return own(given)
        known = flop_registry.get(func._overloadpacket)
        return 0.0 if known is None else float(known(*args, **options, out_val=result))

    def _count(self, tensor: Tensor, op: str) -> None:
        """A tensor in memory that was not there before: it is for its phase and op until a label says more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        shape = " x ".join(map(str, tensor.shape))
        name = f"{self._phase}: {op.split('::')[1]} [{shape}] {str(tensor.dtype).removeprefix('torch.')}"
        self._alive[key] = (name, storage.nbytes())
        self._move(name, storage.nbytes())
        if self._bytes > self.high_water.bytes:
            self.high_water = HighWater(self._bytes, self._phase, dict(self._held))
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        name, size = self._alive.pop(key)
        self._move(name, -size)

    def _move(self, name: str, size: int) -> None:
        self._bytes += size
        self._held[name] += size
        if not self._held[name]:
            del self._held[name]


class PhaseTimes:
    """Listener: seconds of each phase on the device; on a GPU also NVTX ranges, for Nsight."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._begin: Any = None

    def begin(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_push(f"pyarith {phase}")
        self._begin = mark(self.device)

    def end(self, phase: str) -> None:
        self._marks.append((phase, self._begin, mark(self.device)))
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_pop()

    def label(self, name: str, tensor: Tensor) -> None:
        """Nothing: only times are kept."""

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds, in the order in which they came first."""
        found: dict[str, float] = {}
        for phase, begin, end in self._marks:
            found[phase] = found.get(phase, 0.0) + seconds(begin, end)
        return found


class TraceMarks:
    """Listener: phases as ranges in a trace of torch.profiler."""

    def __init__(self) -> None:
        self._range: Any = None

    def begin(self, phase: str) -> None:
        self._range = torch.profiler.record_function(f"pyarith {phase}")
        self._range.__enter__()

    def end(self, phase: str) -> None:
        self._range.__exit__(None, None, None)

    def label(self, name: str, tensor: Tensor) -> None:
        """Nothing: a trace has torch's own account of memory."""


@dataclass(frozen=True)
class Roofline:
    """What this device can do, measured: products of the model's dtype, and a copy (bytes read plus written)."""

    flop_per_second: float
    bytes_per_second: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Roofline:
        """The best of a few products and copies; takes a fraction of a second."""
        cuda = device.type == "cuda"
        n = 8192 if cuda else 1024
        a, b = (torch.full((n, n), 0.5, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        count = (2**30 if cuda else 2**27) // 4  # far beyond any cache
        source, target = (torch.ones(count, device=device) for _ in range(2))
        product = _best(lambda: torch.mm(a, b, out=out), device)
        copied = _best(lambda: target.copy_(source), device)
        return cls(2.0 * n**3 / product, 2.0 * source.nbytes / copied)

    def ceiling(self, flop: float, size: float) -> float:
        """Seconds that the work takes at least."""
        return max(flop / self.flop_per_second, size / self.bytes_per_second)


def _best(call: Callable[[], object], device: torch.device, repetitions: int = 4) -> float:
    """Shortest time of some calls; the first, which also warms up, counts."""
    found = []
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found)
