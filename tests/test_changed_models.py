"""Models that someone has changed: the change counts, or the model is refused - never a silent wrong answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import literal_oracle
import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from tiny_models import inputs, make, prompts
from torch import nn
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.errors import SelfCheckError, UnsupportedModelError

PAIRS = prompts((7, 5, 6))
Change = Callable[[nn.Module], None]


def other(x: torch.Tensor) -> torch.Tensor:
    """A change that no norm undoes."""
    return x * 1.25 + torch.linspace(-0.5, 0.5, x.shape[-1], dtype=x.dtype)


def hook(path: str) -> Change:
    """A user's hook that makes a module's output something else."""

    def change(model: nn.Module) -> None:
        def scale(_module: nn.Module, _args: Any, output: Any) -> Any:
            return other(output) if isinstance(output, torch.Tensor) else (other(output[0]), *output[1:])

        model.get_submodule(path).register_forward_hook(scale)

    return change


def pre_hook(path: str) -> Change:
    """A user's hook on a module's input."""

    def change(model: nn.Module) -> None:
        def scale(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (other(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": other(kwargs["hidden_states"])}

        model.get_submodule(path).register_forward_pre_hook(scale, with_kwargs=True)

    return change


def forward_of_instance(path: str) -> Change:
    """A ``forward`` put on one module, as device dispatchers and some patches do."""

    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        old = module.forward
        module.forward = lambda *args, **kwargs: other(old(*args, **kwargs))

    return change


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.25


def parametrised(path: str) -> Change:
    def change(model: nn.Module) -> None:
        nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())

    return change


class LowRank(nn.Module):
    """A LoRA layer as written by hand: wraps the linear, has ``weight`` and ``bias`` of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(7)
        sizes = (2, base.in_features), (base.out_features, 2)
        self.a, self.b = (nn.Parameter(0.2 * torch.randn(s, generator=generator).double()) for s in sizes)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def wrapped(path: str) -> Change:
    def change(model: nn.Module) -> None:
        model.set_submodule(path, LowRank(model.get_submodule(path)))

    return change


class Subclass(nn.Linear):
    """A linear of another class with another forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.25


def subclassed(path: str) -> Change:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).__class__ = Subclass

    return change


class Mixture(nn.Module):
    """Two small experts, each token routed to one of them: an MLP of no known pattern."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.router = nn.Parameter(torch.randn(d_model, 2, generator=generator).double())
        self.experts = nn.Parameter(0.3 * torch.randn(2, d_model, d_model, generator=generator).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x @ self.router).argmax(-1)
        return torch.einsum("...i,...io->...o", x, self.experts[chosen]).tanh()


def mixture(model: nn.Module) -> None:
    model.model.layers[1].mlp = Mixture(32)


def unembed_bias(model: nn.Module) -> None:
    model.lm_head = nn.Linear(32, 97, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))


def activation(model: nn.Module) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def norm_epsilon(model: nn.Module) -> None:
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 0.5
    model.model.norm.variance_epsilon = 0.3


def norm_class(model: nn.Module) -> None:
    norm = nn.LayerNorm(32, dtype=torch.float64)
    model.model.layers[1].post_attention_layernorm = norm
    with torch.no_grad():
        norm.weight.mul_(2)


def no_mlp(model: nn.Module) -> None:
    model.model.layers[1].mlp.forward = lambda x: x * 0


def multi_head_bias(model: nn.Module) -> None:
    out = model.model.layers[1].self_attn.o_proj
    out.bias = nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64))


LAYER = "model.layers.1"
CHANGES: dict[str, Change] = {
    **{f"hook:{path}": hook(f"{LAYER}.{path}") for path in (
        "mlp", "mlp.act_fn", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj",
        "self_attn", "post_attention_layernorm", "input_layernorm")},
    "hook:block": hook(LAYER),
    "hook:first-block": hook("model.layers.0"),
    "hook:last-block": hook("model.layers.2"),
    "hook:final-norm": hook("model.norm"),
    "hook:lm_head": hook("lm_head"),
    "hook:embed": hook("model.embed_tokens"),
    "pre:mlp": pre_hook(f"{LAYER}.mlp"),
    "pre:o_proj": pre_hook(f"{LAYER}.self_attn.o_proj"),
    "pre:mlp-norm": pre_hook(f"{LAYER}.post_attention_layernorm"),
    "pre:block": pre_hook(LAYER),
    "pre:final-norm": pre_hook("model.norm"),
    "pre:lm_head": pre_hook("lm_head"),
    "forward:mlp": forward_of_instance(f"{LAYER}.mlp"),
    "forward:down_proj": forward_of_instance(f"{LAYER}.mlp.down_proj"),
    "forward:act": forward_of_instance(f"{LAYER}.mlp.act_fn"),
    "forward:o_proj": forward_of_instance(f"{LAYER}.self_attn.o_proj"),
    "forward:norm": forward_of_instance(f"{LAYER}.post_attention_layernorm"),
    "forward:final-norm": forward_of_instance("model.norm"),
    "forward:lm_head": forward_of_instance("lm_head"),
    "param:down_proj": parametrised(f"{LAYER}.mlp.down_proj"),
    "param:o_proj": parametrised(f"{LAYER}.self_attn.o_proj"),
    "param:norm": parametrised(f"{LAYER}.post_attention_layernorm"),
    "param:lm_head": parametrised("lm_head"),
    "lora:down_proj": wrapped(f"{LAYER}.mlp.down_proj"),
    "lora:gate_proj": wrapped(f"{LAYER}.mlp.gate_proj"),
    "lora:o_proj": wrapped(f"{LAYER}.self_attn.o_proj"),
    "lora:q_proj": wrapped(f"{LAYER}.self_attn.q_proj"),
    "lora:lm_head": wrapped("lm_head"),
    "class:up_proj": subclassed(f"{LAYER}.mlp.up_proj"),
    "class:o_proj": subclassed(f"{LAYER}.self_attn.o_proj"),
    "class:lm_head": subclassed("lm_head"),
    "mixture": mixture,
    "no-mlp": no_mlp,
    "unembed-bias": unembed_bias,
    "activation": activation,
    "epsilon": norm_epsilon,
    "norm-class": norm_class,
    "o_proj-bias": multi_head_bias,
}  # fmt: skip
# What the engine goes around on purpose (it calls the decoder, never the head) may be refused instead.
REFUSED = (UnsupportedModelError, SelfCheckError)


