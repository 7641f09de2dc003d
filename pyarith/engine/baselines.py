"""What takes the place of a head's z or an MLP's write when it is ablated: zero, a mean, or another prompt's.

Positions are always counted from a prompt's first real token, so that padding on either side changes nothing.
Means are per layer and head, of z (the *input* of the attention output projection), over real tokens only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyarith.engine.batch import name_prompts
from pyarith.engine.references import aligned_batches, derangement, draw, fingerprint, one_batch, run_aligned
from pyarith.errors import InputError, NonFiniteError, check
from pyarith.models.sites import ModelSites, resolve

OVER = ("batch_pos", "batch")
_FORMAT = 1
_RECORD, _TENSORS = "baseline.json", "baseline.safetensors"
_BATCH_SIZE = 32

AnyBaseline = TypeVar("AnyBaseline", bound="Baseline")


@dataclass(frozen=True, eq=False)
class Baseline:
    """Base of all baselines; a subclass says what an ablated component writes.

    ``head_values`` and ``mlp_values`` are in the model's dtype and on its device and broadcast against
    [batch, pos, head, d_head] and [batch, pos, d_model], with ``pos`` counted from a prompt's first real token
    (``values_at`` picks the positions of given tokens). None stands for zero.
    """

    @property
    def name(self) -> str:
        """For records and messages."""
        return type(self).__name__

    @property
    def lengths(self) -> Tensor | None:
        """int64 [batch] or [1]: the positions that there are values for; None: any position of any prompt."""
        return None

    def head_values(self, sites: ModelSites, layer: int) -> Tensor | None:
        """[batch or 1, pos or 1, head, d_head], or None for zero."""
        return None

    def mlp_values(self, sites: ModelSites, layer: int) -> Tensor | None:
        """[batch or 1, pos or 1, d_model], or None for zero."""
        return None

    def check(self, sites: ModelSites, batch: int | None = None, length: int | Tensor | None = None) -> None:
        """Check that this baseline fits a model, and prompts where they are known.

        Args:
            batch: number of prompts.
            length: tokens of the longest prompt, or int64 [batch] tokens of each prompt.

        Raises:
            InputError: made with another model, for another number of prompts, or for shorter prompts.
        """
        self._check_model(sites)
        lengths = self.lengths
        if lengths is None:
            return
        if batch is not None and len(lengths) > 1:
            check(
                batch == len(lengths),
                f"baseline: {self.name} holds values for {len(lengths)} prompts, one row each; got a batch of {batch}",
            )
        if length is not None:
            long = torch.as_tensor(length).cpu().reshape(-1) > lengths
            check(
                not bool(long.any()),
                f"baseline: {self.name} has values for positions 0 to {int(lengths.max()) - 1} of its reference; "
                f"prompts {name_prompts(long)} are longer ({int(torch.as_tensor(length).max())} tokens)",
            )

    def _check_model(self, sites: ModelSites) -> None:
        """Raise InputError unless the baseline was made with this model."""

    def identity(self) -> dict[str, Any]:
        """What tells this baseline from others, for ``store.digest``: its kind and all of its values."""
        return {"kind": f"{type(self).__module__}.{type(self).__qualname__}", "values": vars(self)}

    def save(self, directory: str | Path) -> None:
        """Write ``baseline.safetensors`` and ``baseline.json``."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value.contiguous().cpu() for name, value in values.items() if isinstance(value, Tensor)}
        record = {"format": _FORMAT, "kind": type(self).__name__}
        record |= {name: value for name, value in values.items() if name not in tensors}
        save_file(tensors, directory / _TENSORS)
        (directory / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[AnyBaseline], directory: str | Path) -> AnyBaseline:
        """Read what ``save`` wrote; the tensors are put on the CPU.

        Raises:
            InputError: the directory holds no baseline, or one of another kind or format.
        """
        from safetensors.torch import load_file

        directory = Path(directory)
        for name in (_RECORD, _TENSORS):
            check((directory / name).is_file(), f"directory: expected a saved baseline with {name}, got {directory}")
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        found, kind = record.pop("format", None), record.pop("kind", None)
        check(found == _FORMAT, f"directory: expected format {_FORMAT}, got {found} in {directory / _RECORD}")
        kinds: dict[str, Any] = {
            k.__name__: k for k in (ZeroAblation, MeanAblation, ResampleAblation) if issubclass(k, cls)
        }
        check(kind in kinds, f"directory: expected a baseline of kind {sorted(kinds)}, got {kind!r} in {directory}")
        return kinds[kind](**load_file(directory / _TENSORS), **record)


@dataclass(frozen=True, eq=False)
class ZeroAblation(Baseline):
    """z := 0, MLP write := 0. Fits every model and prompt."""

    @property
    def name(self) -> str:
        return "zero"


