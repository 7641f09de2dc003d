"""Knock-outs of a run that go on after a kill: finished operators are not done again, and every number is the same."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from single_thread import on_one_thread, one_thread  # noqa: F401
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.discovery import knockout
from pyarith.discovery.knockout import KnockoutCurve
from pyarith.reporting import SavedRun, Step, knockouts
from pyarith.reporting.files import file_hash
from pyarith.reporting.files import plain as plainly
from pyarith.reporting.knockouts import choose, curve, curve_record

MODEL = Path(pa.__file__).parent / "demo" / "model"
K = ("--k", "1,3,48", "--draws", 3, "--verify", 0, "--n", 16)


def pyarith(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def files(path):
    return {str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_step(path, whole):
    """Whether knockout/ holds the same numbers; times and counts of parts differ."""
    record, other = (json.loads((one / "knockout" / "knockout.json").read_text()) for one in (path, whole))
    for one in (record, other):
        for found in one["curves"].values():
            del found["settings"]["sweep"]["seconds"], found["settings"]["sweep"]["resumed_parts"]
            del found["settings"]["sweep"]["forecast"]["gemm_flop_per_second"]
            del found["settings"]["sweep"]["forecast"]["seconds"]
    assert record["curves"] == other["curves"]
    assert read(path / "knockout" / "knockout.csv") == read(whole / "knockout" / "knockout.csv")
    return True


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def discovered(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mine"
    with on_one_thread():
        done = pyarith("discover", MODEL, "--operator", "+", "--operator", "-", "--n", 20, "--verify", 0, "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def whole(discovered, tmp_path_factory):
    path = Path(shutil.copytree(discovered, tmp_path_factory.mktemp("runs") / "whole"))
    with on_one_thread():
        done = pyarith("knockout", path, *K)
    assert done.exit_code == 0, done.output
    assert not list(path.glob(".*"))
    return path


@pytest.fixture
def run(discovered, tmp_path):
    return Path(shutil.copytree(discovered, tmp_path / "run"))


@pytest.fixture
def sweeps(monkeypatch):
    """The sweeps that are run, by their number of sets; killed before the one whose number is in ``kill``."""
    seen: list[int] = []
    kill: list[int] = []
    real = knockout.ablation_sweep

    def counted(*rest, sets, **options):
        if len(seen) in kill:
            raise KeyboardInterrupt
        seen.append(len(sets))
        return real(*rest, sets=sets, **options)

    monkeypatch.setattr(knockout, "ablation_sweep", counted)
    return seen, kill


def test_the_first_operator_is_not_done_again(run, whole, sweeps):
    seen, kill = sweeps
    kill.append(3)  # each operator has a sweep for what is right, and the one over all sets
    before = files(run)
    assert pyarith("knockout", run, *K).exit_code == 130
    assert len(seen) == 3 and not (run / "knockout").exists()
    left = {name for name in files(run) if name not in before}
    assert left and all(name.startswith(".knockout.parts/") for name in left)
    seen.clear()
    kill.clear()
    done = pyarith("knockout", run, *K)
    assert done.exit_code == 0 and "Going on with the parts that an interrupted run left" in done.stderr
    assert len(seen) == 2, "the second operator only"
    assert same_step(run, whole) and not list(run.glob(".*"))


def test_damaged_parts_and_other_options_are_done_again(run, whole, sweeps):
    seen, kill = sweeps
    kill[:] = [3]
    assert pyarith("knockout", run, *K).exit_code == 130
    for number, file in enumerate(sorted(run.glob(".knockout.parts/*"))):
        content = file.read_bytes()
        file.write_bytes(content[:-5] if number % 2 else content[:-1] + bytes([content[-1] ^ 1]))
    kill.clear()
    seen.clear()
    done = pyarith("knockout", run, *K)
    assert done.exit_code == 0 and len(seen) == 4 and same_step(run, whole)
    shutil.rmtree(run / "knockout")
    for changed in (("--draws", 2), ("--force",)):
        kill[:] = [3]
        seen.clear()
        assert pyarith("knockout", run, *K).exit_code == 130 and list(run.glob(".knockout.parts/*"))
        kill.clear()
        seen.clear()
        done = pyarith("knockout", run, *K, *changed)
        assert done.exit_code == 0 and len(seen) == 4, changed
        shutil.rmtree(run / "knockout")
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("baseline", ["mean", "mean-per-position"])
def test_a_kept_curve_is_the_same_curve(discovered, tmp_path, baseline, monkeypatch):
    model, tokenizer = pa.load_demo()
    chosen = choose(SavedRun.open(discovered), tokenizer, "+", "fresh", 12, 1)
    options = {"ks": [1, 48], "draws": 2, "seed": 1, "verify": 0, "progress": False}
    found, alone = curve(model, chosen, baseline, resume=tmp_path, **options)
    plain, _ = curve(model, chosen, baseline, **options)
    monkeypatch.setattr(knockouts, "_curve", None)
    kept, left = curve(model, chosen, baseline, resume=tmp_path, **options)
    assert isinstance(kept, KnockoutCurve) and left == alone and kept.ranking == found.ranking
    assert plainly(curve_record(kept, chosen, alone)) == plainly(curve_record(found, chosen, alone))
    assert repr(kept) == repr(found) == repr(plain) and kept.rows() == found.rows() == plain.rows()
    for name, arm in found.arms.items():
        assert kept.arms[name].heads == arm.heads
        for what in ("accuracy", "logit", "correct"):
            np.testing.assert_array_equal(getattr(kept.arms[name], what), getattr(arm, what))


def test_sigkill_of_the_command_at_a_random_point(run, whole):
    wait = random.uniform(0, 1)
    print(f"killed {wait:.4f} s after the first part")
    arguments = ["knockout", str(run), *map(str, K)]
    code = (
        f"import sys, torch; torch.set_num_threads(1); sys.argv[1:] = {arguments}; from pyarith.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(run.glob(".knockout.parts/*.part")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 0), errors
    done = pyarith("knockout", run, *K)
    assert done.exit_code == 0 and same_step(run, whole) and not list(run.glob(".*")), done.output


def test_two_commands_at_once_end_alike(run, whole):
    arguments = ["knockout", str(run), *map(str, K)]
    code = (
        f"import sys, torch; torch.set_num_threads(1); sys.argv[1:] = {arguments}; from pyarith.cli import main; main()"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert same_step(run, whole) and not list(run.glob(".*"))


def test_one_at_a_time_writes_a_step(run):
    """The second process begins when the first has moved its files, and knows of them."""
    seen = []

    def write(name, value):
        step = Step(SavedRun.open(run), "knockout", {"k": [1], "value": value})
        with step.alone():
            seen.append(f"{name} begins")
            step.file(f"{name}.csv").write_text(value)
            if name == "first":
                other.start()
                other.join(0.3)
            seen.append(f"{name} ends")
            step.finish({}, {})

    other = threading.Thread(target=write, args=("second", "2"))
    write("first", "1")
    other.join()
    assert seen == ["first begins", "first ends", "second begins", "second ends"]
    assert sorted(path.name for path in (run / "knockout").iterdir()) == ["knockout.json", "second.csv"]
    assert not list(run.glob(".*"))
