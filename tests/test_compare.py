"""Ways of training side by side: every arm gives the model back, sees the same data, and is summed up honestly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models
import torch

import pyarith as pa
from pyarith.evaluation.generate import first_choices
from pyarith.models.sites import resolve
from pyarith.reporting import comparisons
from pyarith.stats import Clusters
from pyarith.tuning import arms as made
from pyarith.tuning.compare import Comparison, Point, compare, pack, unpack
from pyarith.tuning.data import load_examples
from pyarith.tuning.settings import TuneSettings
from pyarith.types import Head

# peft itself asks transformers for a name that is deprecated
quiet_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TOP = [Head(2, 3), Head(2, 7)]


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


def snapshot(model):
    """Everything of a model that an arm might leave changed."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
    )


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]


def arms_of(model):
    sites = resolve(model)
    with pa.SelectiveTuner(model, TOP) as tuner:
        size = tuner.n_parameters
    return size, [
        made.head_arm("key heads", lambda seed: TOP),
        made.head_arm("heads and MLP", lambda seed: TOP, [3]),
        made.head_arm("random heads", made.random_control(sites, 2)),
        made.head_arm("same layers", made.same_layer_control(sites, TOP)),
        made.mask_arm("mask", size),
        made.lora_arm("LoRA", size),
        made.lora_arm("early LoRA", size, range(2)),
        made.full_arm("full"),
    ]


@quiet_peft
def test_every_arm_learns_and_gives_the_model_back_bit_for_bit(demo):
    pytest.importorskip("peft")
    model, tokenizer = demo
    pairs = pa.tasks.arithmetic(tokenizer, "/", n=32)
    size, every = arms_of(model)
    arms = [one for one in every if one.name not in ("random heads", "same layers", "LoRA")]  # alike to others
    before, seen = snapshot(model), []

    def score(of):
        seen.append({name: tensor.clone() for name, tensor in of.state_dict().items()})
        right = first_choices(of, pairs).numpy() == np.asarray(pairs.answers)
        return {"target": right, "validation": right, "other": right}

    found = compare(
        model,
        load_examples(pairs, tokenizer),
        arms,
        score,
        target="target",
        validation="validation",
        retention=["other"],
        clusters=Clusters.of({"item": np.arange(len(pairs))}),
        rates={arm.name: [3e-4 if arm.name == "full" else 3e-3] for arm in arms},
        seeds=[0],
        settings=TuneSettings(epochs=4, batch_size=16, micro_batch_size=16, schedule="constant", warmup=0.0),
        progress=lambda done, total: same(before, snapshot(model)) or pytest.fail(f"run {done} of {total}"),
    )
    start = found.accuracy(found.base, "target")
    for point, state in zip(found.points, seen[1:], strict=True):
        assert found.accuracy(point.correct, "target") > start, point.arm
        changed = sum(int((state[name] != seen[0][name]).sum()) for name in state)
        if point.arm in ("full", "early LoRA"):  # LoRA spreads its parameters over whole matrices
            assert changed > size
        else:
            assert 0.9 * point.n_parameters < changed <= point.n_parameters, point.arm
        if point.arm not in ("full", "heads and MLP"):
            assert point.n_parameters == pytest.approx(size, rel=0.1), point.arm
    place = [one.arm for one in found.points].index("early LoRA")
    assert "layers 0-1" in found.points[place].about
    early = {name for name in seen[0] if not torch.equal(seen[place + 1][name], seen[0][name])}
    assert early and all(".layers.0." in name or ".layers.1." in name for name in early)


@quiet_peft
def test_an_error_while_training_gives_the_model_back_too(demo):
    model, _ = demo
    before = snapshot(model)
    _, arms = arms_of(model)
    for arm in arms:
        with pytest.raises(KeyboardInterrupt), arm.attach(model, TuneSettings(), 1e-3, 0) as attached:
            for value in attached.trainee.parameters:
                value.grad = torch.ones_like(value)
            attached.trainee.optimizer.step()
            raise KeyboardInterrupt
        assert same(before, snapshot(model)), arm.name


