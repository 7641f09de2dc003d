"""Scores of a model on tasks, and what changed between two models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.evaluation import Items, changes, evaluate, harness_scores, named_task
from pyarith.evaluation.evaluate import _log_probability, answer_probability

pytestmark = pytest.mark.usefixtures("loud_again")
ITEMS = Items(("3 plus 4 equals to", "2 plus 2 equals to", "12 plus 11 equals to"), ("7", "5", "23"), "number")


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


def literal_probability(model, ids, answer):
    """P(answer | prompt) token by token, each prefix run alone."""
    p = 1.0
    for token in answer:
        with torch.no_grad():
            p *= float(model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token])
        ids = [*ids, token]
    return p


def test_answer_probability_is_the_product_over_the_answers_tokens(demo):
    model, tokenizer = demo
    found = answer_probability(model, tokenizer, ITEMS, batch_size=2)
    for got, prompt, answer in zip(found, ITEMS.prompts, ITEMS.answers, strict=True):
        ids, full = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
        assert full[: len(ids)] == ids
        assert got == pytest.approx(literal_probability(model, ids, full[len(ids) :]), rel=1e-4)
    pairs = named_task(tokenizer, "/", 12)
    want = [
        literal_probability(model, row[:length].tolist(), [int(answer)])
        for row, length, answer in zip(pairs.clean, pairs.lengths, pairs.answers, strict=True)
    ]
    np.testing.assert_allclose(answer_probability(model, tokenizer, pairs, batch_size=5), want, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "neox", "granite"])
def test_probability_knows_softcaps_and_positions(name):
    model = tiny_models.make(name, torch.float32)
    rows, answers = [[5, 6, 7, 8], [9, 10]], [[3], [4, 11]]
    want = [literal_probability(model, row, answer) for row, answer in zip(rows, answers, strict=True)]
    with torch.no_grad():
        found = _log_probability(model, rows, answers).exp()
    np.testing.assert_allclose(found, want, rtol=2e-4)


def test_a_tokenizer_that_ends_every_text_by_itself_changes_nothing(demo):
    model, tokenizer = demo

    def ending(texts, **options):
        found = tokenizer(texts, **options)
        found["input_ids"] = [[*ids, tokenizer.eos_token_id] for ids in found["input_ids"]]
        return found

    class Ending:
        encode, all_special_ids, unk_token_id = tokenizer.encode, tokenizer.all_special_ids, tokenizer.unk_token_id
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            return ending(texts, **options)

    want = answer_probability(model, tokenizer, ITEMS)
    np.testing.assert_array_equal(answer_probability(model, Ending(), ITEMS), want)


def test_an_answer_without_tokens_of_its_own_has_no_probability(demo):
    model, tokenizer = demo

    class Joining:
        """Every text is one token."""

        encode, all_special_ids, eos_token_id = tokenizer.encode, [], None
        unk_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[len(text)] for text in texts]}

    found = answer_probability(model, Joining(), ITEMS)
    assert np.isnan(found).tolist() == [True, True, True]


def test_scores_and_what_an_ablation_changes(demo):
    model, tokenizer = demo
    tasks = {"add": named_task(tokenizer, "+", 40), "few": ITEMS}
    seen = []
    before = evaluate(model, tokenizer, tasks, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    rows = {row["task"]: row for row in before.rows()}
    assert rows["few"]["right"] == 2 and rows["few"]["n"] == 3 and rows["add"]["accuracy"] > 0.9
    assert "add" in repr(before) and f"{rows['add']['probability']:.3f}" in repr(before)
    with pa.ablated(model, [(layer, head) for layer in (2, 3) for head in range(8)]):
        after = evaluate(model, tokenizer, tasks)
    found = {one.task: one for one in changes(before, after, resamples=500)}
    add = found["add"]
    was, now = (one.scores["add"].accuracy.correct for one in (before, after))
    assert (add.lost, add.gained) == (int((was & ~now).sum()), int((now & ~was).sum()))
    assert add.difference == pytest.approx(now.mean() - was.mean()) and add.difference < -0.3
    assert add.low <= add.difference <= add.high < 0 and add.p < 0.05 and add.q >= add.p
    assert add.probability_low <= add.probability_after - add.probability_before <= add.probability_high < 0
    m = add.lost + add.gained
    exact = sum(math.comb(m, k) for k in range(min(add.lost, add.gained) + 1)) / 2**m
    assert add.p_mcnemar == pytest.approx(min(1, 2 * exact))
    assert math.isnan(found["few"].low) and found["few"].method == "too few items for an interval"
    same = changes(before, before, resamples=200)[0]
    assert (same.difference, same.lost, same.gained, same.p_mcnemar) == (0, 0, 0, 1)


def test_evaluations_of_other_items_are_not_compared(demo):
    model, tokenizer = demo
    one = evaluate(model, tokenizer, {"few": ITEMS})
    other = Items(ITEMS.prompts, ("7", "4", "23"), "number")
    with pytest.raises(pa.errors.InputError, match="items of task 'few'"):
        changes(one, evaluate(model, tokenizer, {"few": other}))
    with pytest.raises(pa.errors.InputError, match=r"expected the tasks \['few'\], got \['many'\]"):
        changes(one, evaluate(model, tokenizer, {"many": ITEMS}))


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_command_evaluates_one_model_and_compares_two(demo, tmp_path):
    model, tokenizer = demo
    file, record = tmp_path / "items.csv", tmp_path / "record.json"
    lines = "\n".join(f"{a} plus {b} equals to,{a + b}" for a in range(1, 4) for b in range(1, 4))
    file.write_text(f"prompt,answer\n{lines}\n")
    done = run("demo", "--task", "/", "--n", 30, "--data", file, "--out", record)
    assert done.exit_code == 0, done.output
    found = json.loads(record.read_text())
    assert [row["task"] for row in found["scores"]["before"]] == ["/", "items.csv"] and "changes" not in found
    division = found["scores"]["before"][0]
    assert f"{100 * division['accuracy']:.1f}%" in done.output and f"{division['probability']:.3f}" in done.output
    assert len(division["correct"]) == 30 == len(division["probabilities"])
    model.save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    done = run("demo", "--against", tmp_path / "same", "--task", "/", "--n", 30, "--out", record)
    assert done.exit_code == 0, done.output
    (change,) = json.loads(record.read_text())["changes"]
    assert change["difference"] == 0 and change["lost"] == change["gained"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--task", "nix"], "nix"),
        (["demo", "--delta", "a", "--against", "b"], "either --delta or --against, got both"),
        (["demo", "--data", "missing.jsonl"], "missing.jsonl"),
        (["demo", "--out", "no/such/folder/file.json"], "in a folder that exists"),
        (["no/such/model"], "no folder 'no/such/model'"),
    ],
)
def test_bad_input_of_the_command_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_tasks_of_the_harness(demo, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [("3 plus 4 equals to", "7"), ("2 plus 2 equals to", "4"), ("5 plus 1 equals to", "9")]
    text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
    (tmp_path / "add.jsonl").write_text(text)
    task = {
        **{"task": "tiny_addition", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"},
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "add.jsonl")}},
        **{"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metadata": {"version": 1.0}},
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny_addition.yaml").write_text(json.dumps(task))
    model, tokenizer = demo
    (row,) = harness_scores(model, tokenizer, ["tiny_addition"], include_path=tmp_path)
    assert row["metric"] == "exact_match" and row["n"] == 3 and row["value"] == pytest.approx(2 / 3)
    asked = []

    class Few(lm_eval.tasks.TaskManager):  # reading all of the harness's own tasks takes longer than this test
        def __init__(self, *, include_path, include_defaults=True):
            asked.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    with monkeypatch.context() as context, pytest.raises(pa.errors.InputError, match="does not know nix"):
        context.setattr(lm_eval.tasks, "TaskManager", Few)
        harness_scores(model, tokenizer, ["nix"], include_path=tmp_path)
    assert asked == [False, True]
    done = run("demo", "--lm-eval", "tiny_addition", "--lm-eval-path", tmp_path)
    assert done.exit_code == 0 and "0.6667" in done.output
