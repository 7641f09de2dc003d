"""``pyarith tune`` end to end on the demo model: heads, data, files, resuming after a kill, refusals."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from single_thread import one_thread  # noqa: F401
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.errors import InputError
from pyarith.plots import loss_figure
from pyarith.reporting import SavedRun
from pyarith.reporting.files import file_hash
from pyarith.reporting.saved import ranking_of
from pyarith.reporting.tunes import choose_heads, pooled_ranking
from pyarith.tuning import load_examples

ROOT = Path(__file__).parents[1]
MODEL = Path(pa.__file__).parent / "demo" / "model"
CONTROL = re.compile(r"\x1b|\r|[\u2800-\u28ff\u2501]")  # escape codes, returns, spinners, bars
QUICK = ("--data", "/", "--n", 48, "--lr", "2e-3", "--steps", 4)


def pyarith(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def files(path):
    """Every file of a directory with its hash."""
    return {str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}


def refused(done, *words):
    """One line, no traceback, exit code 2."""
    assert done.exit_code == 2, done.output
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("pyarith: error: ") and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in last, f"{word!r} not in {last!r}"


def values_of(path):
    """The tensors of a run's delta."""
    (file,) = (path / "tune" / "delta").glob("*.safetensors")
    return load_file(file)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def discovered(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mine"
    done = pyarith("discover", MODEL, "--operator", "+", "--operator", "/", "--n", 8, "--verify", 0, "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def tuned(discovered, tmp_path_factory):
    """A copy of the run with the step done, and what was printed."""
    path = Path(shutil.copytree(discovered, tmp_path_factory.mktemp("runs") / "tuned"))
    done = pyarith("tune", path, "--heads", 4, *QUICK)
    assert done.exit_code == 0, done.output
    return path, done


@pytest.fixture
def run(discovered, tmp_path):
    """A copy of the run without steps."""
    return Path(shutil.copytree(discovered, tmp_path / "run"))


# what it does


def test_tune_trains_the_top_heads_and_writes_everything(tuned):
    path, _ = tuned
    folder = path / "tune"
    delta = {f"delta/{one.name}" for one in (folder / "delta").iterdir()}
    assert set(files(folder)) == delta | {"losses.csv", "loss.png", "tune.json"} and len(delta) == 2
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG" and not (path / ".tune.partial").exists()
    saved = SavedRun.open(path)
    heads = pooled([saved.effects(sign) for sign in saved.signs])[:4]
    model, tokenizer = pa.load_demo()
    problems = pa.tasks.draw_problems("/", n=48)
    result = pa.precise_sft(model, tokenizer, problems, heads, lr=2e-3, steps=4, progress=False)
    record = json.loads((folder / "tune.json").read_text())
    assert record["result"]["heads"] == record["settings"]["heads"] == [str(head) for head in heads]
    assert record["hashes"].keys() >= delta
    assert record["settings"]["data"] == {"task": "/", "n": 48, "seed": 0}
    assert record["result"]["data"]["task"]["hash"] == result.data["task"]["hash"]
    with open(folder / "losses.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == result.losses.tolist()
    again, _ = pa.load_demo()
    pa.load_delta(again, folder / "delta")
    assert same(again.state_dict(), model.state_dict()), "the command trains what the function does"


def test_what_is_printed(tuned):
    path, done = tuned
    out, err = done.stdout, done.stderr
    saved = SavedRun.open(path)
    first = pooled([saved.effects(sign) for sign in saved.signs])[0]
    plus, division = (100 * saved.effects(sign)[first] for sign in "+/")
    for words in (
        "4 heads, top 4 by mean rank over + /; effects + /:",
        f"  {first} ({plus:+.1f}% {division:+.1f}%)  ",
        "/: Examples(48 examples of ",
        "space before the completion, end of text added",
        "SelectiveTuner: 4 heads, 0 MLPs in layers 2-",
        "32,768 of 1,437,312 parameters (2.28%); slices 0.1 MiB, gradients 0.1 MiB, AdamW 0.2 MiB",
        "4 steps of 16 examples, learning rate 0.002, cosine, weight decay 0",
        "TuneResult: 4 heads",
        f"Wrote {path / 'tune' / 'losses.csv'}",
        "Took ",
    ):
        assert words in out, words
    assert re.search(r"step 4 of 4: loss \d\.\d+, [\d,]+ tokens/s, peak [\d,]+ MiB", err)
    assert not CONTROL.search(out + err), "a pipe gets plain text"


def test_a_finished_step_is_not_done_again_unless_changed_or_forced(tuned, tmp_path):
    path = Path(shutil.copytree(tuned[0], tmp_path / "run"))
    before = files(path)
    done = pyarith("tune", path, "--heads", 4, *QUICK)
    assert done.exit_code == 0 and done.stdout.startswith("Done already: ") and files(path) == before
    (path / "tune" / "delta" / "mine.txt").write_text("notes")
    done = pyarith("tune", path, "--heads", 2, *QUICK, "--mlps", "3")
    assert done.exit_code == 0, done.output
    record = json.loads((path / "tune" / "tune.json").read_text())
    assert record["result"]["mlps"] == [3] and len(record["result"]["heads"]) == 2
    assert (path / "tune" / "delta" / "mine.txt").exists(), "what is not the step's stays"
    assert not set(before) - set(files(path)) - {name for name in before if "delta/" in name}
    assert pyarith("discover", MODEL, "--n", 8, "--verify", 0, "--out", path).exit_code == 0
    assert set(files(path / "tune")) == {"delta/mine.txt"}, "a new discovery takes the steps of the old one away"


def test_files_columns_and_rows_that_are_dropped(run, tmp_path):
    rows = [{"q": f"{a} / {b} =", "a": a // b, "level": "easy"} for a, b in ((8, 4), (6, 2), (9, 3), (7, 7))]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"q": "", "a": 1}, {"q": "8 / 8 ="}])))
    columns = ("--prompt", "Q: {q}", "--completion", "a", "--no-eos")
    refused(pyarith("tune", run, "--heads", 2, "--data", path, *columns), "empty in 1 (row 5)", "missing in 1 (row 6)")
    assert not (run / "tune").exists()
    options = ("--on-bad", "drop", "--steps", 2, "--replay", "capital", "--n", 20, "--task-weight", "0.5")
    done = pyarith("tune", run, "--heads", 2, "--data", path, *columns, *options, "--packing")
    assert done.exit_code == 0, done.output
    assert "4 of 32 tokens in the loss, 2 rows left out), layout given" in done.stdout
    assert "1 left out: the prompt is empty (row 5)" in done.stdout and "capital: Examples(20 examples" in done.stdout
    record = json.loads((run / "tune" / "tune.json").read_text())
    assert record["result"]["data"]["task"]["dropped_rows"] == {"empty_prompt": [5], "missing_column": [6]}
    assert record["settings"]["data"] == {"file": str(path), "hash": file_hash(path)}
    _, tokenizer = pa.load_demo()
    made = load_examples(path, tokenizer, prompt="Q: {q}", completion="a", eos=False, limit=4)
    assert record["result"]["data"]["task"]["hash"] == made.hash
    with open(run / "tune" / "losses.csv", newline="") as file:
        assert all(float(row["general_loss"]) > 0 for row in csv.DictReader(file))


# heads


def pooled(effects):
    return pooled_ranking([ranking_of(one) for one in effects], effects)


def test_pooled_ranking_by_hand():
    """Ranks on +: 0.1 0.0 1.0 1.1; on -: 1.0 0.1 0.0 1.1. Sums: 0.1 1, 1.0 2, 0.0 3, 1.1 6."""
    plus, minus = np.array([[-0.3, -0.5], [-0.1, np.nan]]), np.array([[-0.1, -0.2], [-0.4, 0.3]])
    assert pooled([plus, minus]) == ((0, 1), (1, 0), (0, 0), (1, 1))
    assert pooled([plus]) == ranking_of(plus) == ((0, 1), (0, 0), (1, 0), (1, 1))
    lone = [np.array([[-0.9, -0.2, -0.1]]), np.array([[0.1, -0.3, -0.2]])]
    assert pooled(lone) == ((0, 1), (0, 0), (0, 2)), "by ranks: one large effect does not decide"
    swapped = [np.array([[-0.4, -0.1]]), np.array([[-0.2, -0.3]])]
    assert pooled(swapped) == ((0, 0), (0, 1)), "equal ranks: the stronger mean effect first"


def test_heads_by_operator_by_name_and_from_a_file(discovered, tmp_path):
    saved = SavedRun.open(discovered)
    for name in ("/", "div"):
        chosen = choose_heads(saved, top=3, operator=name)
        assert chosen.heads == ranking_of(saved.effects("/"))[:3] and chosen.words == "top 3 by effect on /"
    assert list(chosen.effects[chosen.heads[0]]) == ["/"]
    assert choose_heads(saved, heads=["4.2", "2.7"]).heads == ((4, 2), (2, 7))
    assert choose_heads(saved).heads == ()
    pa.evaluation.save_heads(tmp_path / "heads.json", [(3, 1), (0, 2)], model=pa.load_demo()[0])
    assert choose_heads(saved, file=tmp_path / "heads.json").heads == ((3, 1), (0, 2))
    least = np.minimum(saved.effects("+"), saved.effects("/"))
    weak = choose_heads(saved, heads=[str(ranking_of(-least)[0])])
    assert weak.not_negative == weak.heads
    record = json.loads((tmp_path / "heads.json").read_text())
    (tmp_path / "heads.json").write_text(json.dumps(record | {"n_layers": 32, "n_heads": 32}))
    with pytest.raises(InputError, match="made for a model with 32 layers of 32 heads, the run's has 6 of 8"):
        choose_heads(saved, file=tmp_path / "heads.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("heads: expected --heads N, --head LAYER.HEAD, --head-file or --mlps, got none",)),
        (("--heads", 0), ("heads: expected a whole number >= 1, got 0",)),
        (("--heads", 49), ("heads: expected at most the 48 heads of the model, got 49",)),
        (("--head", "9.1", "--head", "0.8"), ("expected heads 0.0 to 5.7, each once, got 9.1, 0.8",)),
        (("--head", "2.7", "--head", "2.7"), ("each once, got twice 2.7",)),
        (("--head", "first"), ("head: expected LAYER.HEAD such as '12.22', got 'first'",)),
        (("--heads", 2, "--head", "2.7"), ("expected one of --heads, --head and --head-file, got --heads and --head",)),
        (("--head-file", "none.json"), ("which does not exist",)),
        (("--heads", 2, "--operator", "*"), ("operator: expected one of the run's (+, /), got '*'",)),
        (("--head", "2.7", "--operator", "+"), ("operator: expected --heads N beside it",)),
        (("--mlps", "first"), ("mlps: expected layers such as 17,18, got 'first'",)),
        (("--mlps", "3,9"), ("9",)),
        (("--heads", 2, "--data", "none.jsonl"), ("data: expected a file or one of the tasks +, -,", "'none.jsonl'")),
        (("--heads", 2, "--data", "empty.jsonl"), ("empty.jsonl: expected at least one row, got none",)),
        (("--heads", 2, "--n", 99999), ("asked for 99999 problems of '/'",)),
        (("--heads", 2, "--prompt", "q"), ("prompt: expected none with the task '/', which has no columns",)),
        (("--heads", 2, "--preset", "fast"), ("settings: expected TuneSettings or one of default, paper, got 'fast'",)),
        (("--heads", 2, "--lr", 0), ("lr: expected a positive number, got 0",)),
        (("--heads", 2, "--grad-scale", "all"), ("grad_scale: expected a positive number or 'heads', got 'all'",)),
        (("--heads", 2, "--task-weight", 0.5), ("replay: expected general data beside task_weight=0.5",)),
        (("--heads", 2, "--max-length", 5), ("more than 5 tokens in",)),
        (("--heads", 2, "--on-bad", "skip"), ("on_bad: expected one of",)),
        (("--heads", 40, "--prefix-cache", "1MiB"), ("lowest trained layer above 0",)),
    ],
    ids=lambda value: (
        " ".join(map(str, value)) if isinstance(value, tuple) and value and str(value[0])[0] == "-" else ""
    ),
)
def test_bad_options_are_one_line_and_change_nothing(run, monkeypatch, options, words):
    monkeypatch.chdir(run.parent)
    (run.parent / "empty.jsonl").write_text("\n")
    before = files(run)
    given = dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    quick = [part for name, value in given.items() if name not in options for part in (name, value)]
    refused(pyarith("tune", run, *quick, *options), *words)
    assert files(run) == before and not (run / "tune").exists()


def test_another_model_is_refused(run, tmp_path):
    model, tokenizer = pa.load_demo()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    refused(pyarith("tune", run, "--heads", 2, *QUICK, "--model", tmp_path / "other"), "made with another model")
    assert not (run / "tune").exists()


# killed


def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_bits(run, tmp_path):
    """SIGKILL in the middle; the same command then gives the delta and the losses of a run that was left alone."""
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    command = ["--heads", "3", "--data", "/", "--n", "64", "--lr", "2e-3", "--steps", "30", "--save-every", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.Popen(
        [sys.executable, "-m", "pyarith", "tune", str(run), *command],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    place = run / "tune" / "checkpoint.safetensors"
    until = time.monotonic() + 60
    while not place.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    _, err = killed.communicate()
    assert killed.returncode == -signal.SIGKILL and place.exists(), err.decode()
    assert not (run / "tune" / "tune.json").exists()
    refused(pyarith("tune", run, *command, "--seed", 3), "is the checkpoint of another run: settings.seed was 0, now 3")
    again, alone = pyarith("tune", run, *command), pyarith("tune", whole, *command)
    assert again.exit_code == 0 and alone.exit_code == 0, again.output + alone.output
    assert re.search(r"Went on from the checkpoint after step \d+", again.stdout) and "Went on" not in alone.stdout
    assert same(values_of(run), values_of(whole)) and not place.exists()
    with open(run / "tune" / "losses.csv", newline="") as one, open(whole / "tune" / "losses.csv", newline="") as other:
        left, right = list(csv.DictReader(one)), list(csv.DictReader(other))
    assert [row["loss"] for row in left] == [row["loss"] for row in right] and len(left) == 30


# the picture


def test_the_picture_of_a_loss():
    history = {"task_loss": np.linspace(2, 1, 40), "general_loss": np.full(40, np.nan), "lr": np.linspace(1, 0, 40)}
    upper, lower = loss_figure(history, "title", 20).axes
    assert [line.get_label() for line in upper.get_lines() if line.get_label()[0] != "_"] == ["task, mean of 2 steps"]
    mean = upper.get_lines()[1].get_ydata()
    assert mean[0] == 2 and mean[5] == pytest.approx(history["task_loss"][4:6].mean())
    assert lower.get_lines()[0].get_ydata().tolist() == history["lr"].tolist()
    assert len(lower.get_lines()) == 2, "the end of the first of two epochs"
    with_replay = loss_figure({**history, "general_loss": np.ones(40)}).axes[0]
    assert "general data (replay), mean of 2 steps" in [line.get_label() for line in with_replay.get_lines()]
    for bad in ({**history, "lr": np.ones(3)}, {"task_loss": [], "lr": []}, {"lr": np.ones(3)}):
        with pytest.raises((InputError, KeyError)):
            loss_figure(bad)
