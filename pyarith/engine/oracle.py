"""The slow published algorithm: one full forward pass of the model per sender, with hooks.

It checks the replay in two ways. ``attach`` compares rows recomposed from the family spec with the model's
own logits, once per model. ``verify`` re-runs chosen senders literally, every other head frozen at all positions.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.batch import Batch
from pyarith.engine.capture import Captured, Prefix, allocate, capture, takes_trees
from pyarith.engine.guard import Hooks
from pyarith.engine.readout import Readout
from pyarith.engine.replay import Replay
from pyarith.engine.routing import experts_of, has_routers, tolerated
from pyarith.errors import SelfCheckError
from pyarith.models.adapters import adapter_state
from pyarith.models.quantised import plain_tensors
from pyarith.models.sites import ModelSites

# How far recomposed rows may be from the model's own numbers, relative to the largest logit in play. fp64 models of
# transformers still cast norms and rotary embeddings to fp32.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Added where what goes into a linear is made int8 row by row. Rows that differ in the last bit fall to different codes,
# and a head's write is recomputed from z itself. Measured on 30 random models of 5 families: up to 0.04 of the largest
# logit in recomposed rows (0.26 in bf16), up to 0.15 in literal re-runs; the median is 0.001. Everything else that is
# quantised gives a row what it gives a sequence, to rounding: up to 1e-6 with products in fp32, 0.04 in bf16.
_INT8_ACTIVATIONS = 0.2
# Added where a router weighs experts by scores rounded to 16 bits. Measured in bf16 on 25 prompts of 4 tiny random
# families whose rows met the same experts throughout: replay and literal re-run differ by up to 0.20 of the largest
# logit, as far as each is from fp64 (a dense family: 0.03).
_ROUTED = 0.2
_CHECK_TOKENS = 8
_checked: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def tolerance(sites: ModelSites, scale: float) -> float:
    """Largest difference that rounding may explain between logits of size ``scale``."""
    found = sites.quantised
    share = max(_TOLERANCE[dtype] for dtype in (sites.dtype, *(found.compute if found else ())))
    routed = tolerated(sites) and has_routers(sites)
    return (share + _INT8_ACTIVATIONS * bool(found and found.activations) + _ROUTED * routed) * scale


def excused(sites: ModelSites, found: str) -> bool:
    """Whether a sweep's difference beyond ``tolerance`` may be another choice of experts; a warning says so then."""
    if not (tolerated(sites) and has_routers(sites)):
        return False
    warnings.warn(
        f"{found}. Rounding to {sites.dtype} can send rows of a mixture of experts to other experts, so this is "
        "tolerated; the noise floor shows the effect. Load the model in fp32 for effects smaller than that",
        UserWarning,
        stacklevel=3,
    )
    return True


def forget(model: nn.Module) -> None:
    """Let the next ``attach`` check the model again, though it has not changed."""
    _checked.pop(model, None)


@dataclass(frozen=True)
class Sender:
    """A head, or the MLP of a layer where ``head`` is None."""

    layer: int
    head: int | None


def _state(sites: ModelSites) -> tuple[Any, ...] | None:
    """Changes whenever a weight is written or replaced, a hook or an override is added, or an adapter is switched.

    None where that cannot be told: tensors made in inference mode do not count their changes.
    """
    if any(p.is_inference() for p in sites.model.parameters()):
        return None
    hooks = tuple(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in sites.model.modules()
    )
    weights = tuple(
        (p.data_ptr(), p._version) for whole in sites.model.parameters() for _, p in plain_tensors("", whole)
    )
    return hooks, weights, sites.attention, adapter_state(sites.model)


