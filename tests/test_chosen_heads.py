"""A run of some heads of each layer: the numbers of the full run, NaN for the others."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from test_engine import pairs

from pyarith.discovery.patching import patch

FIXED = {"progress": False, "verify": 0}


def choice(n_layers: int, n_heads: int) -> tuple[tuple[int, ...], ...]:
    """No head of layer 0, all of layer 1, in turn every other one or none of the rest."""
    rest = [tuple(range(1, n_heads, 2)) if layer % 2 == 0 else () for layer in range(2, n_layers)]
    return ((), tuple(range(n_heads)), *rest)


# serial, norm after attention and softcap, parallel, learned positions with biases
@pytest.mark.parametrize("family", ["llama-gqa2", "gemma2", "neox", "gpt2"])
@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("senders", [("heads",), ("heads", "mlps")], ids=["heads", "both"])
def test_as_in_the_full_run(family: str, mlps: str, senders: tuple[str, ...]) -> None:
    model = tiny_models.make(family)
    batch = {**pairs(3, 7), "foils": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    options = {"senders": senders, "mlps": mlps, "log_probs": True, **FIXED}
    whole = patch(model, [batch], **options)
    n_layers, n_heads = whole.head_logits.shape[:2]
    chosen = choice(n_layers, n_heads)
    part = patch(model, [batch], chosen=chosen, **options)
    run = np.array([[head in heads for head in range(n_heads)] for heads in chosen])
    # without heads an MLP's rows start from the model's own residual, not from one recomposed behind an fp32 norm
    close = 1e-6 if family == "gemma2" else 1e-12
    for name, value in whole._arrays().items():
        found = getattr(part, name)
        if name == "noise_floor":
            layers = run.any(1)
            np.testing.assert_allclose(found[layers], value[layers], atol=close)
            assert "mlps" in senders or not found[~layers].any()
            continue
        kept = run if name.startswith("head_") else run.any(1) if name.startswith("identity_") else ...
        np.testing.assert_allclose(found[kept], value[kept], rtol=close, atol=close, err_msg=name)
        if kept is not ...:
            assert np.isnan(found[~kept]).all(), name
    assert part.settings["rows"] < whole.settings["rows"]


def test_rows_are_counted() -> None:
    """A head of layer l and its identity row pass the MLPs l, l + 1, ...; heads of no other layer cost anything."""
    batch = pairs(5, 7)
    model = tiny_models.make("llama")
    whole = patch(model, [batch], senders=("heads",), **FIXED)
    n_layers, n_heads = whole.head_logits.shape[:2]
    assert whole.settings["rows"] == 5 * (n_heads + 1) * n_layers * (n_layers + 1) // 2
    chosen = ((),) * (n_layers - 1) + ((0, 2),)
    assert patch(model, [batch], senders=("heads",), chosen=chosen, **FIXED).settings["rows"] == 5 * 3
    frozen = patch(model, [batch], mlps="frozen", **FIXED)
    assert frozen.settings["rows"] == 5 * n_layers * (n_heads + 2)
