"""Models with PEFT adapters: the numbers are those of the merged model, the model is as before, and what is refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import inputs, make, prompts

import pyarith as pa
from pyarith.analysis import logit_attribution
from pyarith.engine import oracle
from pyarith.errors import UnsupportedModelError
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.sites import resolve
from pyarith.models.weights import head_outputs

peft = pytest.importorskip("peft", reason="peft is an optional dependency")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, about transformers

QUIET: dict[str, Any] = {"progress": False}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANSWERS = [11, 90, 3]


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Adapters as if trained: PEFT starts them at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_", "ia3_")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if "ia3_" in name else 0.4 * noise)


def adapted(config: Any, name: str = "llama-gqa2", dtype: torch.dtype = torch.float64) -> Any:
    wrapped = peft.get_peft_model(make(name, dtype), config)
    randomise(wrapped)
    return wrapped.eval()


def lora(targets: Any = tuple(EVERY), **more: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM", **more)


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload()


def given() -> dict[str, Any]:
    return inputs(prompts(), ANSWERS, "left")


def same(found: Any, expected: Any, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}  # norms and rotary embeddings are in fp32
    for name in ("clean_logits", "head_logits", "mlp_logits"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **tolerance)


def patched(model: Any, **options: Any) -> Any:
    return pa.fast_patch(model, **given(), **QUIET, **options)


@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2"])
def test_lora_everywhere_is_the_merged_model(name: str) -> None:
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else EVERY
    model = adapted(lora(targets, lora_bias=name == "gpt2", fan_in_fan_out=name == "gpt2", lora_dropout=0.2), name)
    expected = patched(merged(model))
    model.train()
    with unchanged(model):
        found = patched(model)
    same(found, expected)
    assert np.abs(found.head_changes - patched(make(name)).head_changes).max() > 0.1
    assert found.verification_error < 1e-5 and not found.settings["fused"]


def test_other_results_are_those_of_the_merged_model() -> None:
    model = adapted(lora())
    plain, data = merged(model), inputs(prompts(), ANSWERS, "right")
    ids, mask = data["clean"], data["attention_mask"]
    prompt = {"input_ids": ids, "attention_mask": mask, "answers": torch.tensor(ANSWERS)}
    for where in ("all", "end"):
        found, expected = (pa.ablation_sweep(each, **prompt, positions=where, **QUIET) for each in (model, plain))
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    means = [pa.MeanAblation.from_inputs(each, ids, mask) for each in (model, plain)]
    logits = []
    for each, mean in zip((model, plain), means, strict=True):
        with pa.ablated(each, [(0, 1), (2, 3)], mean, mlps=[1]), torch.no_grad():
            logits.append(each(ids, attention_mask=mask).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    both = [logit_attribution(each, ids, attention_mask=mask, answers=ANSWERS) for each in (model, plain)]
    for name in ("heads", "mlps", "attention_biases", "bias"):
        np.testing.assert_allclose(getattr(both[0], name), getattr(both[1], name), rtol=1e-5, atol=1e-5)


def test_16_bit_weights_with_fp32_adapters() -> None:
    """PEFT keeps adapters in fp32; what a head writes is W_O + B A in fp32 as well, not rounded to 16 bits."""
    model = adapted(lora(), dtype=torch.bfloat16)
    sites = resolve(model)
    projection: Any = sites.blocks[1].o_proj
    low = projection.lora_B["default"].weight @ projection.lora_A["default"].weight * 5 / 3
    expected = (projection.base_layer.weight.float() + low).t().unflatten(0, (sites.n_heads, sites.d_head))
    assert sites.dtype == torch.bfloat16 and low.dtype == torch.float32
    torch.testing.assert_close(head_outputs(sites, projection), expected)
    exact = patched(merged(copy.deepcopy(model).double())).head_changes
    ours, rounded = (np.abs(patched(each).head_changes - exact).mean() for each in (model, merged(model)))
    assert ours < 2 * rounded  # a sum of two products rounds once more than one product


def test_adapters_that_are_switched_added_and_merged() -> None:
    """The state that counts is the one at the time of the call, and a switch is seen by the self-check."""
    model = adapted(lora())
    model.add_adapter("second", lora(["o_proj", "down_proj"]))
    randomise(model, 7)
    states = set()
    for state in ("first", "second", "both", "none", "merged"):
        if state == "second":
            model.set_adapter("second")
        if state == "both":
            model.base_model.set_adapter(["default", "second"])
        expected = make("llama-gqa2") if state == "none" else merged(model)
        if state == "merged":
            model.merge_adapter()
        with model.disable_adapter() if state == "none" else nullcontext():
            same(patched(model), patched(expected))
            states.add((oracle._state(resolve(model)), model_fingerprint(resolve(model).model)))
    assert len({state for state, _ in states}) == 5 and len({fingerprint for _, fingerprint in states}) == 5
    model.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedModelError, match=r"switched off.*unmerge_adapter"):
        patched(model)


def test_loaded_without_a_wrapper_and_copies_of_whole_modules() -> None:
    inside = make("llama-gqa2")
    inside.add_adapter(lora(["o_proj", "up_proj"]))
    randomise(inside)
    wrapped = peft.get_peft_model(make("llama-gqa2"), lora(["o_proj", "up_proj"]))
    randomise(wrapped)
    same(patched(inside), patched(merged(wrapped)))
    saved = adapted(lora(["o_proj"], modules_to_save=["lm_head", "norm"]))
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(0.5)
    same(patched(saved), patched(merged(saved)))


def test_adapters_of_other_kinds() -> None:
    """What adds to weights can be read; what scales them may sit anywhere but on the output projection."""
    for config in (
        peft.LoHaConfig(r=2, target_modules=["o_proj", "q_proj"], task_type="CAUSAL_LM"),
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        lora(["q_proj", "down_proj"], use_dora=True),
    ):
        model = adapted(config)
        same(patched(model), patched(merged(model)))


def refusals() -> dict[str, tuple[Any, str]]:
    return {
        "dora": (lora(["o_proj"], use_dora=True), "self_attn.o_proj has adapter 'default' of kind DoraLinearVariant"),
        "ia3": (
            peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            "self_attn.o_proj has adapter 'default' of kind Linear",
        ),
        "prompt": (
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "PEFT adapter 'default' of kind PROMPT_TUNING",
        ),
        "activated": (lora(alora_invocation_tokens=[5, 6]), "of kind activated LoRA"),
        "unembedding": (lora(["lm_head"]), "expected lm_head to be a plain nn.Linear"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refused(case: str) -> None:
    config, message = refusals()[case]
    model = adapted(config)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        patched(model)


def test_weights_below_adapters_are_not_trained(tmp_path: Any) -> None:
    base = make("llama-gqa2")
    with pa.SelectiveTuner(base, [(0, 1)]) as tuner:
        tuner.save_delta(tmp_path / "delta")
    model = adapted(lora())
    with unchanged(model):
        with pytest.raises(UnsupportedModelError, match=r"SelectiveTuner changes weights.*merge_and_unload"):
            pa.SelectiveTuner(model, [(0, 1)])
        with pytest.raises(UnsupportedModelError, match=r"a delta changes weights.*merge_and_unload"):
            pa.load_delta(model, tmp_path / "delta")


def test_discover_takes_a_wrapped_model() -> None:
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, "+", n=4)
    wrapped = peft.get_peft_model(model, lora(["o_proj"]))
    randomise(wrapped)
    found, expected = (pa.discover(each, pairs, **QUIET) for each in (wrapped, merged(wrapped)))
    np.testing.assert_allclose(found.result.head_logits, expected.result.head_logits, rtol=1e-4, atol=1e-3)