@dataclass(frozen=True, eq=False)
class _Measured(Baseline):
    """Values measured with one model.

    Attributes:
        heads: z [layer, batch or pos ..., head, d_head].
        mlps: MLP writes [layer, batch or pos ..., d_model].
        model: ``fingerprint`` of the model.
    """

    heads: Tensor
    mlps: Tensor
    model: str

    def _check_model(self, sites: ModelSites) -> None:
        found = (self.heads.shape[0], *self.heads.shape[-2:], self.mlps.shape[-1])
        expected = (sites.n_layers, sites.n_heads, sites.d_head, sites.d_model)
        check(
            found == expected,
            f"baseline: {self.name} was made with another model: n_layers, n_heads, d_head, d_model are {found}, "
            f"this model has {expected}",
        )
        check(
            self.model == fingerprint(sites),
            f"baseline: {self.name} was made with another model of the same sizes (or the weights, their dtype or the "
            "config have changed since); make it anew with from_inputs",
        )


@dataclass(frozen=True, eq=False)
class MeanAblation(_Measured):
    """z := mean of z over a reference set, per layer and head; MLP writes likewise.

    over="batch_pos": heads[l, 0, h] = mean over all real tokens of all prompts of z[l, h]
    over="batch":     heads[l, p, h] = mean over prompts of z[l, h] at position p

    Attributes:
        heads: fp64 [layer, pos or 1, head, d_head].
        mlps: fp64 [layer, pos or 1, d_model].
        over: "batch_pos" or "batch".
        n_prompts, n_tokens: what the mean was taken over.

    References: Wang et al. 2022, arXiv:2211.00593, sec. 2.
    """

    over: str
    n_prompts: int
    n_tokens: int

    @property
    def name(self) -> str:
        return f"mean(over={self.over!r})"

    @property
    def lengths(self) -> Tensor | None:
        return torch.tensor([self.heads.shape[1]]) if self.over == "batch" else None

    def head_values(self, sites: ModelSites, layer: int) -> Tensor:
        return self.heads[layer][None].to(sites.device, sites.dtype)

    def mlp_values(self, sites: ModelSites, layer: int) -> Tensor:
        return self.mlps[layer][None].to(sites.device, sites.dtype)

    @classmethod
    def from_inputs(
        cls,
        model: Any,
        input_ids: Any,
        attention_mask: Any = None,
        over: str = "batch_pos",
        batch_size: int = _BATCH_SIZE,
    ) -> MeanAblation:
        """Measure the means on a reference set; nothing but running sums (fp64) is kept.

        Args:
            input_ids: int64 [batch, pos], or an iterable of batches: tensors or pairs (input_ids, attention_mask).
            attention_mask: [batch, pos], 0 on padding at either side; only with one batch.
            over: "batch_pos", or "batch" for one mean per position (prompts of equal length).
            batch_size: prompts that go through the model at once.

        Raises:
            InputError: no real token, ids outside the vocabulary, or unequal lengths with over="batch".
        """
        check(over in OVER, f"over: expected one of {OVER}, got {over!r}")
        sites = resolve(model)
        sums: _Sums | None = None
        n_prompts = 0
        for ids, lengths in aligned_batches(sites, input_ids, attention_mask):
            n_prompts += len(lengths)
            positions = int(lengths.max()) if over == "batch" else 1
            if over == "batch":
                expected = positions if sums is None else sums.heads.shape[1]
                check(
                    bool((lengths == expected).all()),
                    "input_ids: over='batch' takes one mean per position and needs prompts of equal length (aligned "
                    f"templates); expected {expected} tokens each, got {sorted(set(lengths.tolist()))}; use "
                    "over='batch_pos' or group by length",
                )
            sums = sums or _Sums.zeros(sites, positions)
            for at in range(0, len(ids), batch_size):
                sums.add(sites, ids[at : at + batch_size], lengths[at : at + batch_size])
        if sums is None:
            raise InputError("input_ids: expected at least one batch of prompts, got none")
        heads, mlps = (total.cpu() / sums.n_tokens[:, None] for total in (sums.heads, sums.mlps))
        for layer in range(sites.n_layers):
            for what, mean in (("z", heads), ("MLP write", mlps)):
                finite = bool(mean[layer].isfinite().all())
                check(finite, f"layer {layer}: the mean of the {what} is not finite", NonFiniteError)
        heads = heads.unflatten(-1, (sites.n_heads, sites.d_head))
        return cls(heads, mlps, fingerprint(sites), over, n_prompts, int(sums.n_tokens.sum()))


