"""knockout_curve: hand-made rankings on the planted model and the demo, controls by their definition, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyarith as pa
from pyarith.discovery.knockout import _sets
from pyarith.errors import InputError, InputTypeError
from pyarith.types import Head

ORDER = tuple(Head(layer, head) for layer in (2, 3, 1, 0) for head in (1, 0, 3, 2))


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, "+", corruption="operator", n=16, seed=0)
    return model, pairs, pa.fast_patch(model, **pairs.inputs(), verify=0)


@pytest.fixture(scope="module")
def curve(demo):
    model, pairs, result = demo
    return pa.knockout_curve(model, pairs, result, ks=[1, 4, 48], draws=3, verify=0)


def test_each_point_equals_the_models_own_forward_under_the_ablation(demo, curve):
    model, pairs, _ = demo
    inputs = pairs.inputs()
    baseline = pa.MeanAblation.from_inputs(model, inputs["clean"], inputs["attention_mask"])
    end = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for name in ("key", "random", "same_layer", "bottom", "kept"):
        arm = curve.arms[name]
        one = arm.heads[-1][1]
        with torch.no_grad(), pa.ablated(model, one.heads, baseline):
            logits = model(inputs["clean"], attention_mask=inputs["attention_mask"], position_ids=positions).logits
        logits = logits[torch.arange(len(end)), end]
        assert arm.accuracy[-1, 1] == pytest.approx((logits.argmax(-1) == inputs["answers"]).double().mean().item())
        assert arm.logit[-1, 1] == pytest.approx(
            logits.gather(1, inputs["answers"][:, None]).double().mean().item(), abs=1e-4
        )


def test_what_the_curve_says_of_the_demo(curve, demo):
    _, pairs, result = demo
    assert curve.n_prompts + curve.n_wrong == len(pairs)
    assert curve.ranking[0] == result.top(1)[0].head
    key, random = curve.arms["key"].accuracy[0], curve.arms["random"].accuracy
    assert random.shape == (3, 3) and curve.arms["key"].accuracy.shape == (1, 3)
    assert key[1] < random[:, 1].mean()  # four key heads against four random ones, which may hit a key head, too
    assert curve.arms["kept"].accuracy[0, 2] == 1.0  # all heads kept: the intact model on prompts it gets right
    assert key[2] == curve.all_ablated[0] == random[0, 2]
    assert curve.relative_drop()[1] == key[1] - 1
    faith = curve.faithfulness()
    assert faith[-1] == pytest.approx(1)
    areas = curve.areas()
    assert areas.span == (0.0, 1.0) and areas.cpr + areas.cmd == pytest.approx(1, abs=0.3)
    assert len(curve.rows()) == 5 * 3 and "same_layer" in repr(curve)


def test_the_same_seed_gives_the_same_curve(demo, curve):
    model, pairs, result = demo
    again = pa.knockout_curve(model, pairs, result, ks=[1, 4, 48], draws=3, verify=0)
    assert again.rows() == curve.rows()
    other = pa.knockout_curve(
        model, pairs, result, ks=[1, 4], draws=3, verify=0, seed=1, controls=["random"], keep=False
    )
    assert set(other.arms) == {"key", "random"}
    assert other.arms["random"].heads != curve.arms["random"].heads


def test_controls_are_what_they_are_called():
    sets = _sets(ORDER, np.array([1, 5, 16]), ("random", "same_layer", "bottom"), 50, True, np.random.default_rng(0))
    assert sets["key"][0][1].heads == tuple(sorted(ORDER[:5]))
    assert sets["bottom"][0][1].heads == tuple(sorted(ORDER[-5:]))
    assert sets["kept"][0][1].heads == tuple(sorted(ORDER[5:])) and not any(sets["kept"][0][2])
    for draw in sets["random"]:
        assert [len(s.heads) for s in draw] == [1, 5, 16] and set(draw[0].heads) <= set(draw[1].heads)
    firsts = {draw[0].heads[0] for draw in sets["random"]}
    assert len(firsts) > 8  # of 16 heads in 50 draws
    for draw in sets["same_layer"]:
        assert [h.layer for h in draw[0].heads] == [2] and draw[0].heads[0] != ORDER[0]
        # five key heads: the four of layer 2, where nothing else is left, and 3.1
        assert [h.layer for h in draw[1].heads] == [2, 2, 2, 2, 3] and draw[1].heads[4] != ORDER[4]


@pytest.mark.parametrize(
    "changed, error, words",
    (
        (dict(pairs="prompts"), InputTypeError, "pairs: expected PromptPairs, got str"),
        (dict(ks=[0, 1]), InputError, "ks: expected rising whole numbers >= 1"),
        (dict(ks=[2, 1]), InputError, "ks: expected rising whole numbers >= 1"),
        (dict(ks=[49]), InputError, "ks: expected at most the 48 heads of the model, got 49"),
        (dict(controls=["best"]), InputError, "controls: expected some of"),
        (dict(draws=0), InputError, "draws: expected a whole number >= 1, got 0"),
        (dict(ranking=[(0, 0), (0, 1)]), InputError, "ranking: expected all 48 heads, each once"),
        (dict(ranking=[(0, h) for h in range(48)]), InputError, "ranking: expected heads of 6 layers of 8, got 0.8, "),
    ),
    ids=lambda value: "",
)
def test_bad_input(demo, changed, error, words):
    model, pairs, result = demo
    with pytest.raises(error) as caught:
        pa.knockout_curve(model, **({"pairs": pairs, "ranking": result} | changed))
    assert words in str(caught.value)


def test_a_task_that_the_model_never_gets_right(demo):
    model, pairs, result = demo
    ids = pairs.inputs()
    wrong = pairs.subset(np.arange(3))
    object.__setattr__(wrong, "answers", (wrong.answers + 1) % 7)
    with pytest.raises(InputError, match="got none of 3: there is no behaviour to knock out"):
        pa.knockout_curve(model, wrong, result)
    assert torch.equal(pairs.inputs()["clean"], ids["clean"])