@pytest.mark.parametrize("name", CHANGES)
def test_change_counts_or_is_refused(name: str) -> None:
    model = make("llama")
    with true_fp64():
        before = literal_oracle.forward(model, PAIRS[0].clean).logits
        # a run before the change: nothing that it learned about the model may outlive the change
        pa.fast_patch(model, **inputs(PAIRS, [1, 2, 3], "left"), progress=False, verify=0)
        CHANGES[name](model)
        expected = literal_oracle.path_patch(model, PAIRS)
        assert np.abs(expected.clean[0] - before.numpy()).max() > 1e-3  # the change is one
        given = inputs(PAIRS, expected.answers, "left")
        try:
            result = pa.fast_patch(model, **given, progress=False, verify=0)
        except REFUSED as error:
            assert "model" in str(error) or "layer" in str(error)
            return
    heads, mlps, clean, _ = expected.at(expected.answers)
    np.testing.assert_allclose(result.clean_logits, clean, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(result.head_logits, heads, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(result.mlp_logits, mlps, rtol=1e-11, atol=1e-11)


# These must work, not only be noticed: hooks, adapters and other MLPs go through the model's own modules.
MUST_WORK = [
    "hook:mlp", "hook:mlp.act_fn", "hook:mlp.down_proj", "hook:self_attn.q_proj", "hook:post_attention_layernorm",
    "forward:mlp", "forward:norm", "param:down_proj", "param:norm", "lora:down_proj", "lora:gate_proj", "lora:q_proj",
    "class:up_proj", "mixture", "no-mlp", "activation", "epsilon", "norm-class", "o_proj-bias", "hook:embed",
]  # fmt: skip


@pytest.mark.parametrize("name", MUST_WORK)
def test_is_not_refused(name: str) -> None:
    model = make("llama")
    CHANGES[name](model)
    with true_fp64():
        result = pa.fast_patch(model, **inputs(PAIRS, [1, 2, 3], "left"), progress=False)
    assert result.verification_error < 1e-11


def test_hook_on_every_module() -> None:
    """torch's global hooks are hooks too."""
    model = make("llama")

    def scale(module: nn.Module, _args: Any, output: Any) -> Any:
        return other(output) if isinstance(module, type(model.model.layers[0].mlp)) else None

    handle = nn.modules.module.register_module_forward_hook(scale)
    try:
        with true_fp64():
            expected = literal_oracle.path_patch(model, PAIRS)
            try:
                result = pa.fast_patch(model, **inputs(PAIRS, expected.answers, "left"), progress=False, verify=0)
            except REFUSED:
                return
    finally:
        handle.remove()
    np.testing.assert_allclose(result.head_logits, expected.at(expected.answers)[0], rtol=1e-11, atol=1e-11)


SHARED = [
    ("llama", "mlp"), ("llama", "mlp.down_proj"), ("llama", "self_attn.o_proj"), ("llama", "self_attn"),
    ("llama", "post_attention_layernorm"), ("llama", "input_layernorm"), ("gemma2", "post_attention_layernorm"),
    ("gemma2", "pre_feedforward_layernorm"), ("gemma2", "post_feedforward_layernorm"), ("gemma2", "mlp"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "path"), SHARED, ids=lambda value: value)
def test_module_used_by_two_layers(family: str, path: str) -> None:
    """A hook on a shared module fires in both layers: right, or refused with the reason."""
    shared, apart = make(family), make(family)
    for model, twin in ((shared, lambda module: module), (apart, copy.deepcopy)):
        layers = model.model.layers
        layers[2].set_submodule(path, twin(layers[1].get_submodule(path)))
    with true_fp64():
        expected = literal_oracle.path_patch(apart, PAIRS)
        try:
            result = pa.fast_patch(shared, **inputs(PAIRS, expected.answers, "left"), progress=False, verify=0)
        except REFUSED as error:
            assert "layer" in str(error)
            return
    heads, mlps, *_ = expected.at(expected.answers)
    np.testing.assert_allclose(result.head_logits, heads, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(result.mlp_logits, mlps, rtol=1e-11, atol=1e-11)
