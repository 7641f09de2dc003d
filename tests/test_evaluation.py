"""Items from files, answers out of free text, greedy generation under ablation, accuracy."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from tokenizers_for_tests import SlowWords

import pyarith as pa
from pyarith.errors import InputError, InputTypeError, NotAvailableError
from pyarith.evaluation import Items, accuracy, extract_number, extract_text, generate, is_match, load_items, numbers
from pyarith.evaluation.answers import kind_of
from pyarith.evaluation.generate import _repair
from pyarith.tasks.further import _different

HEADS = [(2, 7), (3, 3)]


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


# What a careful reader takes for the numbers of a text, worked out by hand.
NUMBERS = {
    "": [],
    "none": [],
    "72": [72],
    "72.": [72],
    "It is 72.\n": [72],
    "1,234,567 apples": [1234567],
    "1,234.5": [Fraction(2469, 2)],
    "3,5": [3, 5],
    "1,2345": [1, 2345],
    "0.50": [Fraction(1, 2)],
    ".5 of it": [Fraction(1, 2)],
    "1e3": [1000],
    "1.5e-1": [Fraction(3, 20)],
    "-4": [-4],
    "\u22124": [-4],
    "+4": [4],
    "x = -4": [-4],
    "(-4)": [-4],
    "5-3": [5, 3],
    "10 - 7": [10, 7],
    "2 + -3": [2, -3],
    "from 1732 to 1739": [1732, 1739],
    "2020-2024": [2020, 2024],
    "$5": [5],
    "$1,000.50.": [Fraction(2001, 2)],
    "-$7 and $-7": [-7, -7],
    "50%": [50],
    "3/4": [Fraction(3, 4)],
    "1 3/4 cups": [Fraction(7, 4)],
    "-1/2": [Fraction(-1, 2)],
    "3 / 4": [3, 4],
    "3/4/2020": [3, 4, 2020],
    "10/0": [10, 0],
    "x2 and x12": [],
    "the 3rd of 12th": [3, 12],
    "12:30": [12, 30],
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_of_a_text(text):
    assert numbers(text) == NUMBERS[text]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("He has 3 + 4 = <<3+4=7>>7 left.\n#### 7", 7),
        ("#### 1,080 dollars, 3 each", 1080),
        ("#### nothing, so 5", 5),
        ("#### no\nThe answer is 8", 8),
        ("so \\boxed{12} of 30", 12),
        ("The answer is 7. Then 9 come.", 7),
        ("The answer is 3 + 4 = 7.\n12 more", 7),
        ("answer is 5. No: the answer is: -6", -6),
        ("Answer: $2.50", Fraction(5, 2)),
        ("The answer is clear: 4", 4),
        ("The answer is clear.\n4 apples and 9 pears", 9),
        ("First 3, then 4, so 7 apples.", 7),
        ("7", 7),
        ("seven", None),
        ("", None),
    ],
)
def test_the_number_that_an_answer_arrives_at(text, found):
    assert extract_number(text) == found


@pytest.mark.parametrize(
    ("text", "answer", "kind", "right"),
    [
        ("2.50", "5/2", "number", True),
        ("2 1/2", "2.5", "number", True),
        ("1,000", "1000.0", "number", True),
        ("The answer is 0.3333", "1/3", "number", False),
        ("100000000000000000001", "100000000000000000000", "number", False),
        ("", "0", "number", False),
        ("Paris.", "paris", "text", True),
        ("  The answer is  New   York!", "new york", "text", True),
        ("Paris, I think", "Paris", "text", False),
        ("1 8 9\n2 3 4", "1 8 9", "text", True),
        ("maybe\n#### Rome", "Rome", "text", True),
    ],
)
def test_matches(text, answer, kind, right):
    assert is_match(text, answer, kind) is right


def test_kinds():
    assert kind_of(["7", "$5", "50%", "-1,000", "1/2."]) == "number"
    assert kind_of(["7", "1 8 9"]) == kind_of(["7 apples"]) == kind_of([""]) == "text"
    assert extract_text("'Yes'.") == "yes"
    with pytest.raises(InputError, match="answer: expected a number for kind 'number', got 'Rome'; use kind='text'"):
        is_match("Rome", "Rome")
    with pytest.raises(InputError, match="kind: expected one of"):
        is_match("Rome", "Rome", "words")


GSM8K = [
    {"question": "Tom has 3 apples and 4 pears. How many?", "answer": "3+4 = <<3+4=7>>7\n#### 7"},
    {"question": "How many in 1,000 pairs?", "answer": "2 each.\n#### 2,000"},
]
SVAMP = [{"ID": "c-1", "Body": "Ed had 8 pens.", "Question": "He lost 3. How many now?", "Answer": 5.0}]
ADDSUB = [{"iIndex": 1, "sQuestion": " A has 4 and B 5. Total? ", "lSolutions": [9.0], "lEquations": ["x=4+5"]}]


def test_known_layouts(tmp_path):
    (tmp_path / "g.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, GSM8K)) + "\n\n", encoding="utf-8")
    items = load_items(tmp_path / "g.jsonl")
    assert items.answers == ("7", "2,000") and items.kind == "number"
    assert items.prompts[0] == "Q: Tom has 3 apples and 4 pears. How many?\nA:"
    assert items.settings["layout"] == "gsm8k" and items.settings["dropped"] == {}
    assert list(items.is_correct(["3 + 4 = 7", "1000"])) == [True, False]
    (tmp_path / "s.json").write_text(json.dumps(SVAMP))
    items = load_items(tmp_path / "s.json")
    assert items.prompts == ("Q: Ed had 8 pens. He lost 3. How many now?\nA:",) and items.answers == ("5.0",)
    (tmp_path / "a.JSON").write_text(json.dumps(ADDSUB))
    items = load_items(tmp_path / "a.JSON")
    assert items.prompts == ("Q: A has 4 and B 5. Total?\nA:",) and items.answers == ("9.0",)
    (tmp_path / "x.csv").write_text('prompt,answer\n"The capital of France, now, is",Paris\n2 + 2 =,4\n')
    items = load_items(tmp_path / "x.csv")
    assert items.prompts[0] == "The capital of France, now, is" and items.kind == "text"
    assert len(load_items(tmp_path / "x.csv", limit=1)) == 1
    (tmp_path / "x.tsv").write_text("where\twhat\tgold\nhere\twhy\t3\n")
    items = load_items(tmp_path / "x.tsv", prompt="{where}: {what}?", answer="gold")
    assert items.prompts == ("here: why?",) and items.settings["layout"] == "given"
    assert load_items(tmp_path / "x.tsv", prompt="what", answer="gold").prompts == ("why",)


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("no.jsonl", None, {}, "expected a file, got .*no.jsonl, which does not exist"),
        ("a.jsonl", "{oops\n", {}, "a.jsonl, line 1: expected JSON, got '{oops'"),
        ("a.json", "{}", {}, "expected a list of objects, got dict"),
        ("a.jsonl", "", {}, "expected at least one row, got none"),
        (
            "a.csv",
            "q,a\n1,2\n",
            {},
            r"expected columns that are recognised \(generic: prompt, answer; .*got \['q', 'a'\]",
        ),
        ("a.csv", "q,a\n1,2\n", {"prompt": "q", "answer": "z"}, r"expected columns \['z'\] .*got \['q', 'a'\]"),
        ("a.csv", "q,a\n1,2\n", {"prompt": "{q", "answer": "a"}, "prompt: expected a column or a template"),
        (
            "a.csv",
            "prompt,answer\nx,1\n,2\ny,\n , \n",
            {},
            r"prompt is empty in 2 \(row 2, 4\); the answer is empty in 1 ",
        ),
        ("a.csv", "prompt,answer\n,2\n", {"on_bad": "drop"}, "none is left"),
        ("a.csv", "prompt,answer\nx,1\n", {"on_bad": "skip"}, "on_bad: expected one of"),
        ("a.csv", "prompt,answer\nx,1\n", {"limit": 0}, "limit: expected None or a whole number"),
        ("a.csv", "prompt,answer\nx,y\n", {"kind": "number"}, r"answers: expected a number each .*got 0: 'y'"),
        ("a.json", '[{"sQuestion": "x", "lSolutions": [1, 2]}]', {}, r"there are several answers in 1 \(row 1\)"),
        ("a.json", '[{"prompt": "x", "answer": "1"}, 5]', {}, r"not a JSON object in 1 \(row 2\)"),
    ],
)
def test_bad_files_say_what_and_what_to_do(tmp_path, name, text, options, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        load_items(tmp_path / name, **options)


def test_dropped_rows_are_counted_and_named(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nx,1\n,2\ny,\nz,4\n")
    items = load_items(tmp_path / "a.csv", on_bad="drop")
    assert items.prompts == ("x", "z") and list(items.strata["item"]) == [1, 4]
    assert items.settings["dropped_rows"] == {"empty_prompt": [2], "empty_answer": [3]}
    assert items.settings["dropped"] == {"empty_prompt": 1, "empty_answer": 1} and "2 rows left out" in repr(items)


def test_names_go_to_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    local = datasets.load_dataset("json", data_files=str(tmp_path / "g.jsonl"), split="train", cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: local)
    assert load_items("gsm8k", subset="main").answers == ("7", "2,000")


def test_without_datasets_a_name_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(NotAvailableError, match=r"'gsm8k' does not end in .jsonl.*pip install 'pyarith\[eval\]'"):
        load_items("gsm8k")


def one_by_one(model, ids, steps, ends):
    """Token by token without cache or padding, the most probable each time."""
    new = []
    for _ in range(steps):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] in ends:
            return new[:-1]
    return new


def test_generation_under_ablation_is_the_argmax_token_by_token(demo):
    model, tokenizer = demo
    problems = [
        p for task in ("copy", "decimal_sum", "word_problem", "capital") for p in pa.tasks.draw_problems(task, 4)
    ]
    prompts = [p.prompt for p in problems]
    ids = tokenizer(prompts)["input_ids"]
    assert len(set(map(len, ids))) > 3  # padding is needed
    baseline = pa.MeanAblation.from_inputs(model, [torch.tensor([row]) for row in ids])
    with pa.ablated(model, HEADS, baseline):
        together = generate(model, tokenizer, prompts, max_new_tokens=5, stop=())
        alone = [one_by_one(model, row, 5, [tokenizer.eos_token_id]) for row in ids]
    repair = _repair(tokenizer)
    assert together == [repair(tokenizer.decode(new).strip()) for new in alone]
    intact = generate(model, tokenizer, prompts, max_new_tokens=5, stop=())
    assert intact != together and all(text.startswith(p.answer) for text, p in zip(intact, problems, strict=True))


def test_positions_count_from_the_first_real_token():
    """With learned positions, padding that shifts them shows."""
    model = tiny_models.make("gpt2")
    tokenizer = SlowWords([f"w{i}" for i in range(96)])
    prompts = ["w3 w9 w27 w81", "w5", "w80 w2", "w7 w11 w13"]
    found = generate(model, tokenizer, prompts, max_new_tokens=6, stop=(), batch_size=4)
    alone = [tokenizer.decode(one_by_one(model, tokenizer(p)["input_ids"], 6, [])) for p in prompts]
    assert found == alone
    with pytest.raises(InputError, match=r"at most 64 tokens with learned positions.*prompts \[0\] have more"):
        generate(model, tokenizer, ["w1 w2"], max_new_tokens=63)


def test_stops_are_cut_off_and_the_models_own_settings_do_not_count(demo):
    model, tokenizer = demo
    prompt = "2 + 3 ="
    free = generate(model, tokenizer, [prompt], max_new_tokens=12, stop=())[0]
    assert generate(model, tokenizer, [prompt], max_new_tokens=12)[0] == free.split("\n")[0].strip() == "5"
    kept = dict(vars(model.generation_config))
    try:
        model.generation_config.update(do_sample=True, temperature=9.0, num_beams=2, repetition_penalty=3.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert generate(model, tokenizer, [prompt] * 3, max_new_tokens=12, stop=()) == [free] * 3
    finally:
        vars(model.generation_config).update(kept)


def test_a_stop_text_ends_its_own_row_only(demo):
    model, tokenizer = demo
    prompts = ["Copy: open up good ->", "Copy: good fast brown ->"]
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        assert generate(model, tokenizer, prompts, max_new_tokens=9, stop=["up", "brown"]) == ["open", "good fast"]
        assert len(calls) == 3  # not the nine that were allowed, nor the four up to the end of the text
        assert generate(model, tokenizer, prompts[:1], max_new_tokens=2, stop=["brown"]) == ["open up"]
    finally:
        handle.remove()


def test_a_tokenizer_that_spaces_numbers_is_repaired_and_another_is_not(demo):
    repair = _repair(demo[1])
    assert repair("0. 7 of 1, 234") == "0.7 of 1,234" and repair("- 3") == "-3" and repair("5 - 3") == "5 - 3"

    class Plain:
        def __call__(self, text, **_):
            return {"input_ids": list(map(ord, text))}

        def decode(self, ids):
            return "".join(map(chr, ids))

    assert _repair(Plain())("It is 5. 7 are left") == "It is 5. 7 are left"


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"prompts": "text"}, InputTypeError, "prompts: expected a list of non-empty texts"),
        ({"prompts": []}, InputTypeError, "prompts: expected a list"),
        ({"prompts": ["a", ""]}, InputTypeError, "prompts: expected a list"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens: expected a whole number >= 1, got 0"),
        ({"batch_size": 1.5}, InputError, "batch_size: expected a whole number"),
        ({"stop": "\n"}, InputTypeError, "stop: expected a list of non-empty texts"),
    ],
)
def test_bad_generation_arguments(demo, changed, error, words):
    model, tokenizer = demo
    with pytest.raises(error, match=words):
        generate(model, tokenizer, **({"prompts": ["2 + 3 ="]} | changed))


def test_accuracy_of_pairs_is_the_argmax_at_end_also_when_ablated(demo):
    model, tokenizer = demo
    pairs = pa.tasks.arithmetic(tokenizer, "+", n=24, seed=5)
    baseline = pa.MeanAblation.from_inputs(model, pairs.inputs()["clean"], pairs.inputs()["attention_mask"])
    intact = accuracy(model, pairs, tokenizer)
    with pa.ablated(model, HEADS, baseline):
        found = accuracy(model, pairs, tokenizer)
        for row, length in enumerate(pairs.lengths):
            with torch.no_grad():
                logits = model(torch.tensor(pairs.clean[row : row + 1, :length])).logits[0, -1]
            assert found.correct[row] == (int(logits.argmax()) == pairs.answers[row])
    assert found.right < intact.right and found.n == 24 and intact.low < intact.value <= intact.high
    assert intact.predictions[0] == intact.answers[0] and intact.rows()[0]["correct"]


def test_accuracy_of_free_answers_and_of_none(demo):
    model, tokenizer = demo
    items = Items.from_problems(pa.tasks.draw_problems("decimal_sum", 12))
    found = accuracy(model, items, tokenizer, max_new_tokens=8)
    assert found.right == 12 and found.high == 1 and "of the number" in found.method
    wrong = accuracy(model, [("2 + 3 =", "77"), ("1 + 1 =", "78")], tokenizer, max_new_tokens=4)
    assert wrong.value == 0 and wrong.low == 0 and wrong.high < 1
    assert "never right: the first answer is '5' instead of '77'" in repr(wrong)
    with pytest.raises(InputTypeError, match="tokenizer: expected one for free answers"):
        accuracy(model, items)
    with pytest.raises(InputTypeError, match="items: expected PromptPairs, Items or a list"):
        accuracy(model, ["2 + 3 ="], tokenizer)


@pytest.mark.parametrize("task", [*pa.tasks.ARITHMETIC_TASKS, *pa.tasks.CONTROL_TASKS])
def test_problems_are_different_repeatable_and_pair_up(demo, task):
    _, tokenizer = demo
    problems = pa.tasks.draw_problems(task, 16, seed=2)
    assert problems == pa.tasks.draw_problems(task, 32, seed=2)[:16] != pa.tasks.draw_problems(task, 16)
    assert len({p.prompt for p in problems}) == 16
    if task in ("copy", "sort", "decimal_sum"):
        with pytest.raises(pa.errors.AlignmentError, match="the answer is not one token"):
            pa.tasks.problem_pairs(tokenizer, task, 16, fewer=True)
        return
    pairs = pa.tasks.problem_pairs(tokenizer, task, 10_000 if task == "capital" else 16, fewer=True)
    assert len(pairs) == (40 if task == "capital" else 16) == len(set(pairs.prompts))
    answers = {one.prompt: one.answer for one in _different(task, 400, 0)}
    assert all(answers[c] != a for c, a in zip(pairs.corrupted_prompts, pairs.answer_texts, strict=True))
    assert ("pair" in pairs.strata) == (len(set(pairs.strata["template"])) >= 5)


def test_unknown_tasks_and_too_many(demo):
    with pytest.raises(InputError, match=r"task: expected one of power, .*, got 'chess'"):
        pa.tasks.draw_problems("chess")
    with pytest.raises(InputError, match="n: asked for 50 problems of 'capital', which has 40 different ones"):
        pa.tasks.draw_problems("capital", 50)
    for n in (0, 1.5, True):
        with pytest.raises(InputError, match="n: expected a positive whole number"):
            pa.tasks.problem_pairs(demo[1], "power", n)
    assert np.array_equal(
        pa.tasks.problem_pairs(demo[1], "kind", 8).clean, pa.tasks.problem_pairs(demo[1], "kind", 8).clean
    )
