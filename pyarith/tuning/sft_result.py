"""``TuneResult``: what a fine-tuning run did, step by step, and how to do it again."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.tuning.checkpoint import write_whole
from pyarith.tuning.loop import COLUMNS
from pyarith.types import Head

RECORD, LOSSES = "tune.json", "losses.csv"
_WHOLE = ("completion_tokens", "tokens", "memory")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True, eq=False, repr=False)
class TuneResult:
    """A finished run of ``precise_sft``.

    Attributes:
        heads, mlps: what was trained.
        shared_heads: heads that were not chosen but read keys and values that were trained.
        n_parameters: trained numbers.
        state_bytes: bytes of the slices, their gradients, and AdamW's moments.
        history: column -> fp64 [step]; ``loss``, ``task_loss``, ``general_loss`` (NaN without replay), ``lr``,
            ``grad_norm``, ``completion_tokens``, ``tokens``, ``seconds``, ``memory``.
        steps_per_epoch: steps in which every example is seen once.
        resumed_at: steps in the checkpoint that the run went on from; None where it was not interrupted.
        settings: all of ``TuneSettings``, and the gradient factor and learning rate that came of them.
        data: where examples came from, how many, what was left out, their hash; of ``task`` and, if used, ``replay``.
        base: fingerprint of the model that the run began with.
        machine: device, dtype of the weights, attention and threads, on which the last bits depend.
        seconds: of the training steps, and with the preparation.
        memory: bytes, the most that tensors took on a GPU, or that the process took since it began.
        prefix_cache: what ``PrefixCache.stats`` says, or None.
        delta: folder of the trained slices, where they were saved.
    """

    heads: tuple[Head, ...]
    mlps: tuple[int, ...]
    shared_heads: tuple[Head, ...]
    n_parameters: int
    state_bytes: dict[str, int]
    history: dict[str, np.ndarray]
    steps_per_epoch: int
    resumed_at: int | None
    settings: dict[str, Any]
    data: dict[str, dict[str, Any]]
    base: str
    machine: dict[str, Any]
    seconds: dict[str, float]
    memory: int
    prefix_cache: dict[str, Any] | None = None
    delta: Path | None = None

    @property
    def losses(self) -> np.ndarray:
        """fp64 [step], the weighted loss of each step before its update."""
        return self.history["loss"]

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)

    @property
    def n_tokens(self) -> int:
        """Tokens that went through the model for training, without padding."""
        return int(self.history["tokens"].sum())

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a step, counted from 1; None where a number is not there."""
        return [{"step": i + 1, **{name: self._cell(name, i) for name in COLUMNS}} for i in range(self.n_steps)]

    def _cell(self, name: str, step: int) -> Any:
        value = float(self.history[name][step])
        return None if math.isnan(value) else int(value) if name in _WHOLE else value

    def record(self) -> dict[str, Any]:
        """Everything but the steps, as JSON holds it."""
        return {
            "heads": [str(head) for head in self.heads],
            "mlps": list(self.mlps),
            "shared_heads": [str(head) for head in self.shared_heads],
            "parameters": self.n_parameters,
            "state_bytes": self.state_bytes,
            "steps": self.n_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "resumed_at": self.resumed_at,
            "tokens": self.n_tokens,
            "completion_tokens": int(self.history["completion_tokens"].sum()),
            "loss": {"first": float(self.losses[0]), "last": float(self.losses[-1])},
            "settings": self.settings,
            "data": self.data,
            "base": self.base,
            "machine": self.machine,
            "seconds": self.seconds,
            "memory": self.memory,
            "prefix_cache": self.prefix_cache,
            "delta": None if self.delta is None else str(self.delta),
        }

    def made_by(self) -> dict[str, Any]:
        """What a delta says of its making."""
        return {"settings": self.settings, "data": self.data, "steps": self.n_steps, "base": self.base}

    def losses_csv(self) -> str:
        """The steps as CSV; floats as short as they can be read back exactly."""
        file = io.StringIO()
        writer = csv.DictWriter(file, ["step", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return file.getvalue()

    def save(self, directory: str | Path) -> None:
        """Write ``tune.json`` and ``losses.csv``; each file is whole, or the one before.

        Raises:
            StorageError: a file could not be written.
        """
        from pyarith import __version__

        versions = {"pyarith": __version__, **{name: metadata.version(name) for name in _PACKAGES}}
        text = json.dumps({"tool": "pyarith", "format": 1, "versions": versions, **self.record()}, indent=1) + "\n"
        directory = Path(directory)
        write_whole(directory / LOSSES, lambda at: at.write_text(self.losses_csv(), encoding="utf-8"))
        write_whole(directory / RECORD, lambda at: at.write_text(text, encoding="utf-8"))

    def __repr__(self) -> str:
        window = max(1, self.n_steps // 10)
        first, last = self.losses[:window].mean(), self.losses[-window:].mean()
        speed, peak = self.n_tokens / self.seconds["training"], self.memory / 2**20
        kept = "" if self.delta is None else f"; delta in {self.delta}"
        return (
            f"TuneResult: {len(self.heads)} heads, {len(self.mlps)} MLPs, {self.n_parameters:,} parameters; "
            f"{self.n_steps} steps on {self.data['task']['examples']} examples\n"
            f"  loss {first:.4f} -> {last:.4f} (first and last {window} steps), {self.seconds['training']:.1f} s, "
            f"{speed:,.0f} tokens/s, peak memory {peak:,.0f} MiB{kept}"
        )
