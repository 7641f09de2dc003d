"""Several ranks on one run: the same numbers as one process, work for whoever is free, and errors that name a rank."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs
import torch
from single_thread import on_one_thread, one_thread  # noqa: F401
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.engine import launch
from pyarith.engine.planner import Plan, Planner
from pyarith.engine.ranks import Team, code, team
from pyarith.errors import RankError

HERE = Path(__file__).parent
MODEL = Path(pa.__file__).parent / "demo" / "model"
NAMED = r"rank {} \(host [^,]+, process {}\)"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "rank_jobs.py", str(folder)], cwd=HERE, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    print({name: [one.get("seconds") for one in ranks] for name, ranks in found.items()})
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process with the blocks of the jobs."""
    with on_one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "plan", lambda self, budget, ranks=1: rank_jobs.PLAN)
        return rank_jobs.patch()


def ended(ranks: list[dict[str, Any]], status: int = 0) -> bool:
    return all(one["status"] == status for one in ranks)


def names(error: str, ranks: list[dict[str, Any]], rank: int) -> bool:
    return re.search(NAMED.format(rank, ranks[rank]["pid"]), error) is not None


def test_the_same_blocks_give_the_same_bits_on_every_rank(jobs: dict[str, Any], alone: dict[str, Any]) -> None:
    for job in ("equal", "twice", "resumed"):
        assert ended(jobs[job]) and {one["bits"] for one in jobs[job]} == {alone["bits"]}, job
    assert len({one["again"] for one in jobs["twice"]}) == 1
    assert {one["ranks"] for one in jobs["equal"]} == {3} and alone["ranks"] is None


def test_whoever_is_free_takes_the_next_block(jobs: dict[str, Any]) -> None:
    taken = [one["blocks"] for one in jobs["equal"]]
    assert sum(taken) == 6 and taken[0] < max(taken[1:]), "rank 0 was slow"


def test_own_plans_cut_blocks_for_all_and_agree_to_rounding(jobs: dict[str, Any], alone: dict[str, Any]) -> None:
    own = jobs["own_plan"]
    assert ended(own) and [one["plan"]["prompts"] for one in own] == [6, 6] and sum(one["blocks"] for one in own) == 2
    assert own[0]["bits"] == own[1]["bits"]
    np.testing.assert_allclose(own[0]["logits"], alone["logits"], rtol=1e-4, atol=1e-4)