def test_a_mask_trains_its_entries_as_adamw_would():
    """Against AdamW on the full matrices with gradients masked, no decay: the same entries move by the same."""
    model, other = (tiny_models.make("llama", torch.float64) for _ in range(2))
    ids = torch.arange(12).reshape(2, 6)
    with made.mask_arm("mask", 500).attach(model, TuneSettings(weight_decay=0.0), 0.01, 3) as attached:
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            attached.trainee.optimizer.step()
            attached.trainee.optimizer.zero_grad()
        moved = {name: p.detach() != start[name] for name, p in model.named_parameters()}
        result = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert 450 < sum(int(one.sum()) for one in moved.values()) <= 500 == attached.n_parameters
        assert all(".layers." in name and result[name].ndim == 2 for name, one in moved.items() if one.any())
        state = {name: value.detach().clone() for name, value in attached.trainee.state().items()}
        attached.trainee.load({name: torch.zeros_like(value) for name, value in state.items()})
        assert all(float(p.detach()[moved[name]].abs().sum()) == 0 for name, p in model.named_parameters())
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        other(input_ids=ids, labels=ids).loss.backward()
        for name, p in other.named_parameters():
            p.grad = torch.where(moved[name], p.grad, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in other.named_parameters():
        torch.testing.assert_close(result[name], p.detach(), rtol=1e-9, atol=1e-12)


def point(arm, rate, seed, target, validation, other, failed=""):
    bits = {"target": target, "validation": validation, "other": other}
    correct = {} if failed else {name: np.array([one == "1" for one in text]) for name, text in bits.items()}
    return Point(arm, rate, seed, "", 10, correct, 1.0, 0.5, failed)


def comparison(*points):
    ones = np.ones(6, bool)
    base = {"target": np.array([1, 0, 0, 0, 0, 0], bool), "validation": ones, "other": ones}
    arms = tuple(dict.fromkeys(one.arm for one in points))
    clusters = Clusters.of({"item": np.arange(6)})
    return Comparison(arms, "target", "validation", ("other",), base, points, clusters)


def test_the_best_rate_is_chosen_on_validation_and_summed_up_by_hand():
    found = comparison(
        point("a", 0.1, 0, "111111", "110000", "111111"),  # better on the target, worse on validation
        point("a", 0.1, 1, "111111", "110000", "111111"),
        point("a", 0.2, 0, "111000", "111100", "111110"),
        point("a", 0.2, 1, "110000", "111000", "111111"),
        point("a", 0.3, 0, "", "", "", failed="nan"),
        point("a", 0.3, 1, "111111", "111111", "111111"),  # its rate failed with another seed
        point("b", 0.5, 0, "111110", "100000", "000000"),
        point("b", 0.5, 1, "111110", "100000", "000000"),
    )
    assert found.rates("a") == pytest.approx({0.1: 2 / 6, 0.2: 3.5 / 6})
    a, b = found.summary(resamples=200)
    assert (a.rate, a.at_edge, b.at_edge) == (0.2, True, False)
    assert a.target == pytest.approx(2.5 / 6) and a.target_change == pytest.approx(1.5 / 6)
    assert a.target_range == pytest.approx((2 / 6, 3 / 6))
    assert a.retention == pytest.approx(5.5 / 6) and a.retention_change == pytest.approx(-0.5 / 6)
    assert b.difference == pytest.approx(2.5 / 6) and b.low <= b.difference <= b.high and b.q >= b.p - 1e-12
    assert np.isnan(a.difference) and np.isnan(a.p)
    gains = {(one["arm"], one["rate"], one["seed"]): (one["gain"], one["retention"]) for one in found.frontier()}
    assert len(gains) == 7 and gains["b", 0.5, 0] == pytest.approx((4 / 6, -1.0))
    with pytest.raises(pa.errors.InputError, match="no run of arm 'a' gave finite losses"):
        comparison(point("a", 0.3, 0, "", "", "", failed="nan")).summary()


def test_points_survive_a_file_cut_short(tmp_path):
    one, two = point("a", 0.1, 0, "101010", "111111", "111111"), point("a", 0.1, 1, "", "", "", failed="nan")
    again = unpack(json.loads(json.dumps(pack(one))))
    assert again.correct["target"].tolist() == one.correct["target"].tolist() and again.arm == "a"
    kept = comparisons.Kept(tmp_path / "points", "mine")
    assert kept.points() == {}
    kept.keep(one)
    comparisons.Kept(tmp_path / "points", "another").keep(point("b", 0.1, 0, "1", "1", "1"))
    with open(tmp_path / "points", "a") as file:
        file.write('\n{"arm": "c", "rate"')  # a kill
    kept.keep(two)
    assert set(kept.points()) == {("a", 0.1, 0), ("a", 0.1, 1)}
    assert kept.points()["a", 0.1, 1].failed == "nan"
    with pytest.raises(pa.errors.InputError, match="expected one that compare kept"):
        unpack({"arm": "a"})


def test_splits_share_no_prompt_and_unseen_pairs_are_unseen(demo):
    _, tokenizer = demo
    found = comparisons.split_task(tokenizer, "/", n=600, seed=0, retention=["+", "capital"], items=10)
    parts = {"train": found.train, **found.tests}
    prompts = {name: set(pairs.prompts) for name, pairs in parts.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 600
    trained = set(found.train.strata["pair"])
    assert not trained & set(found.tests["unseen pairs"].strata["pair"])
    for name in ("target", "validation"):
        assert set(found.tests[name].strata["pair"]) <= trained
        assert not set(found.tests[name].strata["template"]) & set(found.train.strata["template"])
    assert not set(found.tests["target"].strata["template"]) & set(found.tests["validation"].strata["template"])
    assert set(found.retention) == {"+", "capital"} and len(found.retention["+"]) == 10
    for bad, message in ((["/"], "other than '/'"), (["copy"], "one-token answers, got 'copy'")):
        with pytest.raises(pa.errors.InputError, match=message):
            comparisons.split_task(tokenizer, "/", n=60, seed=0, retention=bad, items=4)


@pytest.mark.parametrize(
    ("names", "k", "message"),
    [(["key heads", "nix"], 2, "got nix"), ([], 2, "got none"), (["full"], 25, "k: expected 1 to 24 heads, got 25")],
)
def test_unknown_arms_and_too_many_heads_are_refused(demo, names, k, message):
    ranking = [Head(layer, head) for layer in range(6) for head in range(8)]
    with pytest.raises(pa.errors.InputError, match=message):
        comparisons.usual_arms(demo[0], ranking, k, names)


def test_without_peft_lora_is_refused_before_anything_trains(monkeypatch, demo):
    monkeypatch.setattr(made, "find_spec", lambda name: None)
    ranking = [Head(layer, head) for layer in range(6) for head in range(8)]
    with pytest.raises(pa.errors.NotAvailableError, match="LoRA: needs peft, which is not installed"):
        comparisons.usual_arms(demo[0], ranking, 4)
    arms, _ = comparisons.usual_arms(demo[0], ranking, 4, ["key heads", "full"])
    assert [arm.name for arm in arms] == ["key heads", "full"]


def test_controls_are_drawn_anew_for_every_seed():
    sites = resolve(tiny_models.make("llama"))
    heads = [Head(0, 1), Head(2, 0)]
    for draw in (made.same_layer_control(sites, heads), made.random_control(sites, 2)):
        assert draw(3) == draw(3) and len({tuple(draw(seed)) for seed in range(20)}) > 5
    with pytest.raises(pa.errors.InputError, match="expected 1 to 12 heads, got 13"):
        made.random_control(sites, 13)
