"""transfer tells how far it is, and goes on after a kill with what was finished."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from single_thread import one_thread  # noqa: F401

import pyarith as pa
from pyarith.engine.baselines import MeanAblation
from pyarith.errors import InputError, InputTypeError
from pyarith.evaluation import Items, named_task, transfer, transfer_runs

KEY = [(2, 7), (3, 3)]
LISTS = {"plus": KEY, "first": [(0, 0)]}
SETS = 2 * (1 + 2 * 1)  # two lists, each with one draw of two controls
FAST: dict[str, Any] = {"draws": 1, "verify": 0, "resamples": 100, "max_new_tokens": 5, "progress": False}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


@pytest.fixture(scope="module")
def tasks(demo):
    """One read off at END, one generated."""
    return {"kind": named_task(demo[1], "kind", 8), "copy": Items.from_problems(pa.tasks.draw_problems("copy", 6))}


@pytest.fixture
def seen(monkeypatch):
    """What is run from here on, by name."""
    calls: list[str] = []
    for name in ("ablation_sweep", "generate"):
        real = getattr(transfer_runs, name)

        def run(*rest: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            calls.append(name)
            return real(*rest, **options)

        monkeypatch.setattr(transfer_runs, name, run)
    real_mean = MeanAblation.from_inputs.__func__
    monkeypatch.setattr(
        MeanAblation, "from_inputs", classmethod(lambda *rest, **options: (calls.append("mean"), real_mean(*rest))[1])
    )
    return calls


def text(result, folder: Path) -> str:
    result.save(folder / "r.json")
    return (folder / "r.json").read_text()


def test_a_killed_transfer_goes_on_and_says_how_far_it_is(demo, tasks, seen, tmp_path):
    """Killed after each part in turn; the last two kills come when everything is done."""
    model, tokenizer = demo
    calls: list[tuple[int, int]] = []
    options = FAST | {"progress": lambda *call: calls.append(call)}
    whole = text(transfer(model, tokenizer, tasks, LISTS, **options), tmp_path)
    assert calls == [(8 * (1 + SETS), 14 * (1 + SETS))] + [
        (8 * (1 + SETS) + 6 * done, 14 * (1 + SETS)) for done in range(1, 2 + SETS)
    ]
    assert seen == ["mean", "ablation_sweep", "generate", "mean", *["generate"] * SETS]
    for stop in range(len(calls)):
        folder, told = tmp_path / str(stop), []

        def kill(*call: int, stop: int = stop) -> None:
            if call == calls[stop]:
                raise Killed

        with pytest.raises(Killed):
            transfer(model, tokenizer, tasks, LISTS, **FAST | {"progress": kill, "resume": folder})
        seen.clear()
        options = FAST | {"progress": lambda *call: told.append(call), "resume": folder}  # noqa: B023
        assert text(transfer(model, tokenizer, tasks, LISTS, **options), tmp_path) == whole and told == calls
        left = max(0, 1 + SETS - stop)
        assert seen.count("generate") == left and seen.count("ablation_sweep") == (stop == 0), stop
        assert seen.count("mean") == (stop == 0) + (left > 0)


def test_parts_are_taken_where_they_fit_and_are_whole(demo, tasks, seen, tmp_path):
    model, tokenizer = demo
    folder = tmp_path / "parts"
    whole = text(transfer(model, tokenizer, tasks, LISTS, resume=folder, **FAST), tmp_path)

    def again(**changed: Any) -> tuple[int, int, str]:
        seen.clear()
        arguments = {"tasks": tasks, "head_lists": LISTS, "resume": folder, **FAST} | changed
        found = text(transfer(model, tokenizer, **arguments), tmp_path)
        return seen.count("ablation_sweep"), seen.count("generate"), found

    assert again() == (0, 0, whole)
    assert again(seed=0, resamples=150)[:2] == (0, 0)
    assert again(tasks={"other name": tasks["copy"]})[:2] == (0, 0)
    assert again(head_lists={"first": [(0, 0)]})[:2] == (1, 0), "fewer sets: another sweep, no other answers"
    assert again(head_lists={"new": [(1, 1)]}, controls=[])[:2] == (1, 1)
    assert again(baseline="zero")[:2] == (1, 1 + SETS)
    mean = pa.MeanAblation.from_inputs(model, tasks["kind"].inputs()["clean"], tasks["kind"].inputs()["attention_mask"])
    assert again(baseline=mean)[:2] == (1, 1 + SETS)
    assert again(max_new_tokens=6)[:2] == (0, 1 + SETS)
    assert again(tasks={"copy": Items.from_problems(pa.tasks.draw_problems("copy", 7))})[:2] == (0, 1 + SETS)
    copies = tasks["copy"]
    for other in (replace(copies, answers=("cat",) * 6), Items(copies.prompts, ("7",) * 6, "number")):
        assert again(tasks={"copy": other})[:2] == (0, 1 + SETS)
    pairs = tasks["kind"]
    assert again(tasks={"kind": replace(pairs, answers=pairs.answers + 1)})[:2] == (1, 0)
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data[0, 0] += 1
        assert again()[:2] == (1, 1 + SETS)
    finally:
        weight.data.copy_(kept)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert again() == (1, 1 + SETS, whole) and again() == (0, 0, whole)


def test_what_is_refused(demo, tasks, tmp_path):
    model, tokenizer = demo
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="resume: expected a folder, got the file"):
        transfer(model, tokenizer, tasks, LISTS, resume=tmp_path / "file", **FAST)
    with pytest.raises(InputTypeError, match="progress: expected None, False or a callable"):
        transfer(model, tokenizer, tasks, LISTS, **FAST | {"progress": "bar"})
    with pytest.raises(InputError, match="resume: expected a model without hooks"), pa.ablated(model, KEY):
        transfer(model, tokenizer, tasks, LISTS, resume=tmp_path / "parts", **FAST)
    assert not (tmp_path / "parts").exists()
