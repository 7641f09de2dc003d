"""``discover(top_k=...)``: the right heads for few rows, with the numbers of the full run on the prompts it needed."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from planted import KEY_HEADS, SUM0, problem
from single_thread import one_thread  # noqa: F401

import pyarith as pa
from pyarith.discovery import adaptive
from pyarith.discovery.adaptive import TopHeads
from pyarith.discovery.patching import patch
from pyarith.engine.replay import Replay
from pyarith.errors import InputError
from pyarith.prompts import PromptPairs
from pyarith.types import Head

KEYS = [Head(*head) for head in KEY_HEADS["ab"]]


def problems(fills: tuple[int, ...] = (0,), share: int = 1) -> PromptPairs:
    """``a + b`` against ``c + d`` of another sum, each with all numbers of fillers; an item is one such change."""
    digits = range(5)
    changes = [c for c in product(digits, digits, digits, digits) if c[0] + c[1] != c[2] + c[3]][::share]
    rows = [(problem(a, b, fill), problem(c, d, fill), a + b, item) for item, (a, b, c, d) in enumerate(changes)
            for fill in fills]  # fmt: skip
    width = max(len(row[0]) for row in rows)
    ids = [np.array([row[i] + [0] * (width - len(row[0])) for row in rows]) for i in (0, 1)]
    return PromptPairs(
        prompts=tuple(map(str, range(len(rows)))),
        corrupted_prompts=tuple(map(str, range(len(rows)))),
        answer_texts=tuple(str(row[2]) for row in rows),
        clean=ids[0],
        corrupted=ids[1],
        attention_mask=np.array([[i < len(row[0]) for i in range(width)] for row in rows]),
        answers=np.array([SUM0 + row[2] for row in rows]),
        strata={"item": np.array([row[3] for row in rows])},
    )


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return planted.adder().float()


def find(model: torch.nn.Module, pairs: PromptPairs, **options: object) -> pa.discovery.discover.Discovery:
    return pa.discover(model, pairs, progress=False, **{"verify": 0, **options})


@pytest.fixture(scope="module")
def found(model: torch.nn.Module) -> pa.discovery.discover.Discovery:
    return find(model, problems(), top_k=2, verify=1)


def test_planted_heads_for_a_fifth_of_the_rows(model: torch.nn.Module, found: pa.discovery.discover.Discovery) -> None:
    top, pairs = found.top, problems()
    assert sorted(top.heads) == KEYS and not top.undecided
    whole = find(model, pairs.subset(range(10)), senders=("heads",))
    assert top.rows_full == whole.result.settings["rows"] // 10 * len(pairs)
    assert top.rows == sum(one["rows"] for one in found.result.settings["rounds"]) <= top.rows_full / 5
    assert top.n_given == len(pairs) and top.n_used == len(found.pairs) == found.result.clean_logits.size
    assert top.n_prompts.max() == top.n_used < len(pairs) / 5
    assert found.result.verification_error is not None and found.result.verification_error < 1e-4
    inside = [top.low[head] <= top.change[head] <= top.high[head] for head in KEYS]
    assert all(inside) and all(top.high[head] < 0 for head in KEYS)
    assert "with confidence 0.95" in top.guarantee and "all heads are decided" in top.guarantee
    assert found.correct.all() and found.n_wrong == found.n_left_out == 0


def test_numbers_are_the_full_run_s(model: torch.nn.Module) -> None:
    """Two passes over items of two prompts, to the end: 1.2 and 2.0 differ by less than so few items can tell."""
    pairs = problems(fills=(0, 2), share=8)
    part = find(model, pairs, top_k=1, tolerance=0.0)
    assert part.top.undecided == KEYS and part.top.n_used == len(pairs)
    assert "2 heads for 1 of the 1 places" in part.top.guarantee
    assert sorted(part.pairs.prompts) == sorted(pairs.prompts)  # each prompt once
    whole = pa.fast_patch(model, part.pairs, senders=("heads",), progress=False, verify=0)
    run = ~np.isnan(part.result.head_logits)
    np.testing.assert_allclose(part.result.head_logits[run], whole.head_logits[run], atol=1e-5)
    assert run.sum(-1).tolist() == part.top.n_prompts.tolist()
    items = part.pairs.strata["item"]
    for head in KEYS:
        means = [whole.head_changes[head][items == item].mean() for item in np.unique(items)]
        np.testing.assert_allclose(part.top.change[head], np.mean(means), atol=1e-5)
        assert part.top.n_prompts[head] == len(pairs) and part.top.n_clusters[head] == len(means)
    alive = part.result.head_changes[1, 2]
    np.testing.assert_allclose(part.result.head_effects[1, 2], (alive / part.result.clean_logits).mean(), rtol=1e-6)
    first = part.result.settings["rounds"][0]
    assert first["heads"] == 16 and part.top.n_prompts.min() == first["prompts"] == first["clusters"]
    assert np.isfinite(part.result.head_effects).all() and part.result.top(2)[0].head in KEYS


def test_tolerance_makes_ties(model: torch.nn.Module) -> None:
    pairs = problems(share=2)
    strict = find(model, pairs, top_k=1, tolerance=0.0).top
    loose = find(model, pairs, top_k=1, tolerance=8.0).top
    assert not loose.undecided and loose.rows < strict.rows and loose.heads[0] in KEYS
    assert loose.tied[1, 2] and loose.tied[2, 0] and "as ties, by no more than 8 logits" in loose.guarantee


def test_silent_heads_are_ties_within_the_noise(model: torch.nn.Module) -> None:
    """k beyond the heads that do anything: the rest are equal but for rounding, and are not raced to the end."""
    top = find(model, problems(), top_k=4).top
    assert set(KEYS) < set(top.heads) and not top.undecided and top.rows < top.rows_full / 5
    assert top.tolerance < 1e-4 and top.tied.sum() == 14


def test_senders_are_run_again_once(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(adaptive, "patch", lambda *a, **k: asked.append(k["verify"]) or patch(*a, **k))
    assert find(model, problems(share=8), top_k=1, tolerance=0.0, verify=3).result.verification_error < 1e-4
    assert asked[0] == 3 and len(asked) > 2 and not any(asked[1:])


def test_seed_is_the_order(model: torch.nn.Module, found: pa.discovery.discover.Discovery) -> None:
    again, other = (find(model, problems(), top_k=2, seed=seed) for seed in (0, 1))
    assert again.pairs.prompts == found.pairs.prompts != other.pairs.prompts
    np.testing.assert_array_equal(again.result.head_logits, found.result.head_logits)


def test_wrong_answers_are_left_out(model: torch.nn.Module) -> None:
    pairs = problems(share=2)
    answers = pairs.answers.copy()
    answers[::3] = SUM0 + (answers[::3] - SUM0 + 1) % 9
    wrong = PromptPairs(**{**vars(pairs), "answers": answers})
    kept = find(model, wrong, top_k=2, only_correct=True)
    assert kept.n_left_out == len(answers[::3]) == kept.n_wrong and kept.correct.all()
    assert kept.top.n_given == len(pairs) - kept.n_left_out and sorted(kept.top.heads) == KEYS
    mixed = find(model, wrong, top_k=2)
    assert mixed.n_left_out == 0 and 0 < mixed.n_wrong == (~mixed.correct).sum() < len(mixed.pairs)


def test_record_comes_back(found: pa.discovery.discover.Discovery) -> None:
    record = json.loads(json.dumps(found.top.record(), allow_nan=False))
    again = TopHeads.from_record(record)
    for name, value in vars(found.top).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    assert repr(again) == repr(found.top) and record["heads"] == list(map(str, found.top.heads))


def test_no_intervals_of_a_fixed_sample(found: pa.discovery.discover.Discovery) -> None:
    with pytest.raises(InputError, match=r"confidence: .*Discovery\.top"):
        found.result.confidence(found.pairs)


def test_saved_result_comes_back(found: pa.discovery.discover.Discovery, tmp_path: Path) -> None:
    found.result.save(tmp_path)
    again = pa.PatchResult.load(tmp_path)
    np.testing.assert_array_equal(again.head_logits, found.result.head_logits)
    assert again.settings["rounds"] == found.result.settings["rounds"]


def test_goes_on_from_finished_rounds(
    model: torch.nn.Module, found: pa.discovery.discover.Discovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find(model, problems(), top_k=2, verify=1, resume=tmp_path)
    parts = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Replay, "run", lambda *_: pytest.fail("a finished block was run again"))
    again = find(model, problems(), top_k=2, resume=tmp_path)
    assert parts == sorted(tmp_path.iterdir())
    for one in (first, again):
        assert one.top.record() == found.top.record()
        np.testing.assert_array_equal(one.result.head_logits, found.result.head_logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k: expected a whole number >= 1, got 0"),
        ({"top_k": 16}, "top_k: expected fewer than the 16 heads"),
        ({"top_k": 2, "confidence": 95}, "confidence: expected a number between 0 and 1"),
        ({"top_k": 2, "tolerance": -1.0}, "tolerance: expected a number of logits >= 0"),
        ({"top_k": 2, "tolerance": math.nan}, "tolerance: expected a number of logits >= 0"),
        ({"top_k": 2, "senders": ("mlps",)}, "senders: .*leave senders out"),
        ({"tolerance": 0.1}, "tolerance: expected None without top_k, got 0.1"),
    ],
)
def test_bad_options(
    model: torch.nn.Module, options: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive, "patch", lambda *_, **__: pytest.fail("something was run"))
    with pytest.raises(InputError, match=words):
        find(model, problems(share=40), **options)


@pytest.mark.parametrize("strata", [{}, {"item": np.zeros(14)}], ids=["none", "one"])
def test_no_clusters(model: torch.nn.Module, strata: dict[str, np.ndarray]) -> None:
    pairs = problems(share=40)
    with pytest.raises(InputError, match=r"expected strata|at least 5"):
        find(model, PromptPairs(**{**vars(pairs), "strata": strata}), top_k=2)
