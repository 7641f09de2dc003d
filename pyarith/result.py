"""The result of a patching run: arrays on the host with named axes, and the settings that made them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyarith.errors import InputError, NotAvailableError, check
from pyarith.types import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyarith.stats import Confidence

Array = NDArray[Any]

_TENSORS = "tensors.safetensors"
_RECORD = "result.json"
_FORMAT = 1


def _mean(values: Array) -> Array:
    """Mean over the last axis in fp64. An adaptive run has NaN where a head was not run: those prompts are left out."""
    known = ~np.isnan(values)
    if known.all():
        return np.asarray(values.mean(-1, dtype=np.float64))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(-1, dtype=np.float64) / known.sum(-1))


class RankedHead(NamedTuple):
    """One line of a ranking: relative effect (mean of ratios) and mean change of the answer's logit."""

    head: Head
    effect: float
    logit_change: float


@dataclass(frozen=True, repr=False)
class PatchResult:
    """Path patching of all heads and MLPs to the answer's logit.

    effect of a prompt = patched logit - the same layer's identity row; relative effect = effect / clean logit;
    of a head = mean over the prompts whose clean logit is > 0 (SEMANTICS, "path patching head -> logits";
    Zhang et al. 2024, arXiv:2409.01659, sec. 3).

    Logits are fp32, fp64 for fp64 models. A field of a sender or metric that was not asked for is None.

    Attributes:
        head_logits: [n_layers, n_heads, batch] logit of the answer with that head patched.
        mlp_logits: [n_layers, batch] the same for MLPs.
        identity_logits, mlp_identity_logits: [n_layers, batch] rows patched with their own clean value, from where
            the heads (the MLP) of that layer start.
        clean_logits, corrupted_logits: [batch] the model's own.
        clean_log_probs, corrupted_log_probs: [batch] log-probability of the answer.
        *_log_probs, *_foil_logits: as the logits, with the axis foil last for foils.
        noise_floor: [n_layers] max over prompts of |identity row - the model's own clean logit|.
        verification_error: max |literal re-run - replay| in logits over the verified senders, or None.
        semantics: which quantity this is, and the peer function that it equals.
        settings: everything that made the run: model, senders, blocks, backends, timings, versions.

    In an adaptive run (``discover`` with ``top_k``) heads are NaN on the prompts that they were not run on, and so are
    identity rows of layers without a head; effects are means over the other prompts.
    """

    clean_logits: Array
    corrupted_logits: Array
    clean_log_probs: Array
    corrupted_log_probs: Array
    noise_floor: Array
    head_logits: Array | None = None  # [layer, head, batch]
    mlp_logits: Array | None = None  # [layer, batch]
    identity_logits: Array | None = None  # [layer, batch]
    mlp_identity_logits: Array | None = None  # [layer, batch]
    head_log_probs: Array | None = None  # [layer, head, batch]
    mlp_log_probs: Array | None = None  # [layer, batch]
    identity_log_probs: Array | None = None  # [layer, batch]
    mlp_identity_log_probs: Array | None = None  # [layer, batch]
    head_foil_logits: Array | None = None  # [layer, head, batch, foil]
    mlp_foil_logits: Array | None = None  # [layer, batch, foil]
    identity_foil_logits: Array | None = None  # [layer, batch, foil]
    mlp_identity_foil_logits: Array | None = None  # [layer, batch, foil]
    clean_foil_logits: Array | None = None  # [batch, foil]
    corrupted_foil_logits: Array | None = None  # [batch, foil]
    verification_error: float | None = None
    semantics: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    # effects

    def _change(self, patched: Array | None, identity: Array | None) -> Array | None:
        if patched is None or identity is None:
            return None
        return patched - (identity[:, None] if patched.ndim == identity.ndim + 1 else identity)

    @property
    def head_changes(self) -> Array | None:
        """[n_layers, n_heads, batch] patched logit minus the layer's identity row."""
        return self._change(self.head_logits, self.identity_logits)

    @property
    def mlp_changes(self) -> Array | None:
        """[n_layers, batch] patched logit minus the identity row where the MLP's rows start."""
        return self._change(self.mlp_logits, self.mlp_identity_logits)

    @property
    def n_ratio_excluded(self) -> int:
        """Prompts left out of relative effects because their clean logit is <= 0."""
        return int((self.clean_logits <= 0).sum())

    @property
    def n_rerouted(self) -> int:
        """Identity rows that met other experts than the clean run, in all layers (``settings["rerouted"]`` by layer).

        Where a mixture of experts scores two experts nearly equal, rounding decides; the noise floor shows the effect.
        """
        return sum(self.settings.get("rerouted", ()))

    def _relative(self, changes: Array | None) -> Array | None:
        if changes is None:
            return None
        usable = self.clean_logits > 0
        if not usable.any():
            warnings.warn(
                "every clean answer logit is <= 0: relative effects are meaningless and given as NaN; use head_changes",
                RuntimeWarning,
                stacklevel=3,
            )
            return np.full(changes.shape[:-1], np.nan, changes.dtype)
        return _mean(changes[..., usable] / self.clean_logits[usable])

    @property
    def head_effects(self) -> Array | None:
        """[n_layers, n_heads] mean relative effect (-0.05 = the patched logit is 5 % lower)."""
        return self._relative(self.head_changes)

    @property
    def mlp_effects(self) -> Array | None:
        """[n_layers] mean relative effect of the MLPs."""
        return self._relative(self.mlp_changes)

    @property
    def corruption_strength(self) -> Array:
        """[batch] P_clean(answer) - P_corrupted(answer): how much of the behaviour the corruption removes."""
        return np.exp(self.clean_log_probs) - np.exp(self.corrupted_log_probs)

    def top(self, k: int = 10) -> list[RankedHead]:
        """The ``k`` heads whose patching lowers the answer's logit most, by relative effect.

        Raises:
            InputError: heads were not among the senders.
        """
        effects, changes = self.head_effects, self.head_changes
        if effects is None or changes is None:
            raise InputError("top: heads were not among the senders; call fast_patch with senders=('heads',)")
        order = np.argsort(effects, axis=None, kind="stable")[:k]
        mean = _mean(changes)
        heads = [Head(*map(int, np.unravel_index(i, effects.shape))) for i in order]
        return [RankedHead(head, float(effects[head]), float(mean[head])) for head in heads]

    def key_heads(self, threshold: float = -0.05) -> list[Head]:
        """Heads with relative effect below ``threshold``, strongest first (the paper's -5 %, sec. 3)."""
        size = self.head_effects.size if self.head_effects is not None else 0
        return [row.head for row in self.top(size) if row.effect < threshold]

    def confidence(
        self,
        pairs: Any,
        *,
        level: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
        metric: str = "relative",
    ) -> Confidence:
        """Intervals, standard errors and corrected p-values of all heads and MLPs.

        Intervals come from a two-way bootstrap over operand pairs and templates (one-way over items), p-values from
        sign flips per operand pair, corrected over all senders together (``pyarith.stats.confidence``).

        Args:
            pairs: the ``PromptPairs`` of this result with the strata pair and template, or item; for a result of
                several batches the list of theirs, in the same order; or the factors themselves, one value a prompt:
                ``{"pair": [...], "template": [...]}`` or ``{"item": [...]}``.
            level: nominal coverage of the intervals.
            resamples, seed: of the bootstrap and the flips.
            metric: "relative" (prompts with clean logit <= 0 left out, as in ``head_effects``) or "logit" (change of
                the answer's logit, all prompts).
        Returns:
            A ``Confidence``; ``.key_heads(threshold)`` takes the heads whose interval lies below the threshold.
        Raises:
            InputError: the factors are missing, of another length or order, or have fewer than 5 values; unknown
                metric; no prompt with clean logit > 0; heads of an adaptive run.
        """
        from pyarith import stats

        check(metric in ("relative", "logit"), f"metric: expected 'relative' or 'logit', got {metric!r}")
        check(
            "rounds" not in self.settings,
            "confidence: expected every head on every prompt, got a race that stopped heads by what it saw, which no "
            "interval of a fixed sample allows for; use the intervals of Discovery.top, or run without top_k",
        )
        batches = len(self.settings.get("parts", ()))
        check(
            batches < 2 or not hasattr(pairs, "strata"),
            f"pairs: expected a list of {batches} PromptPairs, one a batch of this result, got one whose "
            "order may differ; pass the batches that fast_patch was given",
        )
        clean = self.clean_logits.astype(np.float64)
        divisor = np.where(clean > 0, clean, np.nan) if metric == "relative" else np.ones_like(clean)
        heads, mlps = (None if one is None else one / divisor for one in (self.head_changes, self.mlp_changes))
        return stats.confidence(heads, mlps, pairs, metric=metric, level=level, resamples=resamples, seed=seed)

    # output

    def to_dataframe(self) -> Any:
        """One row per sender: kind, layer, head (-1 for an MLP), effect, logit_change, noise_floor.

        Raises:
            NotAvailableError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise NotAvailableError("to_dataframe: needs pandas; pip install pandas") from error
        return pandas.DataFrame(list(self.rows()))

    def rows(self) -> Iterable[dict[str, Any]]:
        """The table of ``to_dataframe`` as dictionaries."""
        for kind, effects, changes in (
            ("head", self.head_effects, self.head_changes),
            ("mlp", self.mlp_effects, self.mlp_changes),
        ):
            if effects is None or changes is None:
                continue
            mean = _mean(changes)
            for index in np.ndindex(effects.shape):
                yield {
                    "kind": kind,
                    "layer": index[0],
                    "head": index[1] if kind == "head" else -1,
                    "effect": float(effects[index]),
                    "logit_change": float(mean[index]),
                    "noise_floor": float(self.noise_floor[index[0]]),
                }

    def plot(self, path: str | Path | None = None) -> Figure:
        """Heat map of head effects with the MLPs beside it; saved as PNG where ``path`` is given."""
        from pyarith.plots import effects_figure

        figure = effects_figure(self.head_effects, self.mlp_effects, title=str(self.settings.get("title", "")))
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def save(self, directory: str | Path) -> None:
        """Write ``tensors.safetensors`` and ``result.json`` (never pickle)."""
        from safetensors.numpy import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v) for k, v in self._arrays().items()}, directory / _TENSORS)
        record = {
            "format": _FORMAT,
            "verification_error": self.verification_error,
            "semantics": self.semantics,
            "settings": self.settings,
        }
        (directory / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> PatchResult:
        """Read what ``save`` wrote.

        Raises:
            InputError: the directory holds no result, or one of another format.
        """
        from safetensors.numpy import load_file

        directory = Path(directory)
        for name in (_RECORD, _TENSORS):
            check((directory / name).is_file(), f"directory: expected a saved PatchResult with {name}, got {directory}")
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        found = record.pop("format", None)
        check(found == _FORMAT, f"directory: expected format {_FORMAT}, got {found} in {directory / _RECORD}")
        arrays: dict[str, Any] = load_file(directory / _TENSORS)
        return cls(**arrays, **record)

    def _arrays(self) -> dict[str, Array]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    @classmethod
    def merge(cls, parts: Sequence[PatchResult]) -> PatchResult:
        """One result over the prompts of several; noise floor and verification error are the largest."""
        check(len(parts) > 0, "parts: expected at least one result, got none")
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        changed: dict[str, Any] = {"noise_floor": np.max([p.noise_floor for p in parts], axis=0)}
        for name, value in first._arrays().items():
            if name != "noise_floor":
                axis = value.ndim - 2 if name.endswith("foil_logits") else value.ndim - 1
                changed[name] = np.concatenate([getattr(p, name) for p in parts], axis)
        errors = [p.verification_error for p in parts if p.verification_error is not None]
        changed["verification_error"] = max(errors, default=None)
        changed["settings"] = {**first.settings, "parts": [p.settings for p in parts]}
        if "rerouted" in first.settings:
            changed["settings"]["rerouted"] = np.sum([p.settings["rerouted"] for p in parts], axis=0).tolist()
        return replace(first, **changed)

    def _summary(self) -> list[str]:
        n = len(self.clean_logits)
        lines = [
            f"PatchResult: {n} prompts, {self.settings.get('model', 'model')}",
            f"  {self.semantics}",
            f"  clean logit {self.clean_logits.mean():.3f}, corrupted {self.corrupted_logits.mean():.3f}; "
            f"P(answer) {np.exp(self.clean_log_probs).mean():.3f} -> {np.exp(self.corrupted_log_probs).mean():.3f}",
            f"  noise floor {self.noise_floor.max():.2e} logits"
            + ("" if self.verification_error is None else f", literal re-runs agree to {self.verification_error:.2e}"),
        ]
        if "quantised" in self.settings:
            lines.append(f"  quantised weights: {self.settings['quantised']}")
        if self.n_rerouted:
            lines.append(f"  {self.n_rerouted} identity rows went to other experts than the clean run (rounding)")
        if self.n_ratio_excluded:
            lines.append(f"  {self.n_ratio_excluded} prompts with clean logit <= 0 left out of relative effects")
        if self.head_logits is not None:
            for row in self.top(5):
                lines.append(f"  {row.head!s:>7}  {row.effect:+8.2%}  {row.logit_change:+.4f} logits")
        return lines

    def __repr__(self) -> str:
        return "\n".join(self._summary())

    def _repr_html_(self) -> str:
        from html import escape

        return "<pre>" + escape("\n".join(self._summary())) + "</pre>"
