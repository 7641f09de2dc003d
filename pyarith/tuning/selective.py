"""``SelectiveTuner``: chosen heads and MLPs of a model made trainable, as compact slices of its weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyarith.engine.ablation import check_targets
from pyarith.errors import InputError, UnsupportedModelError, check
from pyarith.models.adapters import refuse_adapters
from pyarith.models.sites import SLICES, is_sharded, resolve
from pyarith.tuning.delta import LOADED, Base, save_delta
from pyarith.tuning.linear import How, SlicedLinear, project
from pyarith.tuning.slices import Slice, head_slices, mlp_slices
from pyarith.types import Head

if TYPE_CHECKING:
    from pyarith.tuning.optimizer import SliceAdamW


_HELD = "@weight"


class SelectiveTuner:
    """Train only chosen heads and MLPs of a model; every other parameter keeps its bits.

    Trainable are, for head (l, h) with d_head rows or columns each,

        W_Q[l][h, :] and its bias rows;  W_O[l][:, h];  with kv="group" W_K[l][g, :], W_V[l][g, :] and bias rows,
        g = h // (n_heads / n_kv_heads)

    and for an MLP layer all of its parameters. The bias of W_O and the norms of queries and keys are never trained.
    The slices are compact leaf parameters (fp32 beside 16-bit weights, else in the weights' dtype); the model runs on
    its own weights, into which new values are written after every step of any torch optimizer over ``parameters()``
    (see ``sync``). Gradients, and with ``optimizer`` its state, exist for the slices only; nothing is recorded for the
    backward pass below ``first_layer``.

    While attached, the slices are registered in the model as ``pyarith_slices``, so that ``model.parameters()`` with
    ``requires_grad`` are exactly the slices (the Hugging Face ``Trainer``, ``accelerate``, gradient clipping and DDP
    find them there; DDP reduces the gradients of the slices and nothing else) and the state dict is what it was. A
    model that is sharded (FSDP2's ``fully_shard``, before or after) is refused. Ends with the ``with`` block or
    ``detach()``: the model is then an ordinary model that holds the new values.

    Args:
        model: a supported Hugging Face causal LM; its forward gives what it gave.
        heads: ``(layer, head)`` tuples.
        mlps: layers whose whole MLP is trained.
        kv: "group" trains the key and value rows that a chosen head reads, which the other query heads of its group
            read too (``shared_heads``); "none" leaves keys and values as they are.

    Raises:
        InputError, InputTypeError: nothing chosen; targets that the model does not have or that stand twice (all named
            in one message); ``kv``; a model that has a tuner attached or a delta loaded.
        UnsupportedModelError: the model is not supported, or a projection is no plain linear one.

    References: Zhang et al. 2024, arXiv:2409.01659, sec. 5 (Precise SFT).

    Examples:
        >>> import pyarith as pa, torch
        >>> model, tokenizer = pa.load_demo()
        >>> ids = tokenizer("8 / 4 = 2", return_tensors="pt")["input_ids"]
        >>> with pa.SelectiveTuner(model, heads=[(2, 7), (3, 1)]) as tuner:
        ...     optimizer = tuner.optimizer(lr=1e-3)
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step()
        >>> tuner.n_parameters
        32768
    """

    def __init__(
        self, model: Any, heads: Iterable[tuple[int, int]], mlps: Iterable[int] = (), kv: str = "group"
    ) -> None:
        check(
            not hasattr(model, SLICES),
            "model: a SelectiveTuner is attached already; end it with .detach() or its with block, or give all heads "
            "to one",
        )
        check(
            not hasattr(model, LOADED),
            "model: a delta is loaded; take it out with model.pyarith_delta.unload(), or train on from its values by "
            "merge_delta in place of load_delta",
        )
        refuse_adapters(model, "SelectiveTuner")
        self._sites = resolve(model)
        self.heads, self.mlps = check_targets(self._sites, heads, mlps)
        self.kv = kv
        self.slices: tuple[Slice, ...] = (
            *head_slices(self._sites, self.heads, kv),
            *mlp_slices(self._sites, self.mlps),
        )
        owners = [id(one.weight) for one in self.slices]
        tied = [one.name for one in self.slices if owners.count(id(one.weight)) > 1]
        if tied:
            raise UnsupportedModelError(f"heads, mlps: layers share weights, so none can be trained alone: {tied[:4]}")
        self.base = Base.of(model, self.slices)  # for save_delta
        self._store = _Slices(self.slices, self._sites.row_dtype)
        self._written = [value._version for value in self._store.values]
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._attach(model)

    @property
    def model(self) -> nn.Module:
        return self._sites.model

    @property
    def attached(self) -> bool:
        """Whether the model still trains these slices."""
        return getattr(self.model, SLICES, None) is self._store

    @property
    def first_layer(self) -> int:
        """The lowest layer with a trained slice; the layers below run as in inference."""
        return min(one.layer for one in self.slices)

    @property
    def n_parameters(self) -> int:
        """Trainable numbers."""
        return sum(value.numel() for value in self._store.values)

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of the slices, of their gradients, and of AdamW's two moments."""
        size = sum(value.numel() * value.element_size() for value in self._store.values)
        return {"slices": size, "gradients": size, "adamw": 2 * size}

    @property
    def shared_heads(self) -> tuple[Head, ...]:
        """Query heads that were not chosen but read trained keys and values (grouped-query attention)."""
        if self.kv == "none":
            return ()
        group = self._sites.group
        read = {(head.layer, head.head // group) for head in self.heads}
        every = (Head(layer, g * group + i) for layer, g in sorted(read) for i in range(group))
        return tuple(head for head in every if head not in self.heads)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compact slices, in the order of ``slices``."""
        return iter(self._store.values)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the parameter that a slice is taken from, the slice)."""
        return ((one.name, value) for one, value in zip(self.slices, self._store.values, strict=True))

    def optimizer(self, lr: float, **options: Any) -> SliceAdamW:
        """AdamW over the slices with the write-back in the same pass; see ``SliceAdamW`` for the options."""
        from pyarith.tuning.optimizer import SliceAdamW

        return SliceAdamW(self, lr, **options)

    def loss(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Mean next-token cross-entropy without the logits of all positions; see ``label_loss``.

        Args:
            labels: int64 [batch, pos], -100 where nothing is to be learnt.
            inputs: ``input_ids``, ``attention_mask``, ``position_ids``.
        Raises:
            InputError: the tuner was detached; no label is left.
        """
        from pyarith.tuning.loss import label_loss

        self._expect_attached("loss")
        return label_loss(self._sites, labels, **inputs)

    def sync(self) -> None:
        """Write the slices into the model's weights, rounded to their dtype.

        Happens by itself after every step of a torch optimizer, and before a forward pass for slices that were set by
        hand; the latter not where the model is compiled.

        Raises:
            InputError: the tuner was detached.
        """
        self._expect_attached("sync")
        for number in range(len(self.slices)):
            self._write(number)

    def sync_changed(self) -> None:
        """Write those slices whose version counter moved since they were last written."""
        for number in range(len(self.slices)):
            self._write_changed(number)

    def mark_written(self) -> None:
        """Say that an optimizer has written the slices into the weights itself."""
        self._written = [value._version for value in self._store.values]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what training has changed: the slices, and what the weights hold where their dtype is another
        (with stochastic rounding it is not the nearest value). Names are those of the parameters."""
        pairs = list(zip(self.slices, self._store.values, strict=True))
        state = {one.name: value.detach().clone() for one, value in pairs}
        return state | {
            f"{one.name}{_HELD}": torch.cat(one.views(), one.dim)
            for one, value in pairs
            if one.weight.dtype != value.dtype
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set slices and weights to what ``state_dict`` gave, for a tuner with the same choice.

        Raises:
            InputError: other names, shapes or dtypes, or the tuner was detached; nothing is changed.
        """
        self._expect_attached("load_state_dict")
        own = self.state_dict()
        expected, found = ({k: (tuple(v.shape), v.dtype) for k, v in one.items()} for one in (own, state))
        wrong = [f"{k}: expected {expected.get(k)}, got {found.get(k)}" for k in expected | found]
        wrong = [text for text, k in zip(wrong, expected | found, strict=True) if expected.get(k) != found.get(k)]
        check(not wrong, f"state: expected the slices of this tuner; {'; '.join(wrong[:4])}")
        with torch.no_grad():
            for one, value in zip(self.slices, self._store.values, strict=True):
                value.copy_(state[one.name])
                held = state.get(f"{one.name}{_HELD}", state[one.name])
                for place, part in zip(one.views(), one.parts(held), strict=True):
                    place.copy_(part)
        self.mark_written()

    def save_delta(self, folder: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
        """Write what training has made of the slices, and of which model, for ``load_delta`` and ``merge_delta``.

        Two files: ``delta.json`` (heads, MLPs, config and digests of the base, SHA-256 of the slices before training,
        settings, versions) and, under a name that it gives, the new values in the weights' dtype as safetensors. A
        delta that is there already is replaced at once and whole. Works after ``detach()``, too.

        Args:
            folder: made where it does not exist.
            settings: anything to keep beside it, as JSON holds it: how it was trained.
        Returns:
            ``folder``.
        Raises:
            InputError: ``settings``; the model was cast to another dtype or changed outside the slices meanwhile.
            StorageError: it could not be written (a full disk); the delta from before is still there.
        """
        return save_delta(self, folder, settings)

    def detach(self) -> None:
        """Write what is left to write and give the model back as an ordinary one; a second call does nothing."""
        if not self.attached:
            return
        self.sync_changed()
        self._hook.remove()
        for module in {one.module for one in self.slices}:
            del module.forward
        delattr(self.model, SLICES)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags[name])

    def __enter__(self) -> SelectiveTuner:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        total = sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith(f"{SLICES}."))
        sizes = {name: f"{size / 2**20:.1f} MiB" for name, size in self.state_bytes.items()}
        layers = sorted({one.layer for one in self.slices})
        lines = [
            f"SelectiveTuner: {len(self.heads)} heads, {len(self.mlps)} MLPs in layers {layers[0]}-{layers[-1]}, "
            f'kv="{self.kv}"{"" if self.attached else ", detached"}',
            f"  {self.n_parameters:,} of {total:,} parameters ({self.n_parameters / total:.2%}); slices "
            f"{sizes['slices']}, gradients {sizes['gradients']}, AdamW {sizes['adamw']}",
        ]
        if self.shared_heads:
            names = ", ".join(map(str, self.shared_heads))
            lines.append(f"  keys and values are shared with heads that were not chosen: {names}")
        return "\n".join(lines)

    def _expect_attached(self, call: str) -> None:
        check(self.attached, f"{call}: the tuner was detached from its model; make a new SelectiveTuner")

    def _attach(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.add_module(SLICES, self._store)
        by_module: dict[nn.Module, dict[str, int]] = {}
        for number, one in enumerate(self.slices):
            by_module.setdefault(one.module, {})[one.attribute] = number
        for module, numbers in by_module.items():
            module.forward = self._forward(module, numbers)
        mine = weakref.ref(self)  # the hook is torch's own list: a forgotten tuner must not live on in it

        def after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
            tuner = mine()
            if tuner is None or not tuner.attached or getattr(optimizer, "writes_slices", False):
                return
            stepped = {id(value) for group in optimizer.param_groups for value in group["params"]}
            for number, value in enumerate(tuner.parameters()):
                if id(value) in stepped:  # not by version counters: torch's fused optimizers leave them alone
                    tuner._write(number)

        self._hook = register_optimizer_step_post_hook(after_step)

    def _forward(self, module: Any, numbers: dict[str, int]) -> Any:
        """The forward of one projection while attached."""
        one, how = self.slices[numbers["weight"]], How.of(module)
        ranges, values = (None if one.whole else one.ranges), self._store.values

        def forward(x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                for number in numbers.values():
                    self._write_changed(number)
            weight, bias = module.weight, module.bias
            if not torch.is_grad_enabled():
                return project(x, weight, bias, how)
            bias_part = values[numbers["bias"]] if "bias" in numbers else None
            part = values[numbers["weight"]]
            out: Tensor = SlicedLinear.apply(x, weight, bias, part, bias_part, how, one.outputs, ranges)
            return out

        return forward

    def _write_changed(self, number: int) -> None:
        self._expect_whole(number)
        if self._store.values[number]._version != self._written[number]:
            self._write(number)

    def _write(self, number: int) -> None:
        """Copy one slice into its weight."""
        self._expect_whole(number)
        value, one = self._store.values[number], self.slices[number]
        with torch.no_grad():
            for place, part in zip(one.views(), one.parts(value.data), strict=True):
                place.copy_(part)
        self._written[number] = value._version

    def _expect_whole(self, number: int) -> None:
        """``fully_shard`` after attaching would train parameters of its own, in place of the slices."""
        own = self._store.registered(number) is self._store.values[number]
        if not own or is_sharded(self.slices[number].weight):
            raise UnsupportedModelError(
                f"model: expected whole parameters, got {self.slices[number].name} sharded (fully_shard, FSDP2) after "
                "the SelectiveTuner was attached: slices cannot be written into shards. Only slices have gradients "
                "and optimizer state, so each rank can hold the model: use DistributedDataParallel"
            )


class _Slices(nn.Module):
    """The compact slices as parameters of the model that leave no trace in its state dict."""

    def __init__(self, slices: Sequence[Slice], wide: torch.dtype) -> None:
        super().__init__()
        self._slices = slices
        with torch.no_grad():
            for one in slices:
                value = torch.cat(one.views(), one.dim).to(wide)
                self.register_parameter(one.name.replace(".", "/"), nn.Parameter(value))
        self.values, self._names = tuple(self.parameters()), tuple(self._parameters)

    def registered(self, number: int) -> nn.Parameter | None:
        """What stands for a slice in the model now: itself, unless somebody replaced it."""
        return self._parameters[self._names[number]]

    def state_dict(self, *args: Any, destination: Any = None, **_: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *_: Any) -> None:
        """Weights were loaded into the model: the slices follow them where they differ."""
        with torch.no_grad():
            for one, value in zip(self._slices, self.values, strict=True):
                found = torch.cat(one.views(), one.dim)
                if not torch.equal(found, value.to(found.dtype)):  # keeps the low bits of what was loaded unchanged
                    value.copy_(found)

    def __deepcopy__(self, _: Any) -> Any:
        raise InputError(
            "model: expected a model without an attached SelectiveTuner to copy; its forward is bound to the original: "
            "call tuner.detach() first"
        )