def attach(sites: ModelSites, replay: Replay, batch: Batch) -> None:
    """Check that rows recomposed from the family spec reproduce the model's own logits.

    Runs the model once on the start of the first prompt; a model that has not changed since is not checked again.

    Raises:
        SelfCheckError: they do not; family, layer and both numbers are named.
    """
    state = _state(sites)
    if state is not None and _checked.get(sites.model) == state:
        return
    length = min(_CHECK_TOKENS, int(batch.lengths[0]))
    ids = batch.clean[:1, :length]
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % sites.d_vocab
    targets = batch.targets[:, 0].unique()[:64].to(sites.device)[None]
    with _Experts(sites) as packed:
        forward = _capture_pair(sites, ids, other)
    backward = _capture_pair(sites, other, ids)
    with _Experts(sites) as alone:
        own = _forward(sites, ids[0])[targets[0]]
    elsewhere = _other_experts(sites, packed, alone.of_call(0), torch.arange(length), 0)
    scale = float(own.abs().max().clamp_min(1.0))
    readout = Readout(sites, replay.final_norm, replay.unembed, targets, replay.backend)
    _compare(sites, "final norm and unembedding", readout.of_hidden(forward.clean_hidden)[0], own, scale, elsewhere)
    # one head a layer: identity rows are what is compared
    heads = ((0,),) * sites.n_layers
    checker = Replay(sites, replay.backend, heads=heads, mlps=True, frozen=False, log_probs=False)
    logits = checker.run(forward, targets, row_block=checker.n_variants).logits
    for j, entry in enumerate(checker.entries):
        if entry is not None:
            where = f"rows that start at layer {min(j, sites.n_layers - 1)}"
            rerouted = checker.rerouted.found is not None and bool(checker.rerouted.found[j].any())
            _compare(sites, where, logits[entry.identity_row, 0], own, scale, elsewhere or rerouted)
    for layer, w_o in enumerate(checker.w_o):
        sites.ready(layer)
        # what attention writes must be the sum of what its heads write
        clean, changed = (c.writes if c.raw is None else c.raw for c in (forward, backward))
        scale = sites.residual_scale if forward.raw is None else 1.0
        found = torch.addmm(clean[layer], forward.dz[layer], w_o.flatten(0, 1).to(clean), alpha=scale)
        size = max(float(clean[layer].abs().max()), float(changed[layer].abs().max()))
        _compare(sites, f"layer {layer}, attention write", found, changed[layer], size)
    if state is not None:
        _checked[sites.model] = state


def _capture_pair(sites: ModelSites, clean: Tensor, corrupted: Tensor) -> Captured:
    """Two prompts [1, pos] that differ in their last token, captured through the same code as a run."""
    length = clean.shape[1]
    pair = Batch(clean, corrupted, torch.tensor([length]), torch.tensor([length - 1]), clean[:, :1])
    captured = allocate(sites, 1, mlps=True)
    capture(sites, pair, torch.tensor([0]), Prefix(sites, clean[0, :0]), captured, slice(0, 1))
    return captured


def _compare(
    sites: ModelSites, where: str, found: Tensor, expected: Tensor, scale: float, elsewhere: bool = False
) -> None:
    """Raise where the difference is beyond rounding; ``elsewhere``: the rows went to other experts than the model's."""
    error = (found.to(expected.dtype) - expected).abs()
    if not bool(torch.isfinite(error).all()):
        return  # named by the run itself, which looks for the first non-finite tensor
    if float(error.max()) > tolerance(sites, scale):
        if elsewhere and tolerated(sites):
            warnings.warn(
                f"self-check: family {sites.spec.name!r}, {where}: rounding to {sites.dtype} sent them to other "
                f"experts than the model chose, which moves logits by {float(error.max()):.2g}; tolerated in 16 bits; "
                "settings['rerouted'] counts identity rows for which that happens. Load the model in fp32 for effects "
                "smaller than that",
                UserWarning,
                stacklevel=2,
            )
            return
        worst = int(error.flatten().argmax())
        went = "The rows went to other experts than the model's own. " if elsewhere else ""
        raise SelfCheckError(
            f"self-check: family {sites.spec.name!r}, {where}: the family spec recomposes "
            f"{float(found.flatten()[worst]):.6g}, the model itself has {float(expected.flatten()[worst]):.6g} "
            f"(tolerance {tolerance(sites, scale):.2g}). {went}The model does something that its family spec does not "
            "describe (a hook, an overridden forward, a changed block?); results would be wrong, so none are given"
        )


def _forward(sites: ModelSites, ids: Tensor) -> Tensor:
    """The model's own logits at the last position of one unpadded prompt, [d_vocab] in row dtype."""
    ids = ids.to(sites.device)[None]
    positions = torch.arange(ids.shape[1], device=sites.device)[None]
    output = sites.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, return_dict=True)
    logits: Tensor = output.logits[0, -1]
    return logits.to(sites.row_dtype)


