"""Commands on a finished run: knockout and analyze end to end on the demo model, steps that resume, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers_for_tests import byte_level
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.errors import InputError, UnsupportedModelError
from pyarith.reporting import SavedRun, Step
from pyarith.reporting.files import file_hash
from pyarith.reporting.knockouts import choose, curve
from pyarith.reporting.saved import ranking_of

MODEL = Path(pa.__file__).parent / "demo" / "model"
K = ("--k", "1,3", "--draws", 2, "--verify", 0, "--n", 16)


def pyarith(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(path):
    """Every file of a directory with its hash."""
    return {str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def discovered(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mine"
    done = pyarith("discover", MODEL, "--operator", "+", "--operator", "-", "--n", 24, "--verify", 0, "--out", path)
    assert done.exit_code == 0, done.output
    return path, done


@pytest.fixture(scope="module")
def stepped(discovered, tmp_path_factory):
    """A copy of the run with both steps done, and what they printed."""
    path = tmp_path_factory.mktemp("runs") / "stepped"
    shutil.copytree(discovered[0], path)
    knocked, analyzed = pyarith("knockout", path, *K), pyarith("analyze", path)
    assert knocked.exit_code == 0, knocked.output
    assert analyzed.exit_code == 0, analyzed.output
    return path, knocked, analyzed


@pytest.fixture
def run(discovered, tmp_path):
    """A copy of the run without steps."""
    return Path(shutil.copytree(discovered[0], tmp_path / "run"))


@pytest.fixture
def steps(stepped, tmp_path):
    """A copy of the run with its steps."""
    return Path(shutil.copytree(stepped[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


def refused(done, *words):
    """One line, no traceback, exit code 2."""
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("pyarith: error: ")
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr!r}"


# discover


def test_discover_says_how_sure_it_is(discovered, demo):
    path, done = discovered
    assert "95% interval" in done.stdout and "halves of the operand pairs rank the heads alike" in done.stdout
    assert "corruption strength" in done.stdout
    pairs = pa.tasks.arithmetic(demo[1], "+", n=24)
    sure = pa.PatchResult.load(path / "add" / "result").confidence(pairs)
    for row in read(path / "add" / "heads.csv"):
        at = int(row["layer"]), int(row["head"])
        assert float(row["effect_low"]) == pytest.approx(sure.heads.low[at], abs=1e-12)
        assert float(row["effect_high"]) == pytest.approx(sure.heads.high[at], abs=1e-12)
        assert float(row["p_adjusted"]) == sure.heads.p_adjusted[at]
    mlps = {int(row["layer"]): float(row["effect_high"]) for row in read(path / "add" / "mlps.csv")}
    assert mlps == pytest.approx(dict(enumerate(sure.mlps.high)))
    said = json.loads((path / "run.json").read_text())["runs"]["+"]
    assert said["confidence"]["clusters"] == sure.n_clusters and "two-way bootstrap" in said["confidence"]["method"]
    assert -1 <= said["stability"]["spearman"]["median"] <= 1 and said["stability"]["clusters"] == len(
        set(pairs.strata["pair"])
    )


def test_too_few_clusters_are_a_reason_and_no_failure(tmp_path):
    done = pyarith("discover", MODEL, "--n", 4, "--verify", 0, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "no intervals or p-values: clusters: resampling needs at least 5 of each factor" in done.stdout
    said = json.loads((tmp_path / "run" / "run.json").read_text())["runs"]["+"]
    assert "at least 5" in said["confidence"]["reason"] and "at least 5" in said["stability"]["reason"]
    assert "effect_low" not in read(tmp_path / "run" / "heads.csv")[0]


def test_discover_again_is_done_already_unless_changed_or_forced(tmp_path):
    run = tmp_path / "run"
    same = ("discover", MODEL, "--n", 6, "--verify", 0, "--out", run)
    assert "Wrote" in pyarith(*same).stdout
    made(run, {"k": [1]}, "a step of this run")
    before = files(run)
    done = pyarith(*same)
    assert done.exit_code == 0 and done.stdout.startswith("Done already: ") and files(run) == before
    (run / "heads.csv").write_text("half")
    done = pyarith(*same)
    assert done.exit_code == 0 and "Wrote" in done.stdout
    assert (run / "heads.csv").stat().st_size > 1000
    assert not (run / "knockout").exists(), "a step of the run before"
    assert not (run / ".partial").exists()
    assert "Wrote" in pyarith(*same, "--force").stdout


# knockout


def test_knockout_prints_and_writes_what_the_curve_is(stepped, demo):
    path, done, _ = stepped
    model, tokenizer = demo
    saved = SavedRun.open(path)
    chosen = choose(saved, tokenizer, "-", "fresh", 16, 1)
    assert not set(chosen.pairs.prompts) & {row["prompt"] for row in saved.prompts["-"]}
    direct = pa.knockout_curve(
        model, chosen.pairs, saved.results["-"], ks=[1, 3], draws=2, seed=1, verify=0, progress=False
    )
    rows = [row for row in read(path / "knockout" / "knockout.csv") if row["operator"] == "-"]
    assert [(r["arm"], int(r["k"]), float(r["accuracy"])) for r in rows] == [
        (r["arm"], r["k"], r["accuracy"]) for r in direct.rows()
    ]
    assert float(rows[1]["relative_drop"]) == pytest.approx(direct.relative_drop()[1])
    record = json.loads((path / "knockout" / "knockout.json").read_text())
    assert record["settings"]["k"] == [1, 3] and record["curves"]["-"]["ranking"][0] == str(direct.ranking[0])
    assert record["curves"]["-"]["drawn"]["prompts"] == 16
    key = 100 * direct.arms["key"].accuracy[0, 1]
    line = next(line.split() for line in done.stdout.split("-  accuracy")[1].splitlines() if line.startswith("3 "))
    assert line[:3] == ["3", f"{key:.1f}", f"{key - 100:+.1f}%"]
    assert (path / "knockout" / "knockout.png").read_bytes()[:4] == b"\x89PNG"
    assert "0 of them the run's own" in done.stdout or "of them the run's own and left out" in done.stdout


def test_the_runs_own_prompts_are_left_out_and_counted(discovered, demo):
    _, tokenizer = demo
    saved = SavedRun.open(discovered[0])
    chosen = choose(saved, tokenizer, "+", "fresh", 10, 0)  # the run's own seed: its prompts come first
    assert chosen.counts["overlap_left_out"] == 24 and chosen.counts["prompts"] == len(chosen.pairs) == 10
    assert not set(chosen.pairs.prompts) & {row["prompt"] for row in saved.prompts["+"]}
    seen = {row["pair"] for row in saved.prompts["+"]}
    assert chosen.counts["operand_pair_in_run"] == sum(pair in seen for pair in chosen.pairs.strata["pair"])


def test_report_ranks_on_one_half_and_measures_on_the_other(discovered, demo):
    _, tokenizer = demo
    saved = SavedRun.open(discovered[0])
    chosen = choose(saved, tokenizer, "+", "report", None, 0)
    rest = [row for row in saved.prompts["+"] if row["prompt"] not in set(chosen.pairs.prompts)]
    assert len(rest) == chosen.counts["select"] and not {r["pair"] for r in rest} & set(chosen.pairs.strata["pair"])
    result, own = saved.results["+"], [r["prompt"] for r in saved.prompts["+"]]
    selected = [own.index(row["prompt"]) for row in rest]
    effects = (result.head_changes[..., selected] / result.clean_logits[selected]).mean(-1)
    assert chosen.ranking[:5] == ranking_of(effects)[:5]
    with pytest.raises(InputError, match="expected none with --prompts report"):
        choose(saved, tokenizer, "+", "report", 5, 0)


@pytest.mark.parametrize("baseline", ["zero", "resample", "mean-per-position"])
def test_other_baselines(discovered, demo, baseline):
    model, tokenizer = demo
    chosen = choose(SavedRun.open(discovered[0]), tokenizer, "+", "fresh", 12, 1)
    found, alone = curve(model, chosen, baseline, ks=[1, 48], draws=2, seed=1, verify=0, progress=False)
    assert found.n_prompts + found.n_wrong + alone == 12
    assert found.arms["random"].correct.shape == (2, 2, found.n_prompts)
    assert found.arms["key"].accuracy[0, 1] == pytest.approx(found.all_ablated[0])
    lengths = chosen.pairs.lengths
    assert alone == (0 if baseline == "zero" else sum((lengths == n).sum() == 1 for n in lengths))
    assert {"zero": "zero", "resample": "resample", "mean-per-position": "mean"}[baseline] in found.semantics


# analyze


def test_analyze_writes_every_table(stepped, demo):
    path, _, done = stepped
    folder = path / "analysis"
    model, tokenizer = demo
    names = {"attention.csv", "mlp.csv", "lens.csv", "attribution.csv", "overlap.csv"}
    names |= {"attention_tokens.csv", "lens_promoted.csv"}
    assert {p.name for p in folder.iterdir()} == names | {"attention.png", "mlp.png", "analysis.json"}
    pairs = pa.tasks.arithmetic(tokenizer, "+", n=24)
    result = pa.PatchResult.load(path / "add" / "result")
    mass = pa.analysis.attention_mass(model, pairs, result.key_heads()[:5])
    rows = [row for row in read(folder / "attention.csv") if row["operator"] == "+"]
    assert [float(r["mass"]) for r in rows] == pytest.approx([r["mass"] for r in mass.rows()], abs=1e-6)
    record = json.loads((folder / "analysis.json").read_text())
    points = pa.analysis.mlp_cosines(model, pairs).points
    assert record["mlp"]["+"]["points"] == points._asdict() and record["not_done"] == []
    assert {row["text"] for row in read(folder / "lens.csv") if row["layer"] == "5" and row["rank"] == "0"}
    row = next(i for i, one in enumerate(read(path / "add" / "prompts.csv")) if one["correct"] == "1")
    one = pairs.subset([row])
    lens = pa.analysis.logit_lens(model, one, k=5)
    rows = [r for r in read(folder / "lens_promoted.csv") if r["operator"] == "+"]
    assert [int(r["token"]) for r in rows] == lens.promoted[:, 0].ravel().tolist()
    assert [float(r["logits"]) for r in rows] == pytest.approx(lens.promoted_by[:, 0].ravel(), abs=1e-5)
    assert {r["prompt"] for r in rows} == {one.prompts[0]}
    seen = pa.analysis.attention_mass(model, one, result.key_heads()[:5], patterns=True)
    rows = [r for r in read(folder / "attention_tokens.csv") if r["operator"] == "+"]
    assert [float(r["attention"]) for r in rows] == pytest.approx(seen.patterns[:, 0].ravel(), abs=1e-6)
    assert [int(r["token"]) for r in rows] == one.clean[0].tolist() * len(seen.heads)
    assert {"operand_a", "operand_b", "operator"} <= {r["role"] for r in rows}
    for word in ("Attention of key heads", "start {}, inflection {}, end {}".format(*points), "Logit lens", "Spearman"):
        assert word in done.stdout


def test_what_cannot_be_done_is_one_line_and_the_rest_goes_on(run, monkeypatch):
    def fails(*_, **__):
        raise UnsupportedModelError("model: this family has no attention to look at")

    monkeypatch.setattr("pyarith.analysis.attention_mass", fails)
    done = pyarith("analyze", run)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if "not done" in line]
    assert lines == [
        f"{sign}  attention of key heads: not done: model: this family has no attention to look at" for sign in "+-"
    ]
    assert not (run / "analysis" / "attention.csv").exists() and (run / "analysis" / "mlp.csv").exists()
    said = json.loads((run / "analysis" / "analysis.json").read_text())["not_done"]
    assert [(one["analysis"], one["operator"]) for one in said] == [("attention", "+"), ("attention", "-")]
    before = files(run)
    for name in ("mlp_cosines", "logit_lens", "logit_attribution", "overlap"):
        monkeypatch.setattr(f"pyarith.analysis.{name}", fails)
    done = pyarith("analyze", run, "--force")
    assert done.exit_code == 2 and "none of the analyses can be done" in done.stderr and files(run) == before


# report


def test_report_shows_what_the_commands_wrote(steps):
    done = pyarith("report", steps)
    assert done.exit_code == 0, done.output
    shown, missing = done.stdout.splitlines()[:2]
    assert shown.startswith("Shown: Overview, Heads, ") and shown.endswith("Direct attribution, Overlap, Settings")
    assert missing == f"Transfer: Not done yet. pyarith transfer {steps}"
    text = (steps / "report.html").read_text(encoding="utf-8")
    for row in read(steps / "add" / "heads.csv"):
        assert f'<td>{row["layer"]}.{row["head"]}</td><td class="n">{100 * float(row["effect"]):+.1f}%</td>' in text
    for row in read(steps / "knockout" / "knockout.csv"):
        assert f"{100 * float(row['accuracy_min']):.1f}% .. {100 * float(row['accuracy_max']):.1f}%</td>" in text
    up = read(steps / "analysis" / "lens_promoted.csv")[0]
    assert f"&#39;{up['text']}&#39;\u00a0{float(up['logits']):+.2f}" in text


# steps that resume


def test_a_finished_step_is_not_done_again(steps):
    before = files(steps)
    for command in (("knockout", steps, *K), ("analyze", steps)):
        done = pyarith(*command)
        assert done.exit_code == 0 and done.stdout.startswith("Done already: "), done.output
    assert files(steps) == before


def small_step(path, settings):
    return Step(SavedRun.open(path), "knockout", settings)


def made(path, settings, text):
    step = small_step(path, settings)
    step.file("knockout.csv").write_text(text)
    return step.finish({}, {})


def test_a_step_is_finished_only_with_its_own_settings_run_and_files(run):
    assert not small_step(run, {"k": [1]}).finished
    made(run, {"k": [1]}, "one")
    assert small_step(run, {"k": [1]}).finished and not small_step(run, {"k": [2]}).finished
    (run / "knockout" / "mine.txt").write_text("notes")
    made(run, {"k": [2]}, "two")
    assert not small_step(run, {"k": [1]}).finished and small_step(run, {"k": [2]}).finished
    assert (run / "knockout" / "mine.txt").exists() and not (run / ".knockout.partial").exists()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"started": "2020-01-01"}))
    assert not small_step(run, {"k": [2]}).finished, "the run was made again"


@pytest.mark.parametrize("damage", ["cut table", "no table", "cut record", "foreign record"])
def test_half_written_steps_are_not_read_as_finished(run, damage):
    made(run, {"k": [1]}, "a long table")
    table, record = run / "knockout" / "knockout.csv", run / "knockout" / "knockout.json"
    if damage == "cut table":
        table.write_text("a long")
    elif damage == "no table":
        table.unlink()
    elif damage == "cut record":
        record.write_text(record.read_text()[:-40])
    else:
        record.write_text("[]")
    assert not small_step(run, {"k": [1]}).finished
    made(run, {"k": [1]}, "a long table")
    assert small_step(run, {"k": [1]}).finished


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_a_step_is_written_leaves_it_unfinished(run, monkeypatch, moved):
    """After ``moved`` renames; the last is that of the record."""
    import os

    replace, count = os.replace, []

    def kill(source, target):
        count.append(target)
        if len(count) > moved:
            raise KeyboardInterrupt
        replace(source, target)

    step = small_step(run, {"k": [1]})
    step.file("a.csv").write_text("a")
    step.file("b.csv").write_text("b")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            step.finish({}, {})
    assert not small_step(run, {"k": [1]}).finished
    made(run, {"k": [1]}, "again")
    assert small_step(run, {"k": [1]}).finished and not (run / ".knockout.partial").exists()


# refusals: one line, nothing changed


def change(path, **changed):
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | changed))


@pytest.mark.parametrize("command", ["knockout", "analyze"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: change(path, format=99), ("has format 99", "reads up to 1")),
        (lambda path: change(path, tool="other"), ("was not written by pyarith",)),
        (lambda path: change(path, command="tune"), ("expected a run of pyarith discover or demo", "'tune'")),
        (lambda path: change(path, runs={}), ("lacks the model or the results",)),
        (lambda path: (path / "run.json").write_text("{"), ("not to its end",)),
        (lambda path: (path / "run.json").unlink(), ("expected a finished run with run.json",)),
        (lambda path: (path / "add" / "prompts.csv").write_text("x"), ("changed, or half written",)),
        (lambda path: shutil.rmtree(path), ("no folder",)),
    ],
    ids=["format", "tool", "kind", "empty", "half", "unfinished", "table", "missing"],
)
def test_other_run_directories_are_refused(run, command, damage, words):
    damage(run)
    before = files(run) if run.exists() else {}
    done = pyarith(command, run)
    refused(done, *words)
    assert done.stdout == "" and (files(run) if run.exists() else {}) == before


def test_a_newer_step_is_refused(steps):
    for name, command in (("knockout", ("knockout", steps, *K)), ("analysis", ("analyze", steps))):
        file = steps / name / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
        refused(pyarith(*command), "has format 99, this version of pyarith reads up to 1")


def test_another_model_is_refused(run, tmp_path):
    tokenizer = byte_level()
    tiny_models.make("llama", torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    before = files(run)
    for command in ("knockout", "analyze"):
        done = pyarith(command, run, "--model", tmp_path / "other")
        refused(done, "the run was made with another model", "fingerprint sha256:")
        assert files(run) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("knockout", "--k", "1,49"), ("k: expected at most the 48 heads of the model, got 49",)),
        (("knockout", "--k", "3,1"), ("k: expected rising whole numbers",)),
        (("knockout", "--k", "0,1"), ("k: expected rising whole numbers",)),
        (("knockout", "--k", "one"), ("k: expected whole numbers such as 1,2,5, got 'one'",)),
        (("knockout", "--baseline", "median"), ("baseline: expected one of mean, zero", "'median'")),
        (("knockout", "--prompts", "old"), ("prompts: expected one of fresh, report", "'old'")),
        (("knockout", "--draws", "0"), ("draws: expected a whole number >= 1, got 0",)),
        (("knockout", "--threshold", "-0.9"), ("no head of this run lies below -90%", "lowest effects: + -")),
        (("analyze", "--top", "49"), ("top: expected at most the 48 heads of the model, got 49",)),
        (("analyze", "--prompt", "24"), ("prompt: expected 0 to 23, got 24",)),
    ],
)
def test_bad_options_are_one_line_and_change_nothing(run, arguments, words):
    before = files(run)
    command, *options = arguments
    done = pyarith(command, run, *options)
    refused(done, *words)
    assert done.stdout == "" and files(run) == before


def test_without_key_heads_analyze_says_so_and_goes_on(run):
    done = pyarith("analyze", run, "--threshold", "-0.9")
    assert done.exit_code == 0, done.output
    assert "+  attention of key heads: not done: no head lies below the threshold" in done.stdout
    assert (run / "analysis" / "mlp.csv").exists()


def test_ranking_puts_unknown_effects_among_the_rest():
    ranking = ranking_of(np.array([[0.1, np.nan], [-0.2, -0.1]]))
    assert ranking == ((1, 0), (1, 1), (0, 1), (0, 0))
