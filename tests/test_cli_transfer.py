"""pyarith transfer: end to end on the demo model, files of heads and of items, going on after a kill, refusals."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from single_thread import on_one_thread, one_thread  # noqa: F401
from tokenizers_for_tests import byte_level
from typer.testing import CliRunner

import pyarith as pa
from pyarith import evaluation
from pyarith.cli import app
from pyarith.errors import InputError
from pyarith.evaluation import Items, TransferResult, load_heads, save_heads, transfer_runs
from pyarith.plots import transfer_figure
from pyarith.reporting import SavedRun
from pyarith.reporting.files import file_hash
from pyarith.reporting.knockouts import choose
from pyarith.reporting.transfers import default_tasks, draw

MODEL = Path(pa.__file__).parent / "demo" / "model"
FAST = ("--draws", 2, "--verify", 0, "--n", 12, "--max-new-tokens", 6, "--top", 2)
TASKS = ("--task", "+", "--task", "div", "--task", "year_span", "--task", "sort")


def pyarith(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def files(path):
    return {str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def discovered(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mine"
    with on_one_thread():
        done = pyarith("discover", MODEL, "--operator", "+", "--operator", "-", "--n", 24, "--verify", 0, "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def transferred(discovered, tmp_path_factory):
    path = Path(shutil.copytree(discovered, tmp_path_factory.mktemp("runs") / "done"))
    rows = [{"prompt": "2 + 3 =", "answer": "5"}, {"prompt": "4 plus 4 is", "answer": "8"}] * 3
    questions = path.parent / "own questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    with on_one_thread():
        done = pyarith("transfer", path, *FAST, *TASKS, "--data", questions)
    assert done.exit_code == 0, done.output
    return path, done


@pytest.fixture
def run(discovered, tmp_path):
    return Path(shutil.copytree(discovered, tmp_path / "run"))


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


def refused(done, *words):
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("pyarith: error: ")
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr!r}"


def test_it_writes_and_prints_what_transfer_gives(transferred, demo):
    path, done = transferred
    model, tokenizer = demo
    saved = SavedRun.open(path)
    lists = {sign: saved.key_heads(sign, -0.05)[:2] for sign in "+-"}
    fresh = choose(saved, tokenizer, "+", "fresh", 12, 1)
    tasks = {"+": fresh.pairs}
    tasks |= {name: evaluation.named_task(tokenizer, name, 12, 1) for name in ("/", "year_span", "sort")}
    tasks["own questions"] = evaluation.load_items(path.parent / "own questions.jsonl", limit=12)
    options = {"draws": 2, "seed": 1, "n": 12, "max_new_tokens": 6, "verify": 0, "progress": False}
    direct = evaluation.transfer(model, tokenizer, tasks, lists, **options)
    found = TransferResult.load(path / "transfer" / "result.json")
    assert repr(found) == repr(direct) and found.rows() == direct.rows()
    rows = read(path / "transfer" / "transfer.csv")
    assert [(row["task"], row["heads"]) for row in rows] == [(task, name) for task in tasks for name in lists]
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in direct.rows()]
    record = json.loads((path / "transfer" / "transfer.json").read_text())
    assert record["lists"] == {sign: [str(head) for head in heads] for sign, heads in lists.items()}
    assert record["settings"]["task"] == ["+", "/", "year_span", "sort"] and record["drawn"] == {"+": fresh.words}
    assert (
        record["settings"]["data"][0]["hash"].startswith("sha256:") and record["tasks"]["own questions"]["items"] == 6
    )
    names = {"result.json", "transfer.csv", "transfer.png", "heads_add.json", "heads_sub.json", "transfer.json"}
    assert {p.name for p in (path / "transfer").iterdir()} == names and set(record["hashes"]) == names - {
        "transfer.json"
    }
    assert not list(path.glob(".*"))
    cell = direct.cell("year_span", "-")
    first, second = (line for line in done.stdout.split("year_span")[1].splitlines()[:2])
    assert first.split()[-2:] == [f"{100 * cell.accuracy:.1f}", f"{100 * cell.relative_drop_correct:.0f}%"]
    means = [f"{100 * np.mean(cell.controls[name].accuracy):.1f}" for name in ("same_layer", "random")]
    assert second.split()[-3:] == [means[0], "/", means[1]]
    assert f"+  2 heads: {lists['+'][0]} {lists['+'][1]}" in done.stdout and fresh.words in done.stdout


def test_again_is_done_already_unless_changed_or_forced(transferred, tmp_path):
    path = Path(shutil.copytree(transferred[0], tmp_path / "run"))
    data = ("--data", transferred[0].parent / "own questions.jsonl")
    before = files(path)
    done = pyarith("transfer", path, *FAST, *TASKS, *data)
    assert done.exit_code == 0 and done.stdout.startswith("Done already: ") and files(path) == before
    done = pyarith("transfer", path, *FAST, "--task", "kind")
    assert done.exit_code == 0 and "Wrote" in done.stdout and "heads_add.json" in done.stdout
    (path / ".transfer.parts").mkdir()
    assert "Wrote" in pyarith("transfer", path, *FAST, "--task", "kind", "--force").stdout
    assert not (path / ".transfer.parts").exists()
    assert "Transfer" in pyarith("report", path).stdout.splitlines()[0], "the report shows the step"
    again = pyarith("discover", MODEL, "--n", 6, "--verify", 0, "--out", path)
    assert again.exit_code == 0 and not (path / "transfer").exists(), "a step of the run before"


def test_saved_lists_apply_to_another_run_and_model(transferred, run, tmp_path):
    """A list of the step, and one of a model with other weights, which is said."""
    other = tmp_path / "other model.json"
    model, _ = pa.load_demo()
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.add_(1)
        save_heads(other, ["3.3"], model=model)
    finally:
        weight.data.copy_(kept)
    own = transferred[0] / "transfer" / "heads_sub.json"
    done = pyarith("transfer", run, *FAST, "--heads", own, "--heads", other, "--task", "kind")
    assert done.exit_code == 0, done.output
    assert (
        done.stderr.count("\n") == 1 and "other model: heads: made with another model of the same sizes" in done.stderr
    )
    found = TransferResult.load(run / "transfer" / "result.json")
    assert found.head_lists == ("heads_sub", "other model")
    assert found.cell("kind", "heads_sub").head_names == tuple(map(str, load_heads(own).heads))
    assert load_heads(run / "transfer" / "heads_heads_sub.json", model).meta == load_heads(own).meta
    assert load_heads(own).meta["operator"] == "-"


def test_default_tasks(transferred, discovered, demo):
    _, tokenizer = demo
    plus, minus = (load_heads(transferred[0] / "transfer" / f"heads_{name}.json") for name in ("add", "sub"))
    rest = [*pa.tasks.ARITHMETIC_TASKS, *pa.tasks.CONTROL_TASKS]
    assert default_tasks({"+": plus}) == ["-", "*", "/", *rest]
    assert default_tasks({"+": plus, "-": minus}) == ["+", "-", "*", "/", *rest]
    assert default_tasks({"file": evaluation.HeadList(plus.heads)}) == ["+", "-", "*", "/", *rest]
    saved = SavedRun.open(discovered)
    drawn = draw(saved, tokenizer, rest, {}, 50, 1, strict=False)
    assert list(drawn.tasks) == rest and not drawn.left_out and len(drawn.tasks["kind"]) == 32


def test_tasks_without_one_token_answers_are_generated_with_as_many_items_as_there_are():
    def letters(texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    tokenizer = copy.copy(byte_level())
    tokenizer.__class__ = type("Letters", (tokenizer.__class__,), {"__call__": lambda self, texts, **_: letters(texts)})
    found = evaluation.named_task(tokenizer, "kind", 50, 1)
    assert isinstance(found, Items) and len(found) == 32


def test_tasks_that_cannot_be_drawn_are_left_out_only_when_none_was_asked_for(discovered, demo, monkeypatch):
    _, tokenizer = demo
    saved = SavedRun.open(discovered)
    from pyarith.reporting import transfers

    def fail(_tokenizer, name, *rest):
        if name == "power":
            raise InputError("answers of two tokens")
        return evaluation.named_task(_tokenizer, name, *rest)

    monkeypatch.setattr(transfers, "named_task", fail)
    drawn = draw(saved, tokenizer, ["power", "kind"], {}, 5, 1, strict=False)
    assert list(drawn.tasks) == ["kind"] and drawn.left_out == {"power": "answers of two tokens"}
    with pytest.raises(InputError, match="task power: answers of two tokens"):
        draw(saved, tokenizer, ["power", "kind"], {}, 5, 1, strict=True)
    with pytest.raises(InputError, match=r"none of the tasks can be drawn .*power: answers of two tokens"):
        draw(saved, tokenizer, ["power"], {}, 5, 1, strict=False)


def test_a_task_that_is_never_right_is_said(run, tmp_path):
    (tmp_path / "wrong.csv").write_text("prompt,answer\n2 + 3 =,77\n1 + 1 =,78\n")
    done = pyarith("transfer", run, *FAST, "--data", tmp_path / "wrong.csv")
    assert done.exit_code == 0, done.output
    assert "never right in the intact model, so nothing to knock out: wrong" in done.stdout and "n/a" in done.stdout
    assert json.loads((run / "transfer" / "transfer.json").read_text())["never_right"] == ["wrong"]


def test_killed_in_the_middle_it_goes_on(transferred, run, monkeypatch):
    """In the generation of the last task: what was finished is not run again, and the result is the same."""
    arguments = ("transfer", run, *FAST, *TASKS, "--data", transferred[0].parent / "own questions.jsonl")
    seen, limit = [], [5]
    for name in ("ablation_sweep", "generate"):
        real = getattr(transfer_runs, name)

        def counted(*rest, name=name, real=real, **options):
            if seen.count("generate") == limit[0]:
                raise KeyboardInterrupt
            seen.append(name)
            return real(*rest, **options)

        monkeypatch.setattr(transfer_runs, name, counted)
    before = files(run)
    assert pyarith(*arguments).exit_code == 130
    assert seen == ["ablation_sweep"] * 3 + ["generate"] * 5
    left = {name for name in files(run) if name not in before}
    assert left and all(name.startswith(".transfer.parts/") for name in left)
    (next(run.glob(".transfer.parts/*"))).write_bytes(b"half")  # and one file is damaged
    seen.clear()
    limit[0] = -1
    done = pyarith(*arguments)
    assert done.exit_code == 0 and "Going on with the parts that an interrupted run left" in done.stderr
    sets = len({tuple(one.heads) for one in _sets(run)})
    assert seen.count("ablation_sweep") + seen.count("generate") <= 2 * (1 + sets) - 5 + 1
    assert read(run / "transfer" / "transfer.csv") == read(transferred[0] / "transfer" / "transfer.csv")
    assert (run / "transfer" / "result.json").read_text() == (transferred[0] / "transfer" / "result.json").read_text()
    assert not list(run.glob(".*"))


def _sets(path):
    """The sets that were ablated: the lists, and the draws of their controls."""
    result = TransferResult.load(path / "transfer" / "result.json")
    lists = [SimpleNamespace(heads=sorted(map(pa.Head.parse, one.head_names))) for one in result.cells]
    controls = [control for one in result.cells for control in one.controls.values()]
    return lists + [SimpleNamespace(heads=sorted(draw)) for control in controls for draw in control.heads]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "chess", "--task", "go"), ("task: expected some of +, -, *, /, power", "got 'chess', 'go'")),
        (("--baseline", "median"), ("baseline: expected one of mean, zero", "'median'")),
        (("--threshold", "-0.9"), ("no head of this run lies below -90%",)),
        (("--heads", "no.json"), ("expected a file written by save_heads, got no.json",)),
        (("--data", "no.csv"), ("data: expected a file, got 'no.csv', which does not exist",)),
        (("--data", "data.txt"), ("data: expected a file that ends in .jsonl",)),
        (("--data", "{tmp}/a/power.csv"), ("data: expected other names than those of tasks, got power",)),
        (("--data", "{tmp}/a/x.csv", "--data", "{tmp}/b/x.csv"), ("data: expected files of different names",)),
        (("--data", "{tmp}/b/x.csv"), ("expected columns that are recognised",)),
        (("--heads", "{tmp}/a/big.json"), ("big: heads: made for a model with 32 layers of 8 heads",)),
        (("--heads", "{tmp}/a/absent.json"), ("absent: heads: the model has layers 0 to 5", "got 9.0")),
    ],
)
def test_bad_options_are_one_line_and_change_nothing(run, tmp_path, arguments, words):
    for folder, name, text in (
        ("a", "power.csv", "prompt,answer\n1,2\n"),
        ("a", "x.csv", "prompt,answer\n1,2\n"),
        ("b", "x.csv", "question\n1\n"),
        ("a", "big.json", '{"format": 1, "heads": [[3, 3]], "n_layers": 32, "n_heads": 8}'),
        ("a", "absent.json", '{"format": 1, "heads": [[9, 0]]}'),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    before = files(run)
    done = pyarith("transfer", run, *FAST, *(str(one).replace("{tmp}", str(tmp_path)) for one in arguments))
    refused(done, *words)
    assert done.stdout == "" and files(run) == before


def test_another_model_and_a_newer_step_are_refused(run, tmp_path):
    tokenizer = byte_level()
    tiny_models.make("llama", torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    before = files(run)
    refused(pyarith("transfer", run, "--model", tmp_path / "other"), "the run was made with another model")
    assert files(run) == before
    (run / "transfer").mkdir()
    (run / "transfer" / "transfer.json").write_text(json.dumps({"tool": "pyarith", "format": 99}))
    refused(pyarith("transfer", run), "has format 99, this version of pyarith reads up to 1")


# the picture


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_picture_shows_drops_beside_controls(transferred):
    result = TransferResult.load(transferred[0] / "transfer" / "result.json")
    figure = transfer_figure(result, title="Demo")
    drops, same, random, bar = figure.axes
    np.testing.assert_allclose(drops.images[0].get_array(), 100 * result.matrix())
    assert [image.norm.vmin for image in drops.images] == [-100] and bar.get_ylabel().startswith("relative drop")
    means = [
        [np.mean(result.cell(task, name).controls["same_layer"].relative_drop_correct) for name in "+-"]
        for task in result.tasks
    ]
    np.testing.assert_allclose(same.images[0].get_array(), 100 * np.array(means))
    assert "mean of 2" in random.get_title() and [label.get_text() for label in drops.get_xticklabels()] == ["+", "-"]
    first = next(label.get_text() for label in drops.get_yticklabels())
    assert first == f"+  {100 * result.cell('+', '+').accuracy_intact:.0f}%"
    assert texts(drops)[0] == f"{100 * result.matrix()[0, 0]:+.0f}"
    FigureCanvasAgg(figure).draw()


def test_the_picture_with_unknown_drops_odd_names_and_no_controls():
    cell = SimpleNamespace(relative_drop_correct=float("nan"), accuracy_intact=0.0, controls={})
    result = SimpleNamespace(tasks=["$5 or $6", "x" * 60], head_lists=["heads $1$"], cell=lambda *_: cell)
    figure = transfer_figure(result)
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 2 and texts(figure.axes[0]) == ["?", "?"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [r"\$5 or \$6  0%", "x" * 19 + "...  0%"]
    red, green, blue = figure.axes[0].images[0].to_rgba(np.array([[np.nan]]))[0, 0, :3]
    assert red == green == blue
    with pytest.raises(InputError, match="expected tasks and lists of heads, got 0 and 1"):
        transfer_figure(SimpleNamespace(tasks=[], head_lists=["a"], cell=None))
