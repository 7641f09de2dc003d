"""What a job would cost, from a config alone: the planner on a model whose weights have shapes but no data.

    capture = 2 (P_block n_layers - P_mlp) tokens     tokens of clean and corrupted; what a pair shares counts once
    replay  = 2 P_mlp rows prompts                    rows = sum over layers j: (n_heads + 1)(j + 1) + j
    literal = 2 P_block n_layers tokens prompts n_layers (n_heads + 1)      one forward pass per head and MLP

P are numbers of parameters, of a mixture of experts those that a token meets; FLOP of attention scores, norms and
activations are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.batch import make_batch
from pyarith.engine.planner import Forecast, Plan, Planner, free_bytes, stored_prefix
from pyarith.engine.replay import Replay
from pyarith.errors import InputError, MemoryBudgetError, UnsupportedModelError, check
from pyarith.models.families import FAMILIES
from pyarith.models.random_weights import NoDraws
from pyarith.models.sites import resolve, supported_families

_PLENTY = 2**60  # bytes: no limit to any block


@dataclass(frozen=True)
class JobShape:
    """Prompts of one length; clean and corrupted differ in one token, the middle one of those behind the prefix.

    Attributes:
        prompts: pairs.
        tokens: of a prompt, the prefix among them.
        prefix: tokens at the start that all prompts share.
    """

    prompts: int
    tokens: int
    prefix: int = 0

    def __post_init__(self) -> None:
        check(self.prompts >= 1, f"shape: expected at least one prompt, got prompts={self.prompts}")
        check(
            0 <= self.prefix and self.tokens - self.prefix >= 2,
            f"shape: expected at least two tokens behind the prefix, got tokens={self.tokens}, prefix={self.prefix}",
        )

    def inputs(self, d_vocab: int, seed: int = 0) -> dict[str, Tensor]:
        """Random ``clean``, ``corrupted`` and ``answers`` for ``fast_patch``."""
        generator = torch.Generator().manual_seed(seed)
        clean = torch.randint(d_vocab, (self.prompts, self.tokens), generator=generator)
        clean[:, : self.prefix] = clean[:1, : self.prefix]
        corrupted = clean.clone()
        middle = self.prefix + (self.tokens - self.prefix) // 2
        corrupted[:, middle] = (clean[:, middle] + 1) % d_vocab
        return {
            "clean": clean,
            "corrupted": corrupted,
            "answers": torch.randint(d_vocab, (self.prompts,), generator=generator),
        }


@dataclass(frozen=True)
class JobSize:
    """The cost of a job, all of it computed.

    Attributes:
        parameters, weight_bytes: of the model.
        plan: blocks.
        forecast: FLOP, bytes beyond the model, seconds at the rate that was given.
        literal_flop: of one forward pass per head and MLP.
        one_sweep: blocks with which the weights are read once, whatever the budget (at most 128 prompts a block).
        one_sweep_bytes: beyond the model, with those.
        sweeps: how often the weights are read with ``plan``.
    """

    parameters: int
    weight_bytes: int
    plan: Plan
    forecast: Forecast
    literal_flop: float
    one_sweep: Plan
    one_sweep_bytes: int
    sweeps: int

    @property
    def flop(self) -> float:
        return self.forecast.capture_flop + self.forecast.replay_flop

    def record(self) -> dict[str, Any]:
        """All figures as JSON holds them."""
        return {
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "plan": vars(self.plan),
            "forecast": self.forecast.record(),
            "literal_flop": self.literal_flop,
            "one_sweep": vars(self.one_sweep),
            "one_sweep_bytes": self.one_sweep_bytes,
            "sweeps": self.sweeps,
        }


def size_of_job(
    config: Any,
    shape: JobShape,
    dtype: torch.dtype,
    *,
    rate: float,
    memory_budget: int,
    device: str = "cpu",
) -> JobSize:
    """Size ``fast_patch`` of all heads and MLPs on a model that need not exist.

    Args:
        config: of transformers; its attention is taken to be sdpa where none is named.
        shape: of the prompts.
        dtype: of the weights.
        rate: FLOP per second of matrix products.
        memory_budget: bytes beyond the model.
        device: "cpu" or "cuda": whose blocks are planned; none need be here.
    Raises:
        UnsupportedModelError: the family is not described.
        MemoryBudgetError: the budget is too small for one prompt.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _without_data(config, dtype)
        sites = resolve(model)
        replay = Replay(sites, "auto", heads=True, mlps=True, frozen=False, log_probs=False)
    batch = make_batch(sites, **shape.inputs(sites.d_vocab))
    sites = replace(sites, device=torch.device(device))  # whose limits the planner takes; no tensor is made there
    planner = Planner(sites, replay, batch, stored_prefix(sites, batch), True)
    plan, widest = planner.plan(memory_budget), planner.plan(_PLENTY)
    parameters = list(model.parameters())
    forward = 2.0 * planner.params * shape.tokens * shape.prompts
    return JobSize(
        sum(p.numel() for p in parameters),
        sum(p.nbytes for p in parameters),
        plan,
        planner.forecast(plan, rate),
        forward * sites.n_layers * (sites.n_heads + 1),
        widest,
        planner.bytes(widest),
        -(-shape.prompts // plan.prompts),
    )


def expect_room(config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights that do not fit into what is free on ``device``.

    Raises:
        MemoryBudgetError: they do not; both sizes are named.
    """
    with torch.device("meta"):
        size = sum(p.nbytes for p in _without_data(config, dtype).parameters())
    free = free_bytes(device)
    check(
        size < free,
        f"MODEL: weights of {size / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')} do not fit into the "
        f"{free / 2**30:.1f} GiB that are free on {device}; --forecast-only computes the cost without them, --dtype "
        "bf16 makes them smaller",
        MemoryBudgetError,
    )


def _without_data(config: Any, dtype: torch.dtype) -> nn.Module:
    """A model whose tensors have what the mode or device around the call gives them."""
    from transformers import AutoModelForCausalLM

    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"config: expected one of the families {supported_families()}, got {config.model_type!r}"
        )
    with NoDraws():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    return model


def parse_rate(text: str) -> float:
    """FLOP per second from a text such as "780T", "1.5e14" or "120 GFLOP/s".

    Raises:
        InputError: anything else, or not positive.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([kMGTP]?)(?:FLOPS?|FLOP/s)?\s*", text)
    try:
        rate = float(match[1]) * 1000.0 ** " kMGTP".index(match[2] or " ") if match else 0.0
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise InputError(f"rate: expected FLOP per second such as 780T or 1.5e14, got {text!r}")
    return rate
