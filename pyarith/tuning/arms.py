"""The arms of a comparison: what each trains of a model, with the model given back bit for bit afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyarith.errors import NotAvailableError, check
from pyarith.models.sites import ModelSites, resolve
from pyarith.stats import random_heads, same_layer_heads
from pyarith.tuning.loop import Trainee
from pyarith.tuning.selective import SelectiveTuner
from pyarith.tuning.settings import TuneSettings
from pyarith.tuning.sft import objective
from pyarith.types import Head


@dataclass(frozen=True)
class Attached:
    """An arm attached to a model.

    Attributes:
        trainee: what the loop trains.
        n_parameters: trainable numbers.
        about: what was chosen, in words.
        finish: ends the training and makes the model an ordinary one that holds what was learnt.
    """

    trainee: Trainee
    n_parameters: int
    about: str
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Arm:
    """One way of training a model.

    Attributes:
        name: of the arm.
        attach: (model, settings, learning rate, seed) -> a context in which the model trains; at its end every
            parameter of the model is what it was, bit for bit.
    """

    name: str
    attach: Callable[[Any, TuneSettings, float, int], AbstractContextManager[Attached]]


def head_arm(name: str, choose: Callable[[int], Iterable[Head]], mlps: Iterable[int] = ()) -> Arm:
    """Heads (chosen anew by seed where ``choose`` does so) and MLPs, by a ``SelectiveTuner``."""
    layers = tuple(mlps)

    @contextmanager
    def attach(model: Any, settings: TuneSettings, rate: float, seed: int) -> Iterator[Attached]:
        with SelectiveTuner(model, sorted(choose(seed)), layers, kv=settings.kv) as tuner:
            before = tuner.state_dict()
            optimizer = tuner.optimizer(
                rate,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                stochastic_rounding=settings.stochastic_rounding,
                seed=seed,
            )
            trainee = Trainee(
                objective=objective(resolve(model)),
                parameters=tuple(tuner.parameters()),
                optimizer=optimizer,
                state=tuner.state_dict,
                load=tuner.load_state_dict,
                device=resolve(model).device,
            )
            about = " ".join(map(str, tuner.heads)) + (f" and MLPs {' '.join(map(str, layers))}" if layers else "")
            try:
                yield Attached(trainee, tuner.n_parameters, about.strip())
            finally:
                tuner.load_state_dict(before)

    return Arm(name, attach)


def random_control(sites: ModelSites, n: int) -> Callable[[int], list[Head]]:
    """``n`` heads of the whole model, others for every seed."""
    every = _every_head(sites)
    check(1 <= n <= len(every), f"n: expected 1 to {len(every)} heads, got {n}")
    return lambda seed: random_heads(n, every, np.random.default_rng([seed, 1]))


def same_layer_control(sites: ModelSites, heads: Sequence[Head]) -> Callable[[int], list[Head]]:
    """Other heads of the same layers, others for every seed."""
    every = _every_head(sites)
    return lambda seed: same_layer_heads(heads, every, np.random.default_rng([seed, 2]))


def _every_head(sites: ModelSites) -> list[Head]:
    return [Head(layer, head) for layer in range(sites.n_layers) for head in range(sites.n_heads)]


def mask_arm(name: str, n: int) -> Arm:
    """``n`` single entries of the blocks' weight matrices, drawn anew by seed: a random sparse mask.

    The whole gradient is computed and all but the chosen entries thrown away; optimizer state exists for those only.

    References: random sparse masks as a baseline: Xu and Zhang 2024, arXiv:2405.02596.
    """

    @contextmanager
    def attach(model: Any, settings: TuneSettings, rate: float, seed: int) -> Iterator[Attached]:
        sites = resolve(model)
        weights = [weight for one in sites.blocks for weight in one.block.parameters() if weight.ndim == 2]
        sizes = [weight.numel() for weight in weights]
        check(1 <= n <= sum(sizes), f"n: expected 1 to {sum(sizes)} entries, got {n}")
        rng = np.random.default_rng([seed, 3])
        shares = rng.multivariate_hypergeometric(sizes, n)
        masked = [
            _Masked(weight, torch.from_numpy(np.sort(rng.choice(size, share, replace=False))).to(sites.device))
            for weight, size, share in zip(weights, sizes, shares, strict=True)
            if share
        ]
        with _only(model, [one.weight for one in masked]):
            handles = [one.weight.register_post_accumulate_grad_hook(one.take) for one in masked]
            values = [one.value for one in masked]
            optimizer = torch.optim.AdamW(values, rate, weight_decay=settings.weight_decay)

            def write(*_: Any) -> None:
                for one in masked:
                    one.write()

            def load(state: Mapping[str, Tensor]) -> None:
                for number, one in enumerate(masked):
                    one.load(state[str(number)])

            optimizer.register_step_post_hook(write)
            trainee = Trainee(
                objective=objective(sites),
                parameters=tuple(values),
                optimizer=optimizer,
                state=lambda: {str(number): value for number, value in enumerate(values)},
                load=load,
                device=sites.device,
                max_grad_norm=settings.max_grad_norm,
            )
            try:
                yield Attached(trainee, n, f"{n} entries of {len(masked)} matrices")
            finally:
                for handle in handles:
                    handle.remove()
                for one in masked:
                    one.restore()

    return Arm(name, attach)


class _Masked:
    """Chosen entries of one weight as a compact parameter."""

    def __init__(self, weight: nn.Parameter, index: Tensor) -> None:
        self.weight, self.index = weight, index
        self.before = weight.detach().flatten()[index].clone()
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.value = nn.Parameter(self.before.to(wide, copy=True))

    def take(self, weight: Tensor) -> None:
        """Move the gradient of the chosen entries to the compact parameter, and drop the rest."""
        assert weight.grad is not None
        part = weight.grad.flatten()[self.index].to(self.value.dtype)
        self.value.grad = part if self.value.grad is None else self.value.grad + part
        weight.grad = None

    @torch.no_grad()
    def load(self, value: Tensor) -> None:
        self.value.copy_(value)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        self.weight.view(-1)[self.index] = self.value.to(self.weight.dtype)

    @torch.no_grad()
    def restore(self) -> None:
        self.weight.view(-1)[self.index] = self.before


def lora_arm(name: str, n: int, layers: Sequence[int] | None = None) -> Arm:
    """LoRA (peft) on q, k, v, o of all or some layers, of the rank whose size is nearest to ``n`` parameters.

    Raises:
        NotAvailableError: peft is not installed; at once, not after other arms have trained.
    References: Hu et al. 2021, arXiv:2106.09685; early layers: Yu and Ananiadou 2024, arXiv:2409.14144.
    """

    if find_spec("peft") is None:
        raise NotAvailableError(f"{name}: needs peft, which is not installed: pip install '.[tune]', or leave it out")

    @contextmanager
    def attach(model: Any, settings: TuneSettings, rate: float, seed: int) -> Iterator[Attached]:
        from peft import LoraConfig, get_peft_model

        sites = resolve(model)
        targets = _lora_targets(sites, range(sites.n_layers) if layers is None else layers)
        rank = max(1, round(n / sum(sum(weight.shape) for weight in targets.values())))
        before = {name: weight.detach().clone() for name, weight in targets.items()}
        with _only(model, []), torch.random.fork_rng([sites.device] if sites.device.type == "cuda" else []):
            torch.manual_seed(seed)
            adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
            wrapped = get_peft_model(model, adapter)
            trained = [value for value in wrapped.parameters() if value.requires_grad]
            size = sum(value.numel() for value in trained)

            def finish(merge: bool = True) -> None:
                if hasattr(model, "peft_config"):  # by which peft marks the model that it wraps
                    wrapped.merge_and_unload() if merge else wrapped.unload()
                    vars(model).pop("peft_config", None)

            try:
                optimizer = torch.optim.AdamW(trained, rate, weight_decay=settings.weight_decay)
                trainee = Trainee.of_model(wrapped, optimizer, settings.max_grad_norm)
                where = "all layers" if layers is None else f"layers {min(layers)}-{max(layers)}"
                yield Attached(trainee, size, f"rank {rank} on q, k, v, o of {where}", finish)
            finally:
                finish(merge=False)
                with torch.no_grad():
                    for name, value in before.items():
                        model.get_submodule(name).weight.copy_(value)

    return Arm(name, attach)


def full_arm(name: str) -> Arm:
    """Every parameter of the model."""

    @contextmanager
    def attach(model: Any, settings: TuneSettings, rate: float, seed: int) -> Iterator[Attached]:
        every = list(model.parameters())
        before = [value.detach().clone() for value in every]
        with _only(model, every):
            optimizer = torch.optim.AdamW(every, rate, weight_decay=settings.weight_decay)
            trainee = Trainee.of_model(model, optimizer, settings.max_grad_norm)
            try:
                yield Attached(trainee, sum(value.numel() for value in every), "every parameter")
            finally:
                with torch.no_grad():
                    for value, old in zip(every, before, strict=True):
                        value.copy_(old)

    return Arm(name, attach)


@contextmanager
def _only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone, as long as the block lasts; flags and gradients are put back."""
    chosen = {id(value) for value in trained}
    flags = [(value, value.requires_grad, value.grad) for value in model.parameters()]
    try:
        for value, _, _ in flags:
            value.requires_grad_(id(value) in chosen)
            value.grad = None
        yield
    finally:
        for value, flag, grad in flags:
            value.requires_grad_(flag)
            value.grad = grad


def _lora_targets(sites: ModelSites, layers: Iterable[int]) -> dict[str, Any]:
    """Full names of the projections of q, k, v and o -> weight."""
    names = {module: name for name, module in sites.model.named_modules()}
    modules: list[Any] = []
    for layer in layers:
        block = sites.blocks[layer]
        paths = dict.fromkeys(sites.qkv_rows(part, 0)[0] for part in "qkv")
        modules += [*map(block.block.get_submodule, paths), block.o_proj]
    return {names[module]: module.weight for module in modules}