@dataclass(frozen=True, eq=False)
class ResampleAblation(_Measured):
    """z of prompt b := z of another prompt ``sources[b]`` of the same length, position by position.

    Attributes:
        heads: [layer, batch, pos, head, d_head] in the model's dtype.
        mlps: [layer, batch, pos, d_model].
        sources: int64 [batch], the reference prompt whose values each prompt gets.
        tokens: int64 [batch], tokens of each prompt.
    """

    sources: Tensor
    tokens: Tensor
    seed: int

    @property
    def name(self) -> str:
        return f"resample(seed={self.seed})"

    @property
    def lengths(self) -> Tensor:
        return self.tokens.cpu()

    def head_values(self, sites: ModelSites, layer: int) -> Tensor:
        return self.heads[layer].to(sites.device, sites.dtype)

    def mlp_values(self, sites: ModelSites, layer: int) -> Tensor:
        return self.mlps[layer].to(sites.device, sites.dtype)

    @classmethod
    def from_inputs(
        cls,
        model: Any,
        input_ids: Any,
        attention_mask: Any = None,
        seed: int = 0,
        *,
        reference: Any = None,
        reference_attention_mask: Any = None,
        batch_size: int = _BATCH_SIZE,
    ) -> ResampleAblation:
        """Draw another prompt for each prompt and store its values; the same batch must be run later.

        Without ``reference`` the prompts are permuted among those of equal length, none onto itself or onto a prompt
        with the same tokens (a random order and a random cyclic shift). With it, each prompt draws one of the
        reference prompts that have its length and other tokens.

        Args:
            input_ids: int64 [batch, pos].
            attention_mask: [batch, pos], 0 on padding at either side.
            reference, reference_attention_mask: the same for a reference set of its own.

        Raises:
            InputError: prompts for which there is no other prompt of the same length; they are named.
        """
        sites = resolve(model)
        ids, lengths = one_batch(sites, input_ids, attention_mask, "input_ids", "attention_mask")
        generator = torch.Generator().manual_seed(seed)
        if reference is None:
            pool, pool_lengths = ids, lengths
            sources = derangement(ids, lengths, generator)
        else:
            names = ("reference", "reference_attention_mask")
            pool, pool_lengths = one_batch(sites, reference, reference_attention_mask, *names)
            sources = draw(ids, lengths, pool, pool_lengths, generator)
        width = int(lengths.max())
        heads, mlps = (
            torch.zeros(sites.n_layers, len(ids), width, size, dtype=sites.dtype, device=sites.device)
            for size in (sites.n_heads * sites.d_head, sites.d_model)
        )
        for at in range(0, len(ids), batch_size):
            rows = slice(at, min(at + batch_size, len(ids)))

            def store(into: Tensor, layer: int, x: Tensor, rows: slice = rows) -> None:
                into[layer, rows, : x.shape[1]] = x

            longest = int(pool_lengths[sources[rows]].max())
            run_aligned(sites, pool[sources[rows], :longest], heads, mlps, store)
        heads = heads.unflatten(-1, (sites.n_heads, sites.d_head))
        return cls(heads, mlps, fingerprint(sites), sources, lengths, seed)


def values_at(values: Tensor, positions: Tensor) -> Tensor:
    """Values of given tokens.

    Args:
        values: [batch or 1, pos, ...] as a baseline gives them where ``Baseline.lengths`` is not None.
        positions: int64 [batch, n], counted from each prompt's first real token.

    Returns:
        [batch, n, ...].
    """
    rows = torch.arange(len(positions), device=values.device)[:, None] if len(values) > 1 else 0
    return values[rows, positions.to(values.device)]


@dataclass
class _Sums:
    """Running fp64 sums: z [layer, pos or 1, n_heads * d_head], MLP writes [layer, pos or 1, d_model], tokens."""

    heads: Tensor
    mlps: Tensor
    n_tokens: Tensor  # [pos or 1]

    @classmethod
    def zeros(cls, sites: ModelSites, positions: int) -> _Sums:
        def empty(width: int) -> Tensor:
            return torch.zeros(sites.n_layers, positions, width, dtype=torch.float64, device=sites.device)

        n_tokens = torch.zeros(positions, dtype=torch.float64)
        return cls(empty(sites.n_heads * sites.d_head), empty(sites.d_model), n_tokens)

    def add(self, sites: ModelSites, ids: Tensor, lengths: Tensor) -> None:
        """Run a batch of left-aligned prompts [batch, pos] and add its real tokens."""
        width = int(lengths.max())
        real = torch.arange(width) < lengths[:, None]
        per_position = self.heads.shape[1] > 1
        on_device = real.to(sites.device)[..., None]

        def add(into: Tensor, layer: int, x: Tensor) -> None:
            # where, not a product: what padding gives need not be finite
            into[layer] += torch.where(on_device, x.double(), 0.0).sum(0 if per_position else (0, 1))

        run_aligned(sites, ids[:, :width], self.heads, self.mlps, add)
        self.n_tokens += real.double().sum(0) if per_position else real.sum()
