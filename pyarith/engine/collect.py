"""Rows of blocks become logits and log-probabilities on the host, in the order of the prompts; each is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyarith.engine import oracle
from pyarith.engine.batch import Batch, name_prompts
from pyarith.engine.capture import Captured
from pyarith.engine.phases import phase
from pyarith.engine.ranks import Team
from pyarith.engine.readout import Readout, RowLogits
from pyarith.engine.replay import Heads, Replay
from pyarith.engine.routing import tolerated
from pyarith.engine.store import Store
from pyarith.errors import NonFiniteError, SelfCheckError
from pyarith.models.quantised import plain_tensors
from pyarith.models.sites import ModelSites

Array = NDArray[Any]

_METRICS = ("logits", "foil_logits", "log_probs")


@dataclass(frozen=True)
class Options:
    """What a run computes; see ``fast_patch``."""

    heads: Heads = True
    mlps: bool = True
    frozen: bool = False
    log_probs: bool = False
    memory_budget: int | None = None
    backend: str = "auto"
    verify: int = 2
    progress: Callable[[int], None] = lambda done: None
    parts: Store = field(default_factory=lambda: Store(None))
    team: Team = field(default_factory=Team)


class Collector:
    """Scatters the rows of blocks into arrays in the order of the prompts."""

    def __init__(self, sites: ModelSites, replay: Replay, batch: Batch, options: Options) -> None:
        self.sites, self.replay, self.batch, self.options = sites, replay, batch, options
        n, layers, foils = len(batch), sites.n_layers, batch.targets.shape[1] - 1
        kind = np.float64 if sites.row_dtype == torch.float64 else np.float32
        senders = {"head": (layers, sites.n_heads), "identity": (layers,), "mlp": (layers,), "mlp_identity": (layers,)}
        if not options.heads:
            del senders["head"], senders["identity"]
        if not options.mlps:
            del senders["mlp"], senders["mlp_identity"]
        both = {"clean": (), "corrupted": ()}
        self.arrays: dict[str, Array] = {}
        for metric in _METRICS:
            wanted = {"logits": True, "foil_logits": foils > 0, "log_probs": options.log_probs}[metric]
            names = {**senders, **both} if wanted else both if metric == "log_probs" else {}
            for name, axes in names.items():
                shape = (*axes, n, foils) if metric == "foil_logits" else (*axes, n)
                self.arrays[f"{name}_{metric}"] = np.full(shape, np.nan, kind)  # heads that are not run stay NaN
        self.arrays["noise_floor"] = np.zeros(layers, kind)
        self.rerouted = [0] * layers  # identity rows of each layer that met other experts than the clean run

    @phase("readout")
    def read(self, block: Tensor, captured: Captured, rows: RowLogits, readout: Readout) -> dict[str, Array]:
        """What a block gives, on the host: ``logits [row, batch, target]`` and the model's own, clean and corrupted,
        ``own [2, batch, target]`` and ``own_lse [2, batch]``; with log-probabilities ``lse [row, batch]``; for mixtures
        of experts ``rerouted [entry, batch]``.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        hidden = torch.stack([captured.clean_hidden, captured.corrupted_hidden])
        wanted = {"logits": rows.logits, "own": readout.of_hidden(hidden), "own_lse": readout.log_sum_exp(hidden)}
        if rows.lse is not None:
            wanted["lse"] = rows.lse
        found = dict(zip(wanted, _to_host(*wanted.values()), strict=True))
        if not (bool(torch.isfinite(found["logits"]).all()) and bool(torch.isfinite(found["own"]).all())):
            raise NonFiniteError(_first_non_finite(self.sites, captured, block))
        if self.replay.rerouted.found is not None:
            found["rerouted"] = self.replay.rerouted.found.cpu()
        return {name: tensor.numpy() for name, tensor in found.items()}

    def put(self, block: Tensor, found: dict[str, Array]) -> None:
        """Store what ``read`` gave for a block of prompts.

        Raises:
            SelfCheckError: an identity row went to other experts, which rounding in 32 or 64 bits does not explain.
        """
        logits, own, own_lse = (torch.from_numpy(found[name]) for name in ("logits", "own", "own_lse"))
        lse = torch.from_numpy(found["lse"]) if "lse" in found else None
        index = block.numpy()
        for i, name in enumerate(("clean", "corrupted")):
            self._put(name, index, own[i], own_lse[i])
        identity = self._put_senders(index, logits, lse, own[0, :, 0])
        drift = (identity - own[0, :, 0]).abs().amax(1).numpy()
        np.maximum(self.arrays["noise_floor"], drift, out=self.arrays["noise_floor"])
        if "rerouted" in found:
            self._count_rerouted(found["rerouted"].sum(1).tolist(), drift, float(own[0, :, 0].abs().max()))

    def _count_rerouted(self, numbers: list[int], drift: Array, scale: float) -> None:
        """numbers [entry] of prompts, drift [n_layers] of identity logits as large as ``scale``."""
        replay, sites = self.replay, self.sites
        allowed = oracle.tolerance(sites, max(scale, 1.0))
        for entry, number in zip(replay.entries, numbers, strict=True):
            layer = None if entry is None else replay.identity_layer(entry)
            if layer is None or not number:
                continue
            self.rerouted[layer] += number
            if not tolerated(sites) and drift[layer] > allowed:
                raise SelfCheckError(
                    f"self-check: family {sites.spec.name!r}, layer {layer}: identity rows of {number} prompts went to "
                    f"other experts than the clean run, and a logit moved by {drift[layer]:.2g} (tolerance "
                    f"{allowed:.2g}); rounding to {sites.dtype} does not explain that, so no result is given"
                )

    def _put_senders(self, index: Any, logits: Tensor, lse: Tensor | None, own: Tensor) -> Tensor:
        """Store all senders; returns the identity logits [n_layers, batch]."""
        identity = own[None].repeat(self.sites.n_layers, 1)  # a layer without rows has no noise of its own
        replay = self.replay
        start = 0
        for entry in replay.frozen_entries if replay.frozen else replay.entries:
            if entry is None:
                continue
            part = logits[start : start + entry.stop - entry.start]
            part_lse = None if lse is None else lse[start : start + entry.stop - entry.start]
            start += entry.stop - entry.start
            last = part_lse[-1] if part_lse is not None else None
            if entry.mlp_layer is not None:
                row = entry.mlp_row - entry.start
                self._put("mlp", index, part[row], None if part_lse is None else part_lse[row], entry.mlp_layer)
                self._put("mlp_identity", index, part[-1], last, entry.mlp_layer)
                if not replay.heads[entry.mlp_layer]:
                    identity[entry.mlp_layer] = part[-1, :, 0]
            if entry.head_layer is not None:
                rows = slice(0, len(entry.heads))
                values = part[rows], None if part_lse is None else part_lse[rows]
                self._put("head", index, *values, entry.head_layer, entry.heads)
                self._put("identity", index, part[-1], last, entry.head_layer)
                identity[entry.head_layer] = part[-1, :, 0]
        return identity

    def _put(
        self,
        name: str,
        index: Any,
        logits: Tensor,
        lse: Tensor | None,
        layer: int | None = None,
        heads: tuple[int, ...] = (),
    ) -> None:
        """logits [..., batch, target], lse [..., batch]; with ``heads`` the first axis is of these heads."""
        at = () if layer is None else (layer,)
        places: Any = (np.array(heads)[:, None], index) if heads else (..., index)
        values = {"logits": logits[..., 0], "foil_logits": logits[..., 1:]}
        if lse is not None:
            values["log_probs"] = logits[..., 0] - lse
        for metric, value in values.items():
            target = self.arrays.get(f"{name}_{metric}")
            if target is None:
                continue
            place = (*places, slice(None)) if metric == "foil_logits" else places
            target[at][place] = value.numpy()


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one dtype, copied to the host in one transfer."""
    flat = torch.cat([t.flatten() for t in tensors]).cpu()
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _first_non_finite(sites: ModelSites, captured: Captured, block: Tensor) -> str:
    """Where NaN or infinity came from: weights of the model first, else the first tensor of the run in layer order."""
    parameters = [part for name, whole in sites.weights() for part in plain_tensors(name, whole)]
    for name, parameter in parameters:
        if not bool(torch.isfinite(parameter).all()):
            return f"non-finite values: weight {name} of the model holds NaN or infinity; repair the checkpoint"
    for layer in range(sites.n_layers + 1):
        for name, tensor in captured.named():
            if tensor.dim() == 3 and layer < len(tensor):
                bad = ~torch.isfinite(tensor[layer]).all(-1)
                if bool(bad.any()):
                    prompts = torch.zeros(int(block.max()) + 1, dtype=torch.bool)
                    prompts[block] = bad.cpu()
                    return (
                        f"non-finite values: layer {layer}, tensor {name} (prompts {name_prompts(prompts)}); the model "
                        f"overflows {sites.dtype}: load it in fp32 or bf16"
                    )
    return f"non-finite values: only in replayed rows; patched activations overflow {sites.dtype}: load it in fp32"
