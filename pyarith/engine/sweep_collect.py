"""Rows of blocks and chunks become logits and predictions, in the order of sets and prompts; each is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyarith.engine import oracle
from pyarith.engine.baselines import Baseline
from pyarith.engine.batch import Batch
from pyarith.engine.readout import Readout, split
from pyarith.engine.replay import Replay
from pyarith.engine.store import Store
from pyarith.engine.sweep_inputs import Clean
from pyarith.engine.sweep_layers import Chunk
from pyarith.errors import NonFiniteError, SelfCheckError
from pyarith.models.sites import ModelSites

Array = NDArray[Any]

_VOCAB_ROWS = 256  # rows whose logits over the whole vocabulary exist at a time


@dataclass(frozen=True)
class Options:
    """How a sweep is run; see ``ablation_sweep``."""

    baseline: Baseline
    end: bool
    predictions: bool
    memory_budget: int | None
    backend: str
    backends: dict[str, str]
    verify: int
    progress: Callable[[int], None]
    parts: Store


@dataclass(frozen=True)
class Prompts:
    """Left-aligned ids [batch, pos], lengths [batch], targets [batch, 1 + k] on the host."""

    ids: Tensor
    lengths: Tensor
    targets: Tensor

    def batch(self) -> Batch:
        """As the self-check of the replay wants it."""
        return Batch(self.ids, self.ids, self.lengths, self.lengths, self.targets)


@dataclass
class Collector:
    """Scatters rows of blocks and chunks into arrays in the order of sets and prompts."""

    sites: ModelSites
    replay: Replay
    prompts: Prompts
    n_sets: int
    options: Options
    arrays: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    resumed: int = 0  # parts of earlier runs

    def __post_init__(self) -> None:
        n, foils = self.prompts.targets.shape[0], self.prompts.targets.shape[1] - 1
        kind = np.float64 if self.sites.row_dtype == torch.float64 else np.float32
        for name, axes in (("", (self.n_sets, n)), ("identity_", (n,)), ("clean_", (n,))):
            self.arrays[f"{name}logits"] = np.full(axes, np.nan, kind)
            if foils:
                self.arrays[f"{name}foil_logits"] = np.full((*axes, foils), np.nan, kind)
            if self.options.predictions and name != "identity_":
                self.arrays[f"{name}predictions"] = np.full(axes, -1, np.int64)

    def _readout(self, clean: Clean) -> Readout:
        targets = self.prompts.targets[clean.indices].to(self.sites.device)
        return Readout(self.sites, self.replay.final_norm, self.replay.unembed, targets, self.replay.backend)

    def own(self, clean: Clean) -> dict[str, Array]:
        """The model's own logits [batch, 1 + k], and predictions [batch] if asked for."""
        found = {"logits": self._readout(clean).of_hidden(clean.hidden).cpu().numpy()}
        if self.options.predictions:
            found["predictions"] = self._most_probable(clean.hidden).cpu().numpy()
        return found

    def read(self, clean: Clean, chunk: Chunk, rows: Tensor, own: Array) -> dict[str, Array]:
        """Logits [1 + set, batch, 1 + k], the identity row first, and predictions [set, batch] if asked for.

        Args:
            rows: [1 + set, batch, d_model] after the last block.
            own: [batch] the model's own logits.
        Raises:
            NonFiniteError: a logit is NaN or infinite.
            SelfCheckError: the identity row is not the model's own logit.
        """
        x = self.replay._buffer("x", tuple(rows.shape), self.sites.dtype)
        rows = rows.contiguous()
        found: dict[str, Array] = {}
        if self.options.predictions:
            self.replay.final_norm(rows, None, None, x)
            tokens = self._most_probable(x[1:].flatten(0, 1)).view(len(chunk), clean.batch)
            found["predictions"] = tokens.cpu().numpy()
        readout = self._readout(clean)
        logits = readout.read(rows, 0, len(rows), 0, None, None, x, False).logits.cpu().numpy()
        if not (np.isfinite(logits).all() and np.isfinite(own).all()):
            bad = ~np.isfinite(logits[..., 0])
            what = "the identity row" if bad[0].any() else f"{int(bad.any(1).sum())} sets of heads"
            raise NonFiniteError(
                f"non-finite values: {what} at the final norm (the model overflows {self.sites.dtype}, or a weight "
                "or baseline holds NaN): load the model in fp32 or bf16"
            )
        self._check_identity(clean.indices.numpy(), logits[0, :, 0], own)
        return {**found, "logits": logits}

    def _check_identity(self, index: Any, identity: Any, own: Any) -> None:
        error = np.abs(identity - own)
        allowed = oracle.tolerance(self.sites, max(1.0, float(np.abs(own).max())))
        if error.max() > allowed:
            worst = int(error.argmax())
            found = (
                f"self-check: family {self.sites.spec.name!r}, prompt {int(index[worst])}: with nothing ablated the "
                f"sweep gives logit {identity[worst]:.6g}, the model itself {own[worst]:.6g} (tolerance {allowed:.2g})"
            )
            if not oracle.excused(self.sites, found):
                raise SelfCheckError(
                    f"{found}. The model does something that its family spec does not describe; no result is given"
                )

    def put_own(self, block: Tensor, found: Mapping[str, Array]) -> None:
        """Store what ``own`` gave for a block of prompts."""
        index = block.numpy()
        self._put("clean_", (index,), found["logits"])
        if self.options.predictions:
            self.arrays["clean_predictions"][index] = found["predictions"]

    def put(self, block: Tensor, chunk: Chunk, found: Mapping[str, Array]) -> None:
        """Store what ``read`` gave for a chunk of sets on a block of prompts, and tell how far the sweep is."""
        index = block.numpy()
        logits = found["logits"]
        self._put("identity_", (index,), logits[0])
        self._put("", (chunk.indices[:, None], index), logits[1:])
        if self.options.predictions:
            self.arrays["predictions"][chunk.indices[:, None], index] = found["predictions"]
        self.done += len(chunk) * len(index)
        self.options.progress(self.done)

    def _put(self, name: str, at: tuple[Any, ...], logits: Array) -> None:
        self.arrays[f"{name}logits"][at] = logits[..., 0]
        if f"{name}foil_logits" in self.arrays:
            self.arrays[f"{name}foil_logits"][at] = logits[..., 1:]

    def _most_probable(self, hidden: Tensor) -> Tensor:
        """argmax over the vocabulary of decoder outputs [rows, d_model]; a softcap keeps the order."""
        unembed = self.replay.unembed
        found = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        for a, b in split(len(hidden), _VOCAB_ROWS):
            logits = hidden[a:b] @ unembed.weight.t()
            found[a:b] = (logits if unembed.bias is None else logits + unembed.bias).argmax(-1)
        return found
