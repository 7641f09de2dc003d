"""``pyarith discover --top-k``: what is printed, written, read back and put into the report."""

from __future__ import annotations

import csv
import json
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from single_thread import one_thread  # noqa: F401
from typer.testing import CliRunner, Result

import pyarith as pa
from pyarith.cli import app
from pyarith.reporting import SavedRun
from pyarith.reporting.report import write_report
from pyarith.reporting.saved import ranking_of
from pyarith.reporting.tunes import choose_heads

pytestmark = pytest.mark.usefixtures("loud_again")
DEMO = Path(pa.__file__).parent / "demo" / "model"
OPTIONS = ("--n", "150", "--seed", "3", "--verify", "0", "--top-k", "3", "--tolerance", "0.2")


def pyarith(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def test_race_end_to_end(tmp_path: Path) -> None:
    done = pyarith("discover", DEMO, *OPTIONS, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    run = SavedRun.open(tmp_path / "run")
    top = run.top("+")
    assert top is not None and (top.k, top.seed, top.tolerance, top.cluster) == (3, 3, 0.2, "pair")
    with open(tmp_path / "run" / "heads.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and sorted(
        f"{row['layer']}.{row['head']}" for row in rows if row["top"] == "1"
    ) == sorted(map(str, top.heads))  # fmt: skip
    for row in rows:
        head = int(row["layer"]), int(row["head"])
        assert row["decision"] == top.decision(head) and int(row["prompts"]) == top.n_prompts[head]
        assert float(row["cluster_change_low"]) == top.low[head]
        result = run.results["+"]
        assert float(row["logit_change"]) == pytest.approx(np.nanmean(result.head_changes[head]), rel=1e-5)
    printed = " ".join(done.stdout.split())
    assert top.guarantee in printed and f"{top.n_used} of {top.n_given} prompts" in printed
    lines = [line.split() for line in done.stdout.splitlines()]
    for head in top.heads:
        (cells,) = [cells for cells in lines if cells[:2] == ["+", str(head)]]
        assert cells[2] == f"{top.change[head]:+.3f}"
    assert "MLPs, largest" not in done.stdout
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["top_k"] == 3 and "raced" in record["runs"]["+"]["confidence"]["reason"]
    tokenizer = pa.load_demo()[1]
    assert len(run.pairs(tokenizer, "+")) == top.n_used  # the prompts come back in the order of the result
    page = unescape(write_report(run).path.read_text(encoding="utf-8"))
    assert top.guarantee in page and "as far as they were raced" in page
    again = pyarith("discover", DEMO, *OPTIONS, "--out", tmp_path / "run")
    assert again.exit_code == 0 and "Done already" in again.stdout


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "raced"
    assert pyarith("discover", DEMO, *OPTIONS, "--out", path).exit_code == 0
    return path


def test_later_steps_take_the_order_of_the_race(raced: Path) -> None:
    """Mean effects of heads that were run on different prompts are no ranking."""
    run = SavedRun.open(raced)
    top = run.top("+")
    assert top is not None
    ranking = run.ranking("+")
    assert list(ranking[:3]) == top.heads and len(set(ranking)) == 48
    others = [top.change[head] for head in ranking[3:]]
    assert others == sorted(others) and ranking != ranking_of(run.effects("+"))
    assert set(run.key_heads("+", 1.0)) == set(top.heads) and run.key_heads("+", -9.0) == []
    assert choose_heads(run, top=5).heads == ranking[:5]
    done = pyarith("knockout", raced, "--k", "1,2", "--draws", 1, "--n", 12, "--verify", 0)
    assert done.exit_code == 0, done.output
    curve = json.loads((raced / "knockout" / "knockout.json").read_text())["curves"]["+"]
    assert curve["ranking"][:3] == list(map(str, top.heads))
    refused = pyarith("knockout", raced, "--prompts", "report")
    assert refused.exit_code == 2 and "prompts: expected fresh for a run with --top-k" in " ".join(
        refused.stderr.split()
    )


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    for options, words in (
        (("--top-k", "48"), "top_k: expected fewer than the 48 heads"),
        (("--top-k", "3", "--confidence", "95"), "confidence: expected a number between 0 and 1"),
        (("--tolerance", "0.1"), "tolerance: expected None without top_k"),
    ):
        done = pyarith("discover", DEMO, "--n", "20", *options, "--out", tmp_path / "run")
        assert done.exit_code == 2 and words in done.output and not (tmp_path / "run").exists()
