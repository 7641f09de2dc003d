"""tasks.arithmetic: templates, corruption families, strata, counts, determinism."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tokenizers_for_tests import WithoutOffsets, byte_level, metaspace

from pyarith import tasks
from pyarith.errors import AlignmentError, InputError
from pyarith.tasks import tables
from pyarith.tasks.sampling import Candidate, collect
from pyarith.tasks.tables import LEXICON, arithmetic_templates, operand_pairs, solve
from pyarith.tasks.templates import Template

SIGNS = tuple(LEXICON)


@pytest.mark.parametrize("sign", SIGNS)
def test_templates_are_36_distinct_in_three_styles(sign):
    templates = arithmetic_templates(sign)
    assert Counter(one.style for one in templates) == dict.fromkeys(tasks.STYLES, 12)
    assert len({one.text for one in templates}) == len({one.name for one in templates}) == 36
    for one in templates:
        assert one.text.count("{A}") == one.text.count("{B}") == 1 and one.operator
        assert not one.text.endswith(" ")
    texts = [one.render({"A": a, "B": b}).text for one in templates for a, b in operand_pairs(sign)]
    assert len(set(texts)) == len(texts)  # distinct (template, A, B) means distinct prompts


def test_render_says_where_things_are():
    done = Template("The [sum] of {A} and {B} is", "t", "statement").render({"A": 12, "B": 3}, "nothing")
    assert done.text == "The nothing of 12 and 3 is"
    assert {name: done.text[a:b] for name, (a, b) in done.spans.items()} == {"operator": "nothing", "A": "12", "B": "3"}
    with pytest.raises(InputError, match=r"template t: no value for slot \{B\}"):
        Template("{A} [+] {B}", "t", "equation").render({"A": 1})


def test_operand_pairs_give_whole_answers():
    assert len(operand_pairs("+")) == len(operand_pairs("*")) == len(operand_pairs("/")) == 81
    assert len(operand_pairs("-")) == 45
    assert all(solve("-", a, b) >= 0 for a, b in operand_pairs("-"))
    assert all(a % b == 0 and 1 <= a // b <= 9 for a, b in operand_pairs("/"))


@pytest.mark.parametrize("corruption", tasks.CORRUPTIONS)
@pytest.mark.parametrize("sign", SIGNS)
def test_families_change_what_they_say(sign, corruption):
    tokenizer = byte_level()
    pairs = tasks.arithmetic(tokenizer, sign, corruption, n=120, seed=3)
    assert len(pairs) == len(set(pairs.prompts)) == 120
    strata = pairs.strata
    for row, answer in enumerate(pairs.answer_texts):
        a, b = int(strata["operand_a"][row]), int(strata["operand_b"][row])
        x, y = int(strata["corrupted_operand_a"][row]), int(strata["corrupted_operand_b"][row])
        assert solve(sign, a, b) == int(answer) and tokenizer.decode([pairs.answers[row]]).strip() == answer
        moved = {"operator": (False, False), "operand_a": (True, False), "operand_b": (False, True)}
        assert (a != x, b != y) == moved.get(corruption, (True, True))
        if corruption == "operator":
            assert strata["null"][row] in ("nothing", "<")
        else:
            assert solve(sign, x, y) != int(answer) and (x, y) in operand_pairs(sign)
        differing = set(pairs.roles[row][pairs.clean[row] != pairs.corrupted[row]].tolist())
        expected = {"operator": {3}, "operand_a": {1}, "operand_b": {2}, "operands": {1, 2}}[corruption]
        assert differing == expected
        words = {role: tokenizer.decode(pairs.clean[row][pairs.roles[row] == role]).strip() for role in (1, 2)}
        assert words == {1: str(a), 2: str(b)}
    assert len(set(strata["template"])) > 20 and set(strata["style"]) == set(tasks.STYLES)


def test_deterministic_and_seeded():
    tokenizer = byte_level()
    one, same, other = (tasks.arithmetic(tokenizer, n=50, seed=seed, corruption="operands") for seed in (0, 0, 1))
    assert one.prompts == same.prompts and one.corrupted_prompts == same.corrupted_prompts
    assert np.array_equal(one.clean, same.clean) and one.settings == same.settings
    assert one.prompts != other.prompts
    assert tasks.arithmetic(tokenizer, n=50, seed=0).prompts == one.prompts  # clean prompts of both families


def test_names_styles_and_operands():
    tokenizer = byte_level()
    for names in (("+", "add", "plus"), ("-", "sub", "\u2212"), ("*", "mul", "\u00d7"), ("/", "div", "\u00f7")):
        assert len({tasks.arithmetic(tokenizer, name, n=5).prompts for name in names}) == 1
    pairs = tasks.arithmetic(tokenizer, n=40, styles=("question",))
    assert set(pairs.strata["style"]) == {"question"} and pairs.settings["styles"] == ["question"]
    pairs = tasks.arithmetic(tokenizer, n=40, operands=(2, 4))
    assert set(pairs.strata["operand_a"]) == {2, 3, 4}
    assert pairs.settings["operator"] == "+" and pairs.settings["corruption"] == "operator"


@pytest.mark.parametrize("make", [lambda: byte_level(True), metaspace, lambda: WithoutOffsets(metaspace())])
def test_digit_splitting_leaves_one_digit_answers_and_counts_the_rest(make):
    pairs = tasks.arithmetic(make(), "*", n=100)
    assert all(len(answer) == 1 for answer in pairs.answer_texts)
    assert pairs.settings["space_answer"] == "prompt" and pairs.prompts[0].endswith(" ")
    dropped = pairs.settings["dropped"]
    assert dropped["answer_not_one_token"] == pairs.settings["tried"] - 100 > 0
    by_template = pairs.settings["dropped_by_template"]
    assert sum(sum(counts.values()) for counts in by_template.values()) == sum(dropped.values())
    with pytest.raises(AlignmentError, match=r"answer '\d\d': the answer is not one token"):
        tasks.arithmetic(make(), "*", n=100, on_misaligned="raise")


def test_division_of_split_numbers_keeps_lengths_equal():
    pairs = tasks.arithmetic(metaspace(), "/", "operand_a", n=150)
    digits = [
        len(str(a)) == len(str(b))
        for a, b in zip(*(pairs.strata[k] for k in ("operand_a", "corrupted_operand_a")), strict=True)
    ]
    assert all(digits) and max(pairs.strata["operand_a"]) > 9
    assert "length_differs" not in pairs.settings["dropped"]  # swaps are drawn among numbers of as many digits


def test_too_few_say_how_many_and_why():
    with pytest.raises(AlignmentError, match="asked for 5000 pairs, 2916 remain of 2916 distinct ones;"):
        tasks.arithmetic(byte_level(), n=5000)
    with pytest.raises(
        AlignmentError, match=r"asked for 900 pairs, 828 remain of 2916.*left out: 2088 because the answer"
    ):
        tasks.arithmetic(metaspace(), "*", n=900)
    assert len(tasks.arithmetic(metaspace(), "*", n=828)) == 828


def test_nulls_of_the_wrong_length_are_passed_over(monkeypatch):
    tokenizer = byte_level()
    long = {"symbol": ("zq zq", "<"), "word": ("qzxwv", "none")}
    monkeypatch.setitem(tables.NULLS, "+", long)
    assert set(tasks.arithmetic(tokenizer, n=100).strata["null"]) == {"<", "none"}
    monkeypatch.setitem(tables.NULLS, "+", {**long, "word": ("qzxwv",)})
    pairs = tasks.arithmetic(tokenizer, n=100)
    assert set(pairs.strata["null"]) == {"<"} and pairs.settings["dropped"]["no_null"] > 0
    with pytest.raises(AlignmentError, match="no null word has as many tokens"):
        tasks.arithmetic(tokenizer, n=100, on_misaligned="raise")
    with pytest.raises(AlignmentError, match="remain of 972 distinct ones; left out: 972 because no null word"):
        monkeypatch.setitem(tables.NULLS, "+", {"symbol": ("zq zq",), "word": ("qzxwv",)})
        tasks.arithmetic(tokenizer, n=100, styles=("statement",))


def test_unknown_arguments_list_the_known_ones():
    tokenizer = byte_level()
    with pytest.raises(InputError, match=r"operator: expected one of \+, -, \*, / \(or add.*got 'pow'"):
        tasks.arithmetic(tokenizer, "pow")
    with pytest.raises(
        InputError, match="corruption: expected one of operator, operand_a, operand_b, operands, got 'both'"
    ):
        tasks.arithmetic(tokenizer, corruption="both")
    with pytest.raises(InputError, match="styles: expected one of equation, statement, question, got 'poem'"):
        tasks.arithmetic(tokenizer, styles=("poem",))
    with pytest.raises(InputError, match="styles: expected a sequence"):
        tasks.arithmetic(tokenizer, styles="question")
    with pytest.raises(InputError, match="styles: expected at least one"):
        tasks.arithmetic(tokenizer, styles=())
    with pytest.raises(InputError, match="on_misaligned: expected one of raise, drop"):
        tasks.arithmetic(tokenizer, on_misaligned="skip")
    for n in (0, -1, 2.5):
        with pytest.raises(InputError, match="n: expected a positive whole number"):
            tasks.arithmetic(tokenizer, n=n)
    for operands in ((9, 1), (-3, 4), (1, 2, 3), (0.5, 2)):
        with pytest.raises(InputError, match="operands: expected whole numbers"):
            tasks.arithmetic(tokenizer, operands=operands)


def test_collect_serves_any_task():
    from pyarith.prompts import Aligner

    rows = [
        Candidate("3 plus 5 is", "3 nothing 5 is", "8", {"template": "t"}, ((2, 6),), {"operator": (2, 6)}),
        Candidate("4 plus 5 is", "4 nothing 5 is", "9", {"template": "t"}, refused="no_null"),
    ]
    got = collect(rows, Aligner(byte_level()), 1, on_misaligned="drop", settings={"task": "mine"})
    assert got.settings["task"] == "mine" and got.settings["tried"] == 1
