"""The model under experiment, with the prompts and discoveries that several experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyarith import stats, tasks
from pyarith.discovery.discover import Discovery, discover
from pyarith.models.sites import resolve
from pyarith.prompts import PromptPairs
from pyarith.reporting.fingerprint import model_fingerprint
from pyarith.reporting.saved import ranking_of
from pyarith.types import Head

SIGNS = ("+", "-", "*", "/")
NAMES = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}


@dataclass
class Subject:
    """A model as the experiments see it. What was drawn or patched once is kept: most experiments start alike.

    Args:
        model: a supported Hugging Face causal LM; never changed.
        tokenizer: its tokenizer.
        name: what the caller knows it by.
        folder: where an experiment may put a file beside its record.
        also: other models, for the comparison of models.
        revision: the commit of a hub model.
        origin: the command that made the model, where it is known.
    """

    model: Any
    tokenizer: Any
    name: str
    folder: Path | None = None
    also: Sequence[Subject] = ()
    revision: str | None = None
    origin: str = ""
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a record says of the model."""
        sites = resolve(self.model)
        config = self.model.config
        return {
            "name": self.name,
            "revision": self.revision,
            "origin": self.origin,
            "family": sites.spec.name,
            "layers": sites.n_layers,
            "heads": sites.n_heads,
            "kv_heads": int(getattr(config, "num_key_value_heads", None) or sites.n_heads),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": str(sites.device),
            "threads": torch.get_num_threads(),
            "fingerprint": model_fingerprint(self.model),
        }

    @property
    def n_heads(self) -> int:
        """All heads of the model."""
        return int(self.identity["layers"] * self.identity["heads"])

    def pairs(self, sign: str, n: int, seed: int, corruption: str = "operator") -> PromptPairs:
        """Prompts of an operator."""
        key = ("pairs", sign, n, seed, corruption)
        if key not in self._kept:
            self._kept[key] = tasks.arithmetic(self.tokenizer, sign, corruption, n=n, seed=seed)
        found: PromptPairs = self._kept[key]
        return found

    def discovery(self, sign: str, n: int, seed: int, corruption: str = "operator") -> Discovery:
        """Path patching of every head and MLP on these prompts."""
        key = ("discovery", sign, n, seed, corruption)
        if key not in self._kept:
            self._kept[key] = discover(self.model, self.pairs(sign, n, seed, corruption), progress=False)
        found: Discovery = self._kept[key]
        return found

    def confidence(self, sign: str, n: int, seed: int, corruption: str, resamples: int) -> stats.Confidence:
        """Intervals and p-values of that discovery."""
        key = ("confidence", sign, n, seed, corruption, resamples)
        if key not in self._kept:
            found = self.discovery(sign, n, seed, corruption)
            self._kept[key] = found.result.confidence(found.pairs, resamples=resamples, seed=seed)
        sure: stats.Confidence = self._kept[key]
        return sure

    def effects(self, sign: str, n: int, seed: int, corruption: str = "operator") -> np.ndarray:
        """[n_layers, n_heads, batch] relative effects, NaN where the clean logit is not positive."""
        return relative_effects(self.discovery(sign, n, seed, corruption))

    def ranking(self, sign: str, n: int, seed: int, corruption: str = "operator") -> tuple[Head, ...]:
        """All heads, most negative mean effect first, on the prompts that are set aside for choosing heads."""
        return ranking_of(self.chosen_effects(sign, n, seed, corruption))

    def chosen_effects(self, sign: str, n: int, seed: int, corruption: str = "operator") -> np.ndarray:
        """[n_layers, n_heads] mean relative effects on the prompts that are set aside for choosing heads."""
        reported = set(self.report(sign, n, seed).strata["pair"])
        select = np.array([pair not in reported for pair in self.pairs(sign, n, seed, corruption).strata["pair"]])
        return mean_effects(self.effects(sign, n, seed, corruption)[..., select])

    def report(self, sign: str, n: int, seed: int) -> PromptPairs:
        """The other half of the prompts, for reporting: no operand pair is in both, whatever the corruption."""
        pairs = self.pairs(sign, n, seed)
        _, report = stats.select_report(pairs, seed=seed)
        return pairs.subset(report)


def relative_effects(found: Discovery) -> np.ndarray:
    """[n_layers, n_heads, batch] change / clean logit of each prompt, NaN where that logit is not positive."""
    clean = found.result.clean_logits.astype(np.float64)
    return np.asarray(found.result.head_changes) / np.where(clean > 0, clean, np.nan)


def mean_effects(effects: np.ndarray) -> np.ndarray:
    """Mean over the last axis, NaN left out; NaN where there is nothing else."""
    known = ~np.isnan(effects)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, effects, 0.0).sum(-1) / known.sum(-1))
