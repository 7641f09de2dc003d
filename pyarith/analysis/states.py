"""One plain forward pass per block of prompts, of which the analyses keep a few vectors per layer at END."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyarith.analysis.inputs import Prompts
from pyarith.engine.calls import refuse_compiled
from pyarith.engine.capture import run_decoder
from pyarith.engine.guard import Hooks
from pyarith.errors import NonFiniteError, NotAvailableError, UnsupportedModelError
from pyarith.models.sites import ModelSites


def end_states(
    sites: ModelSites,
    prompts: Prompts,
    want: tuple[str, ...],
    tokens: int,
    beside: Callable[[Tensor], Any] | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Run the prompts in blocks of equal length; yield their indices and, per name of ``want``, END.

    Call inside ``guard.untouched``. Blocks have no padding, so the model makes its own mask, whatever its attention
    implementation. ``beside(indices)`` gives a context manager that is entered around each pass.

    Names: "pre" the residual stream before the block, "mlp_in" what the MLP's norm reads (in a parallel block that is
    "pre"), "z" the input of the attention output projection, "raw" its output, "attn_write" and "mlp_write" what is
    added to the residual stream (after a norm or multiplier, where there is one), "post" the stream after the block.

    Yields:
        indices: int64 [block]; states: name -> [n_layers, block, width] in the model's dtype, and "hidden",
        [block, d_model], the decoder's output (after the final norm).
    Raises:
        UnsupportedModelError: the model was compiled, or a block does not call its family's modules.
        NonFiniteError: the decoder's output holds NaN or infinity.
    """
    refuse_compiled(sites, "analysis")
    for indices in prompts.blocks(tokens):
        store: dict[str, dict[int, Tensor]] = {name: {} for name in (*want, "hidden")}
        length = int(prompts.lengths[indices[0]])
        ids = prompts.ids[indices, :length].to(sites.device)
        positions = torch.arange(length, device=sites.device).expand(len(ids), length)
        with Hooks() as hooks, nullcontext() if beside is None else beside(indices):
            _place(sites, hooks, want, store)
            run_decoder(sites, ids, positions, None, None)
        hidden = store.pop("hidden")[0]
        if not bool(torch.isfinite(hidden).all()):
            bad = indices[~torch.isfinite(hidden).all(-1).cpu()].tolist()
            raise NonFiniteError(f"model: NaN or infinity in the decoder's output at END of prompts {bad[:8]}")
        yield indices, {"hidden": hidden, **{name: _stacked(sites, name, kept) for name, kept in store.items()}}


def _place(sites: ModelSites, hooks: Hooks, want: tuple[str, ...], store: dict[str, dict[int, Tensor]]) -> None:
    def keep(name: str, layer: int) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            end = x[:, -1].clone()
            store[name][layer] = sites.scaled(end) if name.endswith("_write") else end

        return call

    following = [block.block for block in sites.blocks[1:]] + [sites.final_norm]
    for layer, (block, after) in enumerate(zip(sites.blocks, following, strict=True)):
        places = {
            "pre": (hooks.before, block.block),
            "mlp_in": (hooks.before, block.mlp_reads),
            "z": (hooks.before, block.o_proj),
            "raw": (hooks.after, block.o_proj),
            "attn_write": (hooks.after, block.attn_write),
            "mlp_write": (hooks.after, block.mlp_write),
            "post": (hooks.before, after),
        }
        for name in want:
            hook, module = places[name]
            hook(module, keep(name, layer))
    hooks.after(sites.final_norm, keep("hidden", 0))


def _stacked(sites: ModelSites, name: str, kept: dict[int, Tensor]) -> Tensor:
    missing = [layer for layer in range(sites.n_layers) if layer not in kept]
    if missing:
        raise UnsupportedModelError(
            f"model: family {sites.spec.name!r}: layers {missing} did not call the module where {name!r} is read; "
            "expected blocks that run as their family's do (an overridden forward?)"
        )
    return torch.stack([kept[layer] for layer in range(sites.n_layers)])


def host(x: Tensor) -> Any:
    """A numpy array of ``x`` in fp32, fp64 where it is fp64."""
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).cpu().numpy()


def frame(rows: Any) -> Any:
    """A pandas table of an iterable of dictionaries.

    Raises:
        NotAvailableError: pandas is not installed.
    """
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise NotAvailableError("to_dataframe: needs pandas; pip install pandas") from error
    return pandas.DataFrame(list(rows))
