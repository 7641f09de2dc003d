"""Operands and operators of the further tasks: where they stand in the text, and which tokens they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers_for_tests import byte_level, metaspace

import pyarith as pa
from pyarith import tasks

OPERATORS = {
    **{"power": {"^", "power"}, "two_digit_sum": {"+", "plus", "sum"}, "decimal_sum": {"+", "plus", "sum"}},
    **{"year_span": set(), "word_problem": set()},
}


@pytest.mark.parametrize("task", tasks.ARITHMETIC_TASKS)
def test_spans_are_the_operands_and_the_operator(task):
    seen = set()
    for problem in tasks.draw_problems(task, 150, 3):
        text = {name: problem.prompt[start:end] for name, (start, end) in problem.roles}
        a, b = re.split(r"[,+-]", problem.item)
        tenths = "0." if task == "decimal_sum" else ""
        assert (text["operand_a"], text["operand_b"]) == (tenths + a, tenths + b), problem
        starts = [span[0] for _, span in problem.roles]
        assert len(set(starts)) == len(starts) and "[" not in problem.prompt and "{" not in problem.prompt
        seen |= {text[name] for name in text if name == "operator"}
    assert seen == OPERATORS[task]


def test_other_problems():
    assert all(not problem.roles for task in tasks.CONTROL_TASKS for problem in tasks.draw_problems(task, 20))
    for problem in tasks.draw_problems("/", 50):
        text = {name: problem.prompt[start:end] for name, (start, end) in problem.roles}
        assert problem.item == f"{text['operand_a']},{text['operand_b']}"
        assert text["operator"] in ("/", "divide", "divided", "division", "quotient", "split")


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("task", ["power", "word_problem", "year_span"])
def test_roles_are_those_of_the_tokens(task, make):
    """All tokens of a role together are the operand."""
    tokenizer = make()
    pairs = tasks.problem_pairs(tokenizer, task, 12, fewer=True)
    for row in range(len(pairs)):
        for name, part in zip(("operand_a", "operand_b"), re.split(r"[,+-]", pairs.strata["item"][row]), strict=True):
            tokens = pairs.clean[row][pairs.roles[row] == pairs.role_names.index(name)]
            assert tokenizer.decode(tokens).strip() == part, pairs.prompts[row]


def test_attention_to_operands_of_another_task():
    """The head that reads both operands of sums reads them in powers and stories, too."""
    model, tokenizer = pa.load_demo()
    for task in ("power", "word_problem"):
        mass = pa.analysis.attention_mass(model, tasks.problem_pairs(tokenizer, task, 16), [(2, 7)])
        operands = [mass.roles.index(name) for name in ("operand_a", "operand_b")]
        assert mass.mean[0, operands].sum() > 0.95 and np.all(mass.role_tokens[:, operands] == 1)