def literal(sites: ModelSites, clean: Tensor, corrupted: Tensor, target: int, sender: Sender, frozen: bool) -> float:
    """Logit of ``target`` with one sender patched at END, every other head frozen at all positions.

    Args:
        clean, corrupted: int64 [pos] one unpadded prompt each.
        frozen: freeze the MLPs (except the sender) as well.
    """
    own, other = _run_storing(sites, clean), _run_storing(sites, corrupted)
    with Hooks() as hooks:
        for layer, block in enumerate(sites.blocks):
            z, write = own[block.o_proj], own[block.mlp_write]
            sends = layer == sender.layer
            if sends and sender.head is not None:
                columns = slice(sender.head * sites.d_head, (sender.head + 1) * sites.d_head)
                z[:, -1, columns] = other[block.o_proj][:, -1, columns]
            if sends and sender.head is None:
                write[:, -1] = other[block.mlp_write][:, -1]
            hooks.before(block.o_proj, _always(z))
            if frozen or (sends and sender.head is None):
                hooks.after(block.mlp_write, _always(write))
        return float(_forward(sites, clean)[target])


def _run_storing(sites: ModelSites, ids: Tensor) -> dict[nn.Module, Tensor]:
    """z of every layer (by its projection) and every MLP write (by its module), at all positions."""
    store: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            store[module] = x.clone()

        return call

    with Hooks() as hooks:
        for block in sites.blocks:
            hooks.before(block.o_proj, keep(block.o_proj))
            hooks.after(block.mlp_write, keep(block.mlp_write))
        _forward(sites, ids)
    return store


def _always(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def went_elsewhere(sites: ModelSites, batch: Batch, prompt: int, sender: Sender, backend: str) -> bool:
    """Whether a literal re-run and the replay choose different experts in some layer, for any token of the pair or for
    the sender's row."""
    n, shared, target = int(batch.lengths[prompt]), int(batch.shared[prompt]), batch.targets[prompt, :1]
    with _Experts(sites) as literally:
        literal(sites, batch.clean[prompt, :n], batch.corrupted[prompt, :n], int(target), sender, frozen=False)
    replay = Replay(sites, backend, heads=True, mlps=True, frozen=False, log_probs=False)
    captured = allocate(sites, 1, mlps=True)
    with _Experts(sites) as packed:
        capture(sites, batch, torch.tensor([prompt]), Prefix(sites, batch.clean[0, :0]), captured, slice(0, 1))
    with _Experts(sites) as replayed:
        replay.run(captured, target[None].to(sites.device), row_block=replay.n_variants)
    places = {
        Sender(e.head_layer, h): e.start + h for e in replay.entries if e and e.head_layer is not None for h in e.heads
    }
    places |= {Sender(e.mlp_layer, None): e.mlp_row for e in replay.entries if e and e.mlp_layer is not None}
    row, patched = places[sender], literally.of_call(2)
    met = {layer: experts[row] for layer, experts in replayed.of_call(0).items() if row < len(experts)}
    # a tree holds the clean prompt and behind it what the corrupted one does not share; else both stand in full
    corrupted = torch.cat([torch.arange(shared), torch.arange(n, 2 * n - shared)])
    corrupted = corrupted if takes_trees(sites) else torch.arange(n, 2 * n)
    return (
        any(not torch.equal(experts, patched[layer][-1]) for layer, experts in met.items())
        or _other_experts(sites, packed, literally.of_call(0), torch.arange(n), 0)
        or _other_experts(sites, packed, literally.of_call(1), corrupted, 1)
    )


class _Experts(Hooks):
    """Keeps the experts [token, top_k] of every call of every router."""

    def __init__(self, sites: ModelSites) -> None:
        super().__init__()
        self._calls: dict[int, list[Tensor]] = {i: [] for i, b in enumerate(sites.blocks) if b.router is not None}
        self._routers = {layer: sites.blocks[layer].router for layer in self._calls}

    def __enter__(self) -> _Experts:
        for layer, router in self._routers.items():
            assert router is not None
            self.see(router, partial(self._keep, layer))
        return self

    def _keep(self, layer: int, output: Any) -> None:
        self._calls[layer].append(experts_of(output))

    def of_call(self, number: int) -> dict[int, Tensor]:
        """By layer, for the routers that were called so often."""
        return {layer: calls[number] for layer, calls in self._calls.items() if number < len(calls)}


def _other_experts(sites: ModelSites, packed: _Experts, alone: dict[int, Tensor], tokens: Tensor, end: int) -> bool:
    """Whether a prompt met other experts alone than as ``tokens`` of the captured pair.

    The last MLP of a capture runs for the pair's two ENDs only, of which ``end`` is the prompt's.
    """
    for layer, seen in packed.of_call(0).items():
        last = layer == sites.n_layers - 1
        mine = alone[layer][-1:] if last else alone[layer]
        if not torch.equal(mine, seen[end : end + 1] if last else seen[tokens.to(seen.device)]):
            return True
    return False
