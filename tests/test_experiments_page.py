"""docs/experiments.md: every number in it comes from the records beside it, and these from the demo model."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest

import pyarith as pa
from pyarith import analysis
from pyarith.errors import InputError
from pyarith.reporting import model_fingerprint
from pyarith.reporting.experiments import DEMO, EXPERIMENTS, read_all, render, words
from pyarith.types import Head

ROOT = Path(__file__).parents[1]
OUT, PAGE = Path("docs/experiments"), Path("docs/experiments.md")
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
RECORDS = read_all(ROOT / OUT, list(EXPERIMENTS))


@pytest.fixture(scope="module")
def loaded():
    return pa.load_demo()


def test_page_is_what_the_records_say():
    again = "pyarith reproduce all --also runs/demo-gqa --out docs/experiments --page docs/experiments.md"
    assert render(EXPERIMENTS, RECORDS, OUT, PAGE) == TEXT, f"write the page anew: {again}"
    assert f"\n{again}\n```" in TEXT and "Quick run" not in TEXT
    assert "```sh\npython -m pyarith.demo.train --out runs/demo-gqa --seed 1 --kv-heads 2" in TEXT


def test_all_experiments_are_there_in_full_and_small(loaded):
    assert list(RECORDS) == list(EXPERIMENTS)
    for name, record in RECORDS.items():
        assert not record["quick"] and record["model"]["name"] == DEMO and record["results"]
        assert {**EXPERIMENTS[name].settings, **record["settings"]} == record["settings"]
        assert record["settings"]["n"] == EXPERIMENTS[name].settings["n"]
        assert record["model"]["fingerprint"] == model_fingerprint(loaded[0])
        assert all((ROOT / OUT / picture).read_bytes().startswith(b"\x89PNG") for picture in record["pictures"])
    assert sum(path.stat().st_size for path in (ROOT / OUT).glob("*.json*")) < 300_000
    assert sum(path.stat().st_size for path in (ROOT / OUT).iterdir()) < 1_000_000
    assert RECORDS["E2"]["also"][0]["kv_heads"] < RECORDS["E2"]["also"][0]["heads"]


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-") for line in TEXT.split("\n") if line[:3] == "## "
    }
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert targets and "[" not in "".join(targets)
    for target in targets:
        assert target[1:] in anchors if target.startswith("#") else (ROOT / PAGE.parent / target).is_file(), target


def test_nothing_of_this_machine_is_in_the_records():
    for name in RECORDS:
        text = (ROOT / OUT / f"{name}.json").read_text(encoding="utf-8")
        assert not re.search(r'"/\w|\b(root|home|tmp)/', text), name


# numbers of the records, computed again by the functions that users call


@pytest.mark.parametrize("sign", "+/")
def test_e1_head_effects(loaded, sign):
    model, tokenizer = loaded
    told, settings = RECORDS["E1"]["results"]["operators"][sign], RECORDS["E1"]["settings"]
    pairs = pa.tasks.arithmetic(tokenizer, sign, "operator", n=settings["n"], seed=settings["seed"])
    result = pa.fast_patch(model, **pairs.inputs(), senders=("heads",), verify=0, progress=False)
    top = told["families"]["operator"]["heads"][0]
    assert str(result.top(1)[0].head) == top["head"]
    assert float(result.head_effects[Head.parse(top["head"])]) == pytest.approx(top["effect"], rel=1e-4)
    np.testing.assert_allclose(result.head_effects, np.array(told["effects"]), rtol=1e-3, atol=2e-5)
    assert [str(head) for head in result.key_heads()] == [one["head"] for one in told["families"]["operator"]["heads"]]


def test_e5_accuracy_without_the_strongest_head(loaded):
    model, tokenizer = loaded
    told, settings = RECORDS["E5"]["results"]["operators"]["-"], RECORDS["E5"]["settings"]
    pairs = pa.tasks.arithmetic(tokenizer, "-", n=settings["n"], seed=settings["seed"])
    report = pairs.subset(pa.stats.select_report(pairs, seed=settings["seed"])[1])
    order = [Head.parse(text) for text in told["heads"]]
    every = [Head(i, j) for i in range(6) for j in range(8)]
    ranking = order + [head for head in every if head not in order]
    found = pa.knockout_curve(
        model, report, ranking, ks=[1, 5], controls=(), keep=False, seed=0, verify=0, progress=False
    )
    places = [told["ks"].index(k) for k in (1, 5)]
    np.testing.assert_allclose(found.arms["key"].accuracy[0], np.array(told["accuracy"]["key"][0])[places], atol=1e-5)


def test_e11_cosines(loaded):
    model, tokenizer = loaded
    told, settings = RECORDS["E11"]["results"]["operators"]["*"], RECORDS["E11"]["settings"]
    pairs = pa.tasks.arithmetic(tokenizer, "*", n=settings["n"], seed=settings["seed"])
    found = analysis.mlp_cosines(model, pairs)
    np.testing.assert_allclose(found.mean["answer"], told["mean"]["answer"], rtol=1e-4, atol=1e-5)
    assert list(found.points) == told["points"]["answer"]


# words follow the numbers


def changed(name, change):
    """The section of a record with other numbers."""
    record = copy.deepcopy(RECORDS[name])
    change(record["results"])
    return "\n\n".join(EXPERIMENTS[name].section(record))


def test_e1_says_whether_the_share_is_below_five_percent():
    def few(results):
        for one in results["operators"].values():
            one["families"]["operator"]["share"] = 1 / 48

    def many(results):
        results["operators"]["*"]["families"]["operator"]["share"] = 0.5

    assert "lies below the paper's 5 %" in changed("E1", few)
    assert "reaches above the paper's 5 %" in changed("E1", many) and "to 50.0 %" in changed("E1", many)


def test_e5_says_whether_key_heads_harm_more_than_others():
    def alike(results):
        one = results["operators"]["+"]
        one["p"]["same_layer"] = [1.0] * len(one["ks"])

    text = changed("E5", alike)
    assert text.count("at no k do key heads harm more") == 1
    assert "`/`: not done: nothing" in changed("E5", lambda r: r["operators"].update({"/": {"reason": "nothing"}}))


def test_e3_says_whether_multiplication_uses_more_heads():
    def more(results):
        keys = results["families"]["operator"]["key_heads"]
        for sign, size in zip("+-*/", (1, 1, 3, 3), strict=True):
            keys[sign] = ["2.7"] * size

    assert changed("E3", more).count("than `+` and `-` holds here") == 1


def test_e10_tells_spared_tasks_from_harmed_ones():
    def spare(results):
        for row in results["rows"]:
            if row["heads"] == "-" and not row["task"].startswith("own"):
                row["relative_drop_correct"] = 0.0

    text = changed("E10", spare)
    assert re.search(r"`-`: itself [^;]+; harmed by more than 5 %: none; spared: copy", text)


def test_numbers_that_are_missing_are_shown_as_such():
    assert words.percent(None) == words.signed(None) == words.number(None) == words.few(None) == "n/a"
    assert words.interval(None, 0.1) == "n/a" and words.interval(-0.1, 0.1) == "-10.0 .. +10.0 %"
    assert words.listing([]) == "none" and words.listing("ab") == "a and b" and words.listing("abc") == "a, b and c"
    assert words.table(["a", "b"], [["x|y", 1]]) == "| a | b |\n|---|---|\n| x\\|y | 1 |"
    assert words.count(1, "head") == "1 head" and words.count(0, "head") == "0 heads"


def test_an_empty_folder_gives_no_page(tmp_path):
    with pytest.raises(InputError, match="at least one record"):
        render(EXPERIMENTS, read_all(tmp_path, list(EXPERIMENTS)), tmp_path, tmp_path / "page.md")
