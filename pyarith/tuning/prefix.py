"""``PrefixCache``: the layers below the lowest trained one are computed once per batch, not once per epoch."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyarith.engine.clock import mark, seconds
from pyarith.engine.planner import parse_bytes
from pyarith.errors import InputTypeError, UnsupportedModelError, check
from pyarith.models.sites import resolve
from pyarith.tuning.prefix_disk import PrefixFolder, origin_of
from pyarith.tuning.prefix_guard import PrefixGuard
from pyarith.tuning.prefix_keys import Row, batch_digest, example_rows, refuse_arguments
from pyarith.tuning.prefix_store import Kept, PrefixStore
from pyarith.tuning.selective import SelectiveTuner

_OPEN = 64  # timings that wait for the device before the oldest is read


class PrefixCache:
    """Keep what the layers below ``tuner.first_layer`` give, and start later passes over the same batch there.

        first time:  h = block[first_layer - 1](... block[0](embedding(ids)));   kept[batch] = h
        afterwards:  h = kept[batch];   the model goes on with block[first_layer](h) ...

    The layers below are never trained, so training is what it is without the cache. While attached (``with``, or one
    call of the cache) whoever calls the model or its decoder is served: embedding, masks, rotary tables, upper layers
    and loss run untouched, and the blocks below hand on the kept states.

    A batch that comes again in the same composition and padding is served its own states: results have the bits of a
    run without the cache. With ``exact=False`` a batch of examples that are all known from other batches is put
    together from those, which equals a run without the cache up to rounding (matrix products round differently in
    other company). Padding behind the tokens then gets zeros: nothing may be computed from what the model gives there
    (a batch whose ``labels`` count there is computed). Rows padded before their tokens, or packed with several
    examples, are known only as they are. ``stats()`` says in ``bit_identical`` whether any batch was put together.

    Args:
        tuner: attached, its lowest trained layer above 0.
        memory: bytes or a text such as "2GiB". What comes first stays; nothing is dropped to make room.
        exact: serve only whole batches seen before, so that every result keeps its bits.
        on_device: keep states on the model's device; else in the host's memory (pinned for a GPU).
        disk: a folder that everything kept is written to as well, for what memory has no room for and for later
            processes; checksummed, tied to the weights below, the machine and the versions of the libraries.
        disk_budget: most bytes of the folder; None = half of what is free.
    Raises:
        InputError, InputTypeError: no attached tuner; its lowest trained layer is 0, with nothing below to keep; a
            budget that is none; ``disk_budget`` without ``disk``; a folder that cannot be used or belongs to other
            states. While attached: anything below changed since the cache was made (weights, modules, hooks on the
            embeddings); ``past_key_values``, ``use_cache=True``, ``inputs_embeds``, hidden states or attentions wanted.
        UnsupportedModelError: the model, its decoder or a block below was compiled; blocks below have hooks or forwards
            of their own, or share weights with trained layers. While attached: dropout or other randomness below;
            rotary embeddings that depend on the length of the company.
    Notes:
        Every call looks at versions and places of the weights below, and about once an epoch at 512 values of each; a
        change of single values through ``.data`` can go unseen. Ids are hashed on the host: on a GPU each call waits
        for them. A broken file is computed again; on a full disk the cache goes on without writing and says so once.
        The model runs as with ``use_cache=False``.

    Examples:
        >>> import pyarith as pa
        >>> from pyarith.tuning import PrefixCache
        >>> model, tokenizer = pa.load_demo()
        >>> ids = tokenizer("8 / 4 = 2", return_tensors="pt")["input_ids"]
        >>> with pa.SelectiveTuner(model, heads=[(2, 7), (3, 1)]) as tuner, PrefixCache(tuner) as cache:
        ...     optimizer = tuner.optimizer(lr=1e-3)
        ...     for _ in range(3):
        ...         model(input_ids=ids, labels=ids).loss.backward()
        ...         optimizer.step()
        >>> cache.stats()["computed"], cache.stats()["served"], cache.stats()["bit_identical"]
        (1, 2, True)
    """

    def __init__(
        self,
        tuner: SelectiveTuner,
        memory: int | str = "1GiB",
        *,
        exact: bool = False,
        on_device: bool = False,
        disk: str | Path | None = None,
        disk_budget: int | str | None = None,
    ) -> None:
        check(
            isinstance(tuner, SelectiveTuner),
            f"tuner: expected a SelectiveTuner, got {type(tuner).__name__}",
            InputTypeError,
        )
        check(tuner.attached, "tuner: expected an attached SelectiveTuner, this one was detached")
        check(
            tuner.first_layer > 0,
            "tuner: expected its lowest trained layer above 0: below layer 0 there is nothing to keep; train without a "
            "PrefixCache, or leave out the heads and MLPs of layer 0",
        )
        check(disk is not None or disk_budget is None, "disk_budget: expected together with disk, the folder")
        budget, room = parse_bytes(memory, "memory"), parse_bytes(disk_budget, "disk_budget")
        check(budget is not None, "memory: expected bytes or a text such as '2GiB', got None")
        assert budget is not None
        self.tuner, self.exact, self.first_layer = tuner, bool(exact), tuner.first_layer
        self._sites = sites = resolve(tuner.model)
        self._guard = PrefixGuard(sites, self.first_layer, (one.weight for one in tuner.slices))
        self._guard.check_attachable()
        self._guard.check()
        self._signature = inspect.signature(sites.decoder.forward)
        folder = None if disk is None else PrefixFolder(disk, room, origin_of(sites, self._guard))
        on_gpu = sites.device.type == "cuda"
        place = sites.device if on_device else torch.device("cpu")
        self._store = PrefixStore(budget, folder, place, pin=on_gpu and not on_device)
        self._hooks: list[Any] = []
        self._depth = 0
        self._call: _Call | None = None
        self._labels: Any = None
        self._computed = self._served = self._assembled = self._since_look = 0
        self._open: deque[_Timing] = deque()
        self._times = {True: [0.0, 0], False: [0.0, 0]}  # served or not: seconds, tokens

    def __call__(self, **batch: Any) -> Any:
        """The model's output for a batch of keyword arguments, with the layers below served from what was kept."""
        self._attach()
        try:
            return self._sites.model(**batch)
        finally:
            self._detach()

    def __enter__(self) -> PrefixCache:
        self._guard.check_values()
        self._attach()
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()

    def stats(self) -> dict[str, Any]:
        """What happened so far.

        Returns:
            ``first_layer``; batches ``served`` as they were kept, ``assembled`` from examples of others, ``computed``,
            and of those ``not_kept`` for want of room; ``bit_identical``: none was assembled; batches kept now
            (``batches``) with ``memory_bytes`` and ``disk_bytes`` (None without a folder); files found ``corrupted``;
            ``seconds_saved``: what the layers below would have taken for the tokens served, at the speed that was
            measured when states were computed, less what serving took (None before both are known).
        """
        while self._open:
            self._read_timing()
        store, (served, n_served), (computed, n_computed) = self._store, self._times[True], self._times[False]
        if not n_computed:
            computed, n_computed = store.measured
        return {
            "first_layer": self.first_layer,
            "served": self._served,
            "assembled": self._assembled,
            "computed": self._computed,
            "not_kept": store.not_kept,
            "bit_identical": self._assembled == 0,
            "batches": len(store.batches),
            "memory_bytes": store.memory_bytes,
            "disk_bytes": None if store.folder is None else store.folder.bytes,
            "corrupted": store.corrupted,
            "seconds_saved": n_served * computed / n_computed - served if n_computed and n_served else None,
        }

    def __repr__(self) -> str:
        now = self.stats()
        saved = now["seconds_saved"]
        return (
            f"PrefixCache: layers 0-{self.first_layer - 1} of {self._sites.n_layers}; {now['served']} batches served, "
            f"{now['assembled']} assembled, {now['computed']} computed ({now['not_kept']} not kept); "
            f"{now['memory_bytes'] / 2**20:.1f} MiB in memory"
            + ("" if now["disk_bytes"] is None else f", {now['disk_bytes'] / 2**20:.1f} MiB on disk")
            + ("" if saved is None else f"; {saved:.1f} s saved")
        )

    def _attach(self) -> None:
        if self._depth == 0:
            self._guard.check_attachable()
        self._depth += 1
        if self._depth > 1:
            return
        model, decoder = self._sites.model, self._sites.decoder
        self._hooks = [
            model.register_forward_pre_hook(self._see_labels, with_kwargs=True),
            model.register_forward_hook(self._forget_labels, always_call=True),
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        for layer in range(self.first_layer):
            block: Any = self._sites.blocks[layer].block
            block.forward = self._forward(block.forward, layer)

    def _detach(self) -> None:
        self._depth -= 1
        if self._depth:
            return
        for layer in range(self.first_layer):
            del self._sites.blocks[layer].block.forward
        while self._hooks:
            self._hooks.pop().remove()
        self._call = self._labels = None

    def _forward(self, own: Callable[..., Any], layer: int) -> Callable[..., Any]:
        """The forward of one block below while attached; ``own`` is its real one."""
        last = layer == self.first_layer - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is None:  # gradient checkpointing runs a block again in the backward pass
                return own(*args, **kwargs)
            if call.states is None:
                out = own(*args, **kwargs)
                if last:
                    self._keep(call, out)
                return out
            hidden = args[0] if args else kwargs["hidden_states"]
            if last:
                self._expect_no_draws(call)
                # as where embeddings were made to require gradients, for reentrant checkpointing
                hidden = call.states.requires_grad_(hidden.requires_grad and torch.is_grad_enabled())
                self._timed(True, hidden.shape[0] * hidden.shape[1], call.begin)
            # a second item holds attention weights, which nobody asked for (``refuse_arguments``)
            return (hidden, None) if call.in_tuple else hidden

        return forward

    def _see_labels(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._labels = kwargs.get("labels")

    def _forget_labels(self, *_: Any) -> None:
        self._labels = None

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder runs: find the states of its batch."""
        sites, guard = self._sites, self._guard
        check(self.tuner.attached, "PrefixCache: its tuner was detached from the model; leave the cache's block first")
        begin = mark(sites.device)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        refuse_arguments(given, sites.config)
        guard.check()
        guard.check_length(given["input_ids"], given.get("position_ids"))
        context = self._context()
        digest = batch_digest(given, context)
        found, rows = self._store.batch(digest, sites.device), None
        if found is not None:
            self._served += 1
        elif not self.exact:
            rows = example_rows(given, context, self._labels)
            if rows is not None:
                found = self._store.assembled(rows, given["input_ids"].shape[1], sites.device)
                self._assembled += found is not None
        self._look_at_values(found is not None)
        kept, states = (None, None) if found is None else found
        in_tuple = kept is not None and kept.in_tuple
        self._call = _Call(digest, rows, states, in_tuple, mark(sites.device) if kept is None else begin, self._draws())
        return (), {**given, "use_cache": False}  # a cache would miss the layers that do not run

    def _end(self, *_: Any) -> None:
        self._call = None

    def _keep(self, call: _Call, out: Any) -> None:
        """The last block below gave its output for the first time."""
        in_tuple = isinstance(out, tuple) and len(out) <= 2
        states = out[0] if in_tuple else out
        check(
            isinstance(states, Tensor),
            f"model: layer {self.first_layer - 1} gives {type(out).__name__}, expected a tensor of hidden states",
            UnsupportedModelError,
        )
        self._expect_no_draws(call)
        tokens = states.shape[0] * states.shape[1]
        spent = self._timed(False, tokens, call.begin)
        self._computed += 1
        self._store.put(Kept(call.digest, call.rows, in_tuple, spent, tokens), states.detach())

    def _context(self) -> str:
        """What may change the bits of the states beside arguments and weights."""
        kind = self._sites.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return f"{cast} {self._sites.attention} {torch.get_float32_matmul_precision()} {torch.get_num_threads()}"

    def _draws(self) -> tuple[Tensor, ...]:
        """States of the generators that the model may draw from."""
        device = self._sites.device
        own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
        return (torch.get_rng_state(), *own)

    def _expect_no_draws(self, call: _Call) -> None:
        same = all(torch.equal(a, b) for a, b in zip(call.draws, self._draws(), strict=True))
        check(
            same,
            f"model: random numbers were drawn below layer {self.first_layer} (noise on embeddings, dropout in an "
            "attention function), so kept states would not be what training computes; turn that off, or train without "
            "a PrefixCache",
            UnsupportedModelError,
        )

    def _look_at_values(self, served: bool) -> None:
        """About once an epoch, also see changes that torch does not count."""
        self._since_look += served
        if self._since_look > max(16, len(self._store.batches)):
            self._guard.check_values()
            self._since_look = 0

    def _timed(self, served: bool, tokens: int, begin: Any) -> float:
        """Note the time since ``begin``; returns it where it is known at once (0 on a GPU)."""
        self._open.append(_Timing(served, tokens, begin, mark(self._sites.device)))
        if self._sites.device.type == "cuda":
            if len(self._open) > _OPEN:
                self._read_timing()
            return 0.0
        return self._read_timing()

    def _read_timing(self) -> float:
        timing = self._open.popleft()
        spent = seconds(timing.begin, timing.end)
        total = self._times[timing.served]
        total[0] += spent
        total[1] += timing.tokens
        return spent


@dataclass(frozen=True)
class _Call:
    """One call of the decoder: its batch, the states to serve (None: compute), when it began, generators before it."""

    digest: str
    rows: tuple[Row, ...] | None
    states: Tensor | None
    in_tuple: bool
    begin: Any
    draws: tuple[Tensor, ...]


class _Timing(NamedTuple):
    served: bool
    tokens: int
    begin: Any
    end: Any
