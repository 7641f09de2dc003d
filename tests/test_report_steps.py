"""What the report never shows as if right, what it never overwrites, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import report_runs
from report_page import Page
from typer.testing import CliRunner

from pyarith.cli import app
from pyarith.errors import InputError
from pyarith.reporting import RunDirectory, SavedRun
from pyarith.reporting.files import file_hash
from pyarith.reporting.report import write_report


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return report_runs.write_all(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def run(whole, tmp_path):
    """A copy with every step."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def damage(run: Path, how: str, tmp_path: Path) -> str:
    """Spoil the step knockout; returns what the page has to say."""
    path = run / "knockout" / "knockout.json"
    record = json.loads(path.read_text())
    if how == "another run":
        other = report_runs.write_run(tmp_path / "other", seed=1)
        report_runs.add_knockout(other)
        shutil.rmtree(run / "knockout")
        shutil.copytree(other / "knockout", run / "knockout")
        return "knockout/ belongs to another run"
    if how == "changed file":
        (run / "knockout" / "knockout.csv").write_text("operator\n")
        return "the files in knockout/ are not those that the step wrote"
    if how == "missing file":
        (run / "knockout" / "knockout.csv").unlink()
        return "the files in knockout/ are not those that the step wrote"
    if how == "changed settings":
        record["settings"]["k"] = [1, 3]
        path.write_text(json.dumps(record))
        return "the files in knockout/ are not those that the step wrote"
    if how == "newer":
        path.write_text(json.dumps(record | {"format": 99}))
        return "has format 99, this version of pyarith reads up to 1"
    if how == "another tool":
        path.write_text(json.dumps(record | {"tool": "else"}))
        return "was not written by pyarith"
    if how == "half a record":
        path.write_text(path.read_text()[:300])
        return "knockout/knockout.json is not the whole record of a step"
    path.unlink()
    return "knockout/ was not finished"


@pytest.mark.parametrize(
    "how",
    [
        *("another run", "changed file", "missing file", "changed settings", "newer", "another tool"),
        *("half a record", "no record"),
    ],
)
def test_a_step_that_does_not_belong_is_not_shown(run, tmp_path, how):
    words = damage(run, how, tmp_path)
    report = write_report(SavedRun.open(run))
    section = Page(report.path).sections["knockout"]
    assert words in section["text"] and f"pyarith knockout {run} --force makes it." in section["text"]
    assert section["figures"] == section["tables"] == [] and "Knock-outs" not in report.shown
    assert len(report.missing) == 1 and words in report.missing[0]


def test_a_record_without_its_parts_is_one_clear_error(run):
    path = run / "analysis" / "analysis.json"
    record = json.loads(path.read_text())
    del record["mlp"]
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"analysis cannot be shown: .*KeyError: 'mlp'.*--force"):
        write_report(SavedRun.open(run))
    assert not (run / "report.html").exists()


def test_a_failed_write_leaves_the_old_report(run, monkeypatch):
    old = file_hash(write_report(SavedRun.open(run)).path)
    shutil.rmtree(run / "transfer")  # the next report is another

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pyarith.reporting.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(SavedRun.open(run))
    assert file_hash(run / "report.html") == old


def test_a_file_of_someone_else_is_not_overwritten(run):
    (run / "report.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match=r"report\.html is there and was not written by pyarith report"):
        write_report(SavedRun.open(run))
    assert (run / "report.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize("ours", [True, False])
def test_a_new_run_takes_the_report_of_the_old_one_with_it(run, ours):
    if ours:
        write_report(SavedRun.open(run))
    else:
        (run / "report.html").write_text("<p>mine</p>")
    report_runs.write_run(run, seed=2)
    assert (run / "report.html").exists() is not ours and RunDirectory(run)


# the command


def test_command_says_what_it_wrote_and_what_is_missing(run):
    shutil.rmtree(run / "transfer")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Shown: Overview, Heads, MLPs, How sure, Knock-outs, Attention")
    assert f"Transfer: Not done yet. pyarith transfer {run}\n" in done.stdout
    assert f"Wrote {run / 'report.html'} (" in done.stdout
    again = CliRunner().invoke(app, ["report", str(run / "nowhere")])
    assert again.exit_code == 2 and "RUN_DIR: no folder" in again.stderr and again.stderr.count("\n") == 1
