"""AdamW over the slices of a ``SelectiveTuner``, one fused pass that also writes the new values into the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pyarith import ops
from pyarith.errors import check

if TYPE_CHECKING:
    from pyarith.tuning.selective import SelectiveTuner


class SliceAdamW(torch.optim.Optimizer):
    """AdamW on compact slices (``ops.masked_adamw``): moments in the slices' dtype, new values written back at once.

        g = gradient * grad_scale * min(1, max_grad_norm / (|gradient * grad_scale| + 1e-6))
        p = p (1 - lr weight_decay);  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        p = p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        tuner: whose slices.
        lr: learning rate; schedulers change it.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; the decay acts on the slices only.
        grad_scale: a factor on every gradient. The paper uses n_heads of the model / chosen heads; under Adam such a
            factor matters only beside ``eps`` and clipping.
        max_grad_norm: clip the norm over all slices, without waiting for the device; None does not.
        stochastic_rounding: round into bf16 weights at random, right on average, in place of to nearest.
        seed: of that rounding.
        backend: of the op.
    Attributes:
        grad_norm: norm of the last step's scaled gradients before clipping, a tensor; None without ``max_grad_norm``.
    Raises:
        InputError: a negative rate or decay, betas outside [0, 1), a scale or norm that is not positive.
        BackendError: from ``step``: the backend asked for cannot run.
    References: Loshchilov and Hutter 2019, arXiv:1711.05101; Zhang et al. 2024, arXiv:2409.01659, sec. 5.
    """

    writes_slices = True  # the tuner need not write after a step

    def __init__(
        self,
        tuner: SelectiveTuner,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        grad_scale: float = 1.0,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check(value >= 0, f"{name}: expected a number >= 0, got {value}")
        check(all(0 <= beta < 1 for beta in betas), f"betas: expected two numbers in [0, 1), got {betas}")
        for name, scale in (("grad_scale", grad_scale), ("max_grad_norm", max_grad_norm)):
            check(scale is None or scale > 0, f"{name}: expected a positive number, got {scale}")
        self._tuner = tuner
        self._numbers = {value: number for number, value in enumerate(tuner.parameters())}
        self.grad_norm: Tensor | None = None
        self._grad_scale, self._max_norm, self._backend = grad_scale, max_grad_norm, backend
        self._seed = seed if stochastic_rounding else None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(tuner.parameters()), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every slice that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._tuner.sync_changed()  # what was set by hand goes into the weights of slices without a gradient too
        scale = self._scale()
        for group in self.param_groups:
            by_step: dict[int, list[Any]] = {}
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(value), exp_avg_sq=torch.zeros_like(value))
                state["step"] = int(state["step"]) + 1
                by_step.setdefault(state["step"], []).append(value)
            for step, values in by_step.items():
                self._update(group, step, values, scale)
        self._tuner.mark_written()
        return loss

    def _scale(self) -> Tensor | None:
        """The factor on all gradients, on their device, so that nothing waits for it."""
        self.grad_norm = None
        grads = [value.grad for value in self._numbers if value.grad is not None]
        if not grads or (self._grad_scale == 1.0 and self._max_norm is None):
            return None
        scale = torch.full((1,), self._grad_scale, device=grads[0].device)
        if self._max_norm is not None:
            self.grad_norm = get_total_norm(grads).to(scale.dtype) * self._grad_scale
            scale = scale * (self._max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return scale

    def _update(self, group: dict[str, Any], step: int, values: list[Any], scale: Tensor | None) -> None:
        slices = [self._tuner.slices[self._numbers[value]] for value in values]
        ops.masked_adamw(
            values,
            [value.grad for value in values],
            [self.state[value]["exp_avg"] for value in values],
            [self.state[value]["exp_avg_sq"] for value in values],
            [one.weight for one in slices],
            [one.ranges for one in slices],
            [one.dim for one in slices],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            grad_scale=scale,
            seed=self._seed,
            backend=self._backend,
        )
