"""Which experts a router chooses, and whether rows that should be the clean run meet the same.

A mixture of experts sends each token to the ``top_k`` experts with the highest scores. Where two scores are nearly
equal rounding decides, so a row that equals the clean run up to rounding may be sent to other experts. That is no
error of a 16-bit run, but it is noise in what is measured against that row, and it is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.guard import Hooks
from pyarith.models.sites import ModelSites


def has_routers(sites: ModelSites) -> bool:
    return any(block.router is not None for block in sites.blocks)


def no_routes(sites: ModelSites, n: int) -> Tensor | None:
    """Room for the experts of ``n`` prompts, int64 [n_layers, n, top_k], -1 in dense layers; None without routers."""
    if not has_routers(sites):
        return None
    shape = (sites.n_layers, n, sites.config.num_experts_per_tok)
    return torch.full(shape, -1, dtype=torch.int64, device=sites.device)


def experts_of(output: Any) -> Tensor:
    """The experts in a router's output, int64 [token, top_k], in rising order: which comes first is no choice."""
    chosen: Tensor = output[-1]
    return chosen.flatten(0, -2).sort(-1).values


def tolerated(sites: ModelSites) -> bool:
    """Whether another choice of experts is rounding: in 16 bits, of the model or of products in quantised linears, and
    with activations in int8, which are coarser still; wider runs must choose as the model does."""
    found = sites.quantised
    narrow = any(dtype.itemsize == 2 for dtype in (sites.dtype, *(found.compute if found else ())))
    return narrow or bool(found and found.activations)


def routed_width(sites: ModelSites, module: Any) -> int:
    """Columns per row that a mixture of experts holds at once; 0 for any other module.

    Each row stands top_k times: sorted by expert, through gate and up, their product, down, weighted, back in order.
    Experts with biases hold further copies, and the implementation "batched_mm" a copy of the expert for every row.
    Measured by the bytes of the tensors that live during a call.
    """
    if sites.spec.router is None or not hasattr(module, sites.spec.router):
        return 0
    stacked = [parameter for parameter in module.parameters() if parameter.dim() == 3]
    top_k, d = sites.config.num_experts_per_tok, sites.d_model
    # gate and up side by side; experts that are quantised may be stored in another shape
    wide = max((parameter.numel() // (len(parameter) * d) for parameter in stacked), default=0)
    copies = 4 if any(name.endswith("_bias") for name, _ in module.named_parameters()) else 2
    shared = sum(part.out_features for part in module.modules() if isinstance(part, nn.Linear))
    gathered = sum(p.numel() // len(p) for p in stacked) if sites.config._experts_implementation == "batched_mm" else 0
    return int(top_k * (4 * d + copies * wide + gathered) + shared)


class Rerouted:
    """Identity rows of a replay that meet other experts than END of the clean run.

    Args:
        rows: the identity row of each entry, None where nothing starts.
    """

    def __init__(self, sites: ModelSites, rows: Sequence[int | None]) -> None:
        self.sites, self.rows = sites, rows
        self.routes: Tensor | None = None
        self.found: Tensor | None = None  # bool [n_layers + 1, batch] by entry, of the latest block

    def begin(self, routes: Tensor | None) -> None:
        """Forget the last block; ``routes`` int64 [n_layers, batch, top_k] are the experts of the clean run."""
        self.routes = routes
        self.found = None
        if routes is not None:
            self.found = torch.zeros(len(self.rows), routes.shape[1], dtype=torch.bool, device=routes.device)

    def watching(self, layer: int, a: int, b: int) -> Hooks:
        """Hooks for a call of MLP ``layer`` with rows a to b [variant, batch, d_model]."""
        hooks, router = Hooks(), self.sites.blocks[layer].router
        if router is not None and self.routes is not None:
            clean = self.routes[layer]

            def compare(output: Any) -> None:
                assert self.found is not None
                experts = experts_of(output).unflatten(0, (b - a, -1)).to(clean.device)
                for j, row in enumerate(self.rows[: layer + 1]):
                    if row is not None and a <= row < b:
                        self.found[j] |= (experts[row - a] != clean).any(-1)

            hooks.see(router, compare)
        return hooks
