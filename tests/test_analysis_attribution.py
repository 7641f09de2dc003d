"""Direct logit attribution against every part written out as a vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import planted
import pytest
import torch
from literal_oracle import PATHS
from plain_runs import ANSWERS, EXACT, SIDES, Run, capped, final_norm, given, logit_scale, plain_run, rows, runs
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, make
from true_fp64 import true_fp64

from pyarith.analysis import logit_attribution, logit_lens
from pyarith.errors import SelfCheckError, UnsupportedModelError


def by_hand(model: Any, run: Run, answer: int) -> dict[str, torch.Tensor]:
    """Every part written out as a vector and sent through the frozen norm, nothing folded."""
    kind, config = model.config.model_type, model.config
    norm, head = final_norm(model), model.get_output_embeddings()
    layer_norm = "LayerNorm" in type(norm).__name__
    one_plus, m = kind in ("gemma2", "gemma3_text"), getattr(config, "residual_multiplier", 1.0)
    weight = 1 + norm.weight if one_plus else norm.weight
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    last = run.post[-1]
    centred = last - last.mean() if layer_norm else last
    scale = 1 / torch.sqrt((centred**2).mean() + eps)

    def read(part: torch.Tensor) -> torch.Tensor:
        part = part - part.mean(-1, keepdim=True) if layer_norm else part
        return (part * scale * weight) @ head.weight[answer] * logit_scale(model)

    path, out, _ = PATHS[kind]
    heads, biases = [], []
    for layer, block in enumerate(model.get_submodule(path)):
        projection = block.get_submodule(out)

        def write(z: torch.Tensor, projection: Any = projection) -> torch.Tensor:
            return projection(z) - projection(torch.zeros_like(z))

        def post(x: torch.Tensor, block: Any = block, layer: int = layer) -> torch.Tensor:
            if not hasattr(block, "post_feedforward_layernorm"):
                return m * x
            own, whole = block.post_attention_layernorm, run.attention[layer]
            eps = getattr(own, "variance_epsilon", None) or own.eps
            return x * (own.weight + one_plus) / torch.sqrt((whole**2).mean() + eps)

        parts = run.z[layer].reshape(config.num_attention_heads, -1)
        single = torch.stack([torch.zeros_like(parts) for _ in parts])
        for h in range(len(parts)):
            single[h, h] = parts[h]
        heads.append(read(post(write(single.flatten(1)))))
        biases.append(read(post(projection(torch.zeros_like(run.z[layer])))))
    bias = last.new_zeros(()) if head.bias is None else head.bias[answer]
    if getattr(norm, "bias", None) is not None:
        bias = bias + norm.bias @ head.weight[answer]
    return {
        "heads": torch.stack(heads),
        "attention_biases": torch.stack(biases),
        "mlps": read(run.mlp),
        "embedding": read(run.pre[0]),
        "bias": bias * logit_scale(model),
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_attribution(name: str, side: str) -> None:
    model = make(name)
    with true_fp64(), unchanged(model):
        result = logit_attribution(model, **given(side))
    for b, run in enumerate(runs(name, side)):
        answer = int(ANSWERS[b])
        with torch.no_grad():
            expected = by_hand(model, run, answer)
        for part, values in expected.items():
            np.testing.assert_allclose(getattr(result, part)[..., b], values.numpy(), err_msg=part, **EXACT)
        uncapped = torch.tensor(result.total[b])
        np.testing.assert_allclose(capped(model, uncapped), run.logits[answer].numpy(), **EXACT)
        np.testing.assert_allclose(result.logits[b], result.total[b], **EXACT)
    assert result.error < 1e-11 and result.heads.dtype == np.float64 and "not path patching" in result.semantics


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-head-dim": ("llama", {"head_dim": 12, "attention_bias": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gemma2-no-caps": ("gemma2", {"final_logit_softcapping": None}),
    "gemma2-bias": ("gemma2", {"attention_bias": True}),
    "neox-no-bias": ("neox", {"attention_bias": False}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_attribution_under_config_options(option: str) -> None:
    name, settings = OPTIONS[option]
    model = make(name, **settings)
    with true_fp64():
        result = logit_attribution(model, **given("left"))
        run = plain_run(model, rows("left")[2])
    with torch.no_grad():
        expected = by_hand(model, run, int(ANSWERS[2]))
    for part, values in expected.items():
        np.testing.assert_allclose(getattr(result, part)[..., 2], values.numpy(), err_msg=part, **EXACT)


def test_attribution_of_voters() -> None:
    """Head h of layer l writes w[l, h] times the answer's direction: its part is w / rms of the final stream."""
    problems = [(a, b) for a in range(5) for b in range(2)]
    with true_fp64():
        result = logit_attribution(
            planted.voters(),
            torch.tensor([planted.problem(*p) for p in problems]),
            answers=[planted.SUM0 + a for a, _ in problems],
        )
    total = planted.WEIGHTS.sum()
    expected = (planted.WEIGHTS * (planted.D_MODEL / (1 + total**2)) ** 0.5).numpy()
    np.testing.assert_allclose(result.heads, np.repeat(expected[..., None], 10, -1), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(result.logits, planted.voters_logit(torch.zeros(())).item(), rtol=1e-12)
    for part in (result.mlps, result.embedding, result.bias, result.attention_biases):
        np.testing.assert_allclose(part, 0, atol=1e-14)
    table = {(row["kind"], row["layer"], row["head"]): row["logit"] for row in result.rows()}
    assert table["head", 0, 2] == pytest.approx(expected[0, 2]) and table["mlp", 1, -1] == pytest.approx(0)
    assert ("embedding", -1, -1) in table and len(table) == 6 + 2 + 2 + 2


def test_movers_have_no_direct_part() -> None:
    """What path patching calls the key heads of the adder acts through MLP 3: here they are 0 and the MLP is all."""
    with true_fp64():
        result = logit_attribution(planted.adder(), torch.tensor([planted.problem(1, 2)]), answers=[planted.SUM0 + 3])
    np.testing.assert_allclose(result.heads, 0, atol=1e-12)
    np.testing.assert_allclose(result.mlps[:, 0], [0, 0, 0, planted.LOGIT], atol=1e-10)


def test_attribution_refuses_what_it_cannot_freeze() -> None:
    for name, module in (("llama", "model.norm"), ("gemma2", "model.layers.1.post_attention_layernorm")):
        model = make(name)
        model.get_submodule(module).register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match="direct logit attribution is refused"):
            logit_attribution(model, **given("left"))
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        logit_attribution(model, **given("left"))
    model = make("llama")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="o_proj"):
        logit_attribution(model, **given("left"))


def test_something_else_that_writes_is_found() -> None:
    model = make("llama")
    model.model.layers[1].register_forward_hook(lambda _, __, y: y + 0.5)
    with unchanged(model), pytest.raises(SelfCheckError, match="Something else writes"):
        logit_attribution(model, **given("left"))
    # the lens only reads: the same model is fine
    assert logit_lens(model, **given("left")).tokens.shape[0] == 3