def test_out_of_memory_is_a_matter_of_one_rank(jobs: dict[str, Any], alone: dict[str, Any]) -> None:
    found = jobs["out_of_memory"]
    assert ended(found) and [one["plan"]["prompts"] for one in found] == [2, 1] and found[0]["bits"] == found[1]["bits"]
    np.testing.assert_allclose(found[0]["logits"], alone["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("job", "rank", "what"),
    [
        ("other_settings", 1, 'the same mlps .*"recomputed" on the others and "frozen" on rank 1'),
        ("other_data", 2, "the same data .* on rank 2"),
        ("other_model", 0, r"the same model .*sha256:.* on rank 0"),
        ("other_code", 1, r'the same code .*"9.9 \(of another day\)" on rank 1'),
    ],
)
def test_ranks_that_differ_are_named_by_all(jobs: dict[str, Any], job: str, rank: int, what: str) -> None:
    ranks = jobs[job]
    assert ended(ranks, 1) and len({one["error"] for one in ranks}) == 1
    error = ranks[0]["error"]
    assert re.match(f"RankError: ranks: expected {what}", error) and names(error, ranks, rank), error


def test_an_error_of_one_rank_ends_all(jobs: dict[str, Any]) -> None:
    first, broken, third = jobs["broken"]
    assert ended(jobs["broken"], 1) and broken["error"] == "ValueError: the third floor is on fire"
    for one in (first, third):
        who = NAMED.format(1, broken["pid"])
        assert re.fullmatch(f"RankError: {who} ended with an error: the third floor is on fire", one["error"])


def test_a_dead_rank_ends_all_with_its_name(jobs: dict[str, Any]) -> None:
    ranks = jobs["killed"]
    assert [one["status"] for one in ranks] == [1, -9, 1]
    for one in (ranks[0], ranks[2]):
        who = NAMED.format(1, ranks[1]["pid"])
        assert re.match(f"RankError: {who} has given no sign of life", one["error"]) and one["seconds"] < 20
    held, other = jobs["first_killed"]
    assert held["status"] == -9 and other["status"] == 1 and other["seconds"] < 20
    assert "store of the process group does not answer" in other["error"]
    assert names(other["error"], jobs["first_killed"], 0)


def test_a_rank_that_does_not_come_is_named(jobs: dict[str, Any]) -> None:
    assert jobs["absent"][0]["error"] == (
        "RankError: rank 1 did not come within 1 s: every rank must make the same calls"
    )


def test_blocks_of_a_job_that_was_killed_serve_other_ranks(jobs: dict[str, Any]) -> None:
    assert [one["status"] for one in jobs["resumed_and_killed"]] == [1, -9]
    found = jobs["resumed"]
    assert 1 <= found[0]["resumed_blocks"] < 6 and {one["resumed_blocks"] for one in found} == {
        6 - sum(one["blocks"] for one in found)
    }


def test_a_tuner_under_ddp_reduces_the_slices_only(jobs: dict[str, Any]) -> None:
    first, second = jobs["tuned"]
    assert ended(jobs["tuned"]) and first["bits"] == second["bits"], "every rank holds the same weights"
    assert first["reduced"] == [first["n_parameters"]] * 3
    alone, before = rank_jobs.model(), rank_jobs.model().state_dict()
    with pa.SelectiveTuner(alone, **rank_jobs.CHOICE) as tuner:
        assert tuner.n_parameters == first["n_parameters"]
        rank_jobs.step(alone, tuner, slice(8))
        trained = {one.name for one in tuner.slices}
    for name, value in alone.state_dict().items():
        found = torch.tensor(first["weights"][name])
        # AdamW's first steps are of size lr whatever the gradient: rounding may turn one that is next to zero
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
        assert torch.equal(found, before[name]) is (name not in trained), name


def test_sharded_models_are_refused(jobs: dict[str, Any]) -> None:
    for found in jobs["sharded"]:
        assert found["status"] == 0
        for name in ("fast_patch", "before"):
            assert re.match(
                r"UnsupportedModelError: model: expected whole parameters, got model.layers.0.\S+ sharded", found[name]
            ), found
        for name in ("layers", "whole"):
            assert re.match(r"UnsupportedModelError: .* after the SelectiveTuner was attached", found[name]), found


def test_alone_nothing_is_asked_and_no_fact_is_made() -> None:
    with team() as one:
        one.same(lambda: pytest.fail("facts were made"))
        assert (one.rank, one.size, one.tell(lambda: 3), one.gather(lambda: 4)) == (0, 1, 3, [4])
        assert isinstance(one, Team) and one.shown(None) is None
    assert re.fullmatch(r"\S+ \([0-9a-f]{12}\)", code())


def test_ranks_get_blocks_enough_to_end_together() -> None:
    planner = Planner.__new__(Planner)
    planner.n, planner.pair, planner.prefix = 200, torch.tensor([16]), 0
    planner.sites = type("Sites", (), {"device": torch.device("cpu")})()
    planner.bytes = lambda plan: 0  # type: ignore[method-assign]
    assert planner.plan(1) == Plan(100, 2048, 512)
    assert [planner.plan(1, ranks).prompts for ranks in (2, 4, 16)] == [25, 13, 8]


def test_launched_processes_are_told_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.launched() and launch.own_device("auto") == "auto"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        assert not launch.launched()
        monkeypatch.setenv(name, value)
    assert launch.launched()
    done = CliRunner().invoke(app, ["doctor"], prog_name="pyarith")
    assert done.exit_code == 2 and "pyarith doctor: expected one process, got 2 ranks" in done.stderr
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    own = {one: launch.own_device(one) for one in ("auto", "cuda", "cuda:0", "cpu")}
    assert own == {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RankError, match="LOCAL_RANK 2 with 2 CUDA devices"):
        launch.own_device("auto")


# the command


def torchrun(*arguments: Any) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "--rdzv-endpoint", "127.0.0.1:0", "-m", "pyarith", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_discover_under_torchrun(tmp_path: Path) -> None:
    command = "discover", MODEL, "-n", 12, "--verify", 0, "--out"
    done = torchrun(*command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one = CliRunner().invoke(app, [str(part) for part in (*command, tmp_path / "one")], prog_name="pyarith")
    assert one.exit_code == 0, one.output
    # rank 0 prints, and once
    assert done.stdout.count("Wrote ") == 2 and done.stdout.count("Took ") == 1
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["runs"]["+"]["patching"]["ranks"] == 2 and not list((tmp_path / "two").glob(".*"))
    for mine, other in zip(*(read(tmp_path / name / "heads.csv") for name in ("two", "one")), strict=True):
        assert (mine["layer"], mine["head"]) == (other["layer"], other["head"])
        np.testing.assert_allclose(float(mine["effect"]), float(other["effect"]), atol=1e-5)
    two, one_ = (read(tmp_path / name / "prompts.csv") for name in ("two", "one"))
    assert [(row["prompt"], row["correct"]) for row in two] == [(row["prompt"], row["correct"]) for row in one_]
