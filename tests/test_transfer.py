"""transfer: cells against ablations by the letter, controls by definition, statistics by hand, files, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from single_thread import on_one_thread, one_thread  # noqa: F401

import pyarith as pa
from pyarith.errors import InputError, InputTypeError, NotAvailableError
from pyarith.evaluation import HeadList, Items, TransferResult, accuracy, load_heads, named_task, save_heads, transfer
from pyarith.evaluation.tasks import clusters_of
from pyarith.evaluation.transfer_cells import relative, relative_correct
from pyarith.types import Head

KEY = [(2, 7), (3, 3), (2, 2), (3, 7)]  # the strongest for + in the demo model
FAST = {"draws": 3, "n": 24, "verify": 0, "resamples": 200, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


@pytest.fixture(scope="module")
def tasks(demo):
    _, tokenizer = demo
    chosen = {name: named_task(tokenizer, name, 24) for name in ("+", "power", "year_span", "capital", "antonym")}
    return {**chosen, "copy": Items.from_problems(pa.tasks.draw_problems("copy", 12))}


@pytest.fixture(scope="module")
def result(demo, tasks):
    model, tokenizer = demo
    with on_one_thread():
        return transfer(model, tokenizer, tasks, {"plus": KEY, "first": [(0, 0)]}, **FAST)


def test_heads_of_addition_harm_arithmetic_and_spare_the_rest(result):
    print(result)
    drops = dict(zip(result.tasks, result.matrix()[:, 0], strict=True))
    assert all(drops[task] < -0.25 for task in ("+", "power", "year_span"))
    assert all(drops[task] > -0.15 for task in ("capital", "antonym", "copy"))
    for task in ("+", "power", "year_span"):
        cell = result.cell(task, "plus")
        assert cell.accuracy < np.mean(cell.controls["random"].accuracy) and cell.high < 0 and cell.p < 0.05
    assert result.matrix("accuracy")[:, 1].min() > 0.8  # one head of layer 0


def test_key_heads_are_the_ones_that_patching_finds(demo):
    model, tokenizer = demo
    pairs = pa.tasks.arithmetic(tokenizer, "+", n=40, seed=1)
    top = pa.fast_patch(model, **pairs.inputs(), verify=0, progress=False).top(4)
    assert {row.head for row in top} == set(KEY)


@pytest.mark.parametrize("task", ["power", "copy"])
def test_a_cell_is_the_accuracy_inside_the_ablation(demo, tasks, result, task):
    """One task read off at END, one generated; the key heads and one draw of each control."""
    model, tokenizer = demo
    items = tasks[task]
    texts = items.prompts
    baseline = pa.MeanAblation.from_inputs(model, [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts])
    cell = result.cell(task, "plus")
    assert np.array_equal(result.intact[task], accuracy(model, items, tokenizer, max_new_tokens=6).correct)
    sets = [(KEY, cell.accuracy)]
    sets += [(cell.controls[name].heads[1], cell.controls[name].accuracy[1]) for name in ("random", "same_layer")]
    for heads, told in sets:
        with pa.ablated(model, heads, baseline):
            assert accuracy(model, items, tokenizer, max_new_tokens=6).value == pytest.approx(told)


def test_numbers_of_a_cell_by_hand(result):
    for cell in result.cells:
        intact = result.intact[cell.task]
        assert cell.right == cell.correct.sum() and cell.right_intact == intact.sum() and cell.n == len(intact)
        assert cell.lost == (intact & ~cell.correct).sum() and cell.gained == (~intact & cell.correct).sum()
        assert cell.relative_drop == pytest.approx((cell.right - cell.right_intact) / cell.right_intact)
        assert cell.relative_drop_correct == pytest.approx(-cell.lost / cell.right_intact)
        for control in cell.controls.values():
            below = sum(value <= cell.accuracy for value in control.accuracy)
            assert control.p == (1 + below) / (1 + 3) and len(control.heads) == 3


def test_relative_drops():
    intact = np.array([True, True, True, True, False, False])
    right = np.array([True, False, False, False, True, False])
    assert relative(right, intact) == -0.5 and relative_correct(right, intact) == -0.75
    assert math.isnan(relative(right, intact & False)) and math.isnan(relative_correct(right, intact & False))


def test_clusters_have_five_values_or_are_left_out(tasks):
    assert clusters_of(tasks["+"]).names == ("pair", "template")
    assert clusters_of(tasks["capital"]).names == ("item",) and clusters_of(tasks["copy"]).names == ("item",)
    assert clusters_of(Items.from_problems([("a", "1"), ("b", "2")])) is None
    plain = Items(("a",) * 6, ("1",) * 6, "number")
    assert clusters_of(plain).sizes == {"item": 6}


def test_a_task_that_is_never_right_says_so(demo, tmp_path):
    model, tokenizer = demo
    wrong = {"wrong": [("2 + 3 =", "77"), ("1 + 1 =", "78")]}
    found = transfer(model, tokenizer, wrong, KEY, **FAST)
    cell = found.cell("wrong", "heads")
    assert math.isnan(cell.relative_drop) and math.isnan(cell.relative_drop_correct) and math.isnan(cell.p)
    assert cell.p_mcnemar == 1 and found.never_right == ("wrong",) and "never right" in repr(found)
    assert cell.method == "too few items for an interval"
    found.save(tmp_path / "r.json")
    again = TransferResult.load(tmp_path / "r.json").cell("wrong", "heads")
    assert math.isnan(again.relative_drop) and math.isnan(again.controls["random"].relative_drop[0])


def test_result_as_rows_and_file(result, tmp_path):
    result.save(tmp_path / "deep" / "r.json")
    again = TransferResult.load(tmp_path / "deep" / "r.json")
    assert again.rows() == result.rows() and repr(again) == repr(result) and again.settings == result.settings
    assert all(np.array_equal(a.correct, b.correct) for a, b in zip(again.cells, result.cells, strict=True))
    row = result.rows()[0]
    assert row["task"] == "+" and row["random_min"] <= row["random_mean"] <= row["random_max"]
    assert set(result.settings["baselines"].values()) == {"mean(over='batch_pos')"}
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(NotAvailableError, match="pip install pandas"):
            result.to_dataframe()
    else:
        assert len(result.to_dataframe()) == len(result.cells)
    with pytest.raises(InputError, match="does not exist"):
        TransferResult.load(tmp_path / "no.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="expected a transfer result of format 1"):
        TransferResult.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="cell: expected a task of"):
        result.cell("+", "none")


def test_baselines_and_names(demo):
    model, tokenizer = demo
    options = {**FAST, "n": 8, "draws": 1, "controls": ["random"]}
    zero = transfer(model, tokenizer, ["kind"], KEY, baseline="zero", **options)
    assert zero.settings["baselines"] == {"kind": "zero"} and set(zero.cells[0].controls) == {"random"}
    inputs = pa.tasks.arithmetic(tokenizer, "+", n=8).inputs()
    given = pa.MeanAblation.from_inputs(model, inputs["clean"], inputs["attention_mask"])
    own = transfer(model, tokenizer, ["kind"], KEY, baseline=given, **options)
    assert own.settings["baseline_of"] == "given by the caller"
    assert isinstance(named_task(tokenizer, "sort", 4), Items) and len(named_task(tokenizer, "kind", 99)) == 32


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"tasks": {}}, InputError, "tasks: expected at least one"),
        ({"tasks": "power"}, InputTypeError, "tasks: expected a mapping"),
        ({"tasks": {"a": 5}}, InputTypeError, r"tasks\['a'\]: expected PromptPairs, Items or a list"),
        ({"tasks": ["chess"]}, InputError, "task: expected one of power"),
        ({"head_lists": {}}, InputError, "head_lists: expected at least one"),
        ({"head_lists": {"a": []}}, InputError, r"head_lists\['a'\]: expected at least one head, got none"),
        ({"head_lists": {"a": [(9, 0), (0, 8), (1, 1)]}}, InputError, r"head_lists\['a'\]: .* got 9.0, 0.8"),
        ({"head_lists": {"a": [(1, 1), (1, 1)]}}, InputError, "expected each head once, got twice 1.1"),
        ({"head_lists": {"a": [(1, 1), "x"]}}, InputError, r"texts such as '9.6', got \['x'\]"),
        ({"baseline": "median"}, InputError, r"baseline: expected one of \('mean', 'zero'\) or a Baseline"),
        ({"controls": ["bottom"]}, InputError, "controls: expected some of"),
        ({"controls": "random"}, InputError, "controls: expected some of"),
        ({"draws": 0}, InputError, "draws: expected a whole number >= 1, got 0"),
        ({"n": 2.5}, InputError, "n: expected a whole number"),
    ],
)
def test_bad_input(demo, changed, error, words):
    model, tokenizer = demo
    with pytest.raises(error, match=words):
        transfer(model, tokenizer, **({"tasks": ["kind"], "head_lists": KEY} | changed))


def test_head_lists_in_files(demo, tmp_path):
    model, _ = demo
    save_heads(tmp_path / "a" / "plus.json", KEY, {"task": "+", "threshold": -0.05}, model=model)
    found = load_heads(tmp_path / "a" / "plus.json", model)
    assert found.heads == tuple(Head(*head) for head in KEY) and found.meta == {"task": "+", "threshold": -0.05}
    assert (found.n_layers, found.n_heads) == (6, 8) and found.model.startswith("sha256:")
    save_heads(tmp_path / "texts.json", ["12.22", "3.1"])
    assert load_heads(tmp_path / "texts.json") == HeadList((Head(12, 22), Head(3, 1)))
    with pytest.raises(InputError, match=r"layers 0 to 5 .* got 12.22"):
        load_heads(tmp_path / "texts.json", model)
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.add_(1)
        with pytest.warns(UserWarning, match="made with another model of the same sizes, or its weights"):
            load_heads(tmp_path / "a" / "plus.json", model)
    finally:
        weight.data.copy_(kept)
    record = json.loads((tmp_path / "a" / "plus.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(record | {"n_layers": 32}))
    with pytest.raises(InputError, match="made for a model with 32 layers of 8 heads, this one has 6 layers of 8"):
        load_heads(tmp_path / "b.json", model)
    for text in ("[]", '{"format": 2, "heads": []}', '{"format": 1}', "nonsense"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match="save_heads"):
            load_heads(tmp_path / "c.json")
    with pytest.raises(InputError, match="does not exist"):
        load_heads(tmp_path / "none.json")
    with pytest.raises(InputError, match="meta: expected what JSON holds"):
        save_heads(tmp_path / "d.json", KEY, {"x": object()})
    with pytest.raises(InputError, match=r"got 6.0, 0.8"):
        save_heads(tmp_path / "d.json", [(6, 0), (0, 8)], model=model)
    assert not (tmp_path / "d.json").exists()
