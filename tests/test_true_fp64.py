"""The oracle's own ground: models really are fp64, and its runs do what they say."""

from __future__ import annotations

from typing import Any

import literal_oracle
import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from true_fp64 import true_fp64


class Narrow(TorchDispatchMode):
    """Names every operation that gives a floating tensor narrower than fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.dtype != torch.float64:
            self.ops.append(str(func))
        return out


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_no_fp32(name: str) -> None:
    model = tiny_models.make(name)
    with true_fp64(), Narrow() as seen:
        literal_oracle.forward(model, [5, 8, 13, 21, 34])
    assert seen.ops == []


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_tiny_steps_are_linear(name: str) -> None:
    """A step of 1e-12 moves the logits by what a step of 1e-6 predicts; fp32 casts would swallow it."""
    model = tiny_models.make(name)
    weight = model.get_input_embeddings().weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = weight.detach().clone()

    def moved(step: float) -> torch.Tensor:
        with torch.no_grad():
            weight.copy_(start + step * direction)
        return literal_oracle.forward(model, [5, 8, 13, 21, 34]).logits

    with true_fp64():
        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        small = (moved(1e-12) - moved(-1e-12)) / 2e-12
    # logits of about 5 keep 1e-15 absolute, so a slope over 2e-12 keeps about 1e-2 absolute
    assert (small - slope).abs().max() < 0.02 * slope.abs().max()


def test_seen_failing_without_the_helper() -> None:
    model = tiny_models.make("llama")
    with Narrow() as seen:
        literal_oracle.forward(model, [5, 8, 13, 21, 34])
    assert seen.ops


def test_only_transformers_is_changed() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with true_fp64():
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_padding_needs_position_ids_only(name: str) -> None:
    """The unpadded runs of the oracle are what a padded batch of the model gives."""
    model, pairs = tiny_models.make(name), tiny_models.prompts()
    with true_fp64(), torch.no_grad():
        alone = [literal_oracle.forward(model, pair.clean).logits for pair in pairs]
        for side in ("left", "right"):
            ids, mask = tiny_models.pad([pair.clean for pair in pairs], side)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            for row, real, expected in zip(logits, mask, alone, strict=True):
                torch.testing.assert_close(row[real.nonzero().max()], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_oracle_by_hand(name: str) -> None:
    """One sender of the last layer, recomputed from the weights: resid + dz @ W_O, MLP, norm, unembedding."""
    model, (pair, *_) = tiny_models.make(name), tiny_models.prompts()
    serial = name == "llama"
    layers = model.model.layers if serial else model.gpt_neox.layers
    attention = layers[-1].self_attn if serial else layers[-1].attention
    out = attention.o_proj if serial else attention.dense
    final = model.model.norm if serial else model.gpt_neox.final_layer_norm
    head = model.get_output_embeddings()
    seen: dict[str, torch.Tensor] = {}
    hook = layers[-1].register_forward_pre_hook(lambda _m, args: seen.update(resid=args[0]))
    with true_fp64(), torch.no_grad():
        corrupted = literal_oracle.forward(model, pair.corrupted)
        clean = literal_oracle.forward(model, pair.clean)  # last, so that ``seen`` is the clean residual
        hook.remove()
        z = clean.z[-1].clone()
        z[..., 8:16] = corrupted.z[-1][..., 8:16]  # head 1, d_head 8
        mid = seen["resid"] + out(z)
        norm = layers[-1].post_attention_layernorm
        row = mid + layers[-1].mlp(norm(mid if serial else seen["resid"]))
        expected = head(final(row))[0, -1]
        got = literal_oracle.patch_head(model, pair.clean, clean, corrupted, 2, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert np.abs((got - clean.logits).numpy()).max() > 1e-2
