"""``fast_patch`` and ``pyarith discover`` that go on after a kill, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs
import torch
from rank_jobs import LENGTHS, PLAN, bits, given, model
from single_thread import on_one_thread, one_thread  # noqa: F401
from snapshot import unchanged
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.discovery import patching
from pyarith.engine import run
from pyarith.engine.planner import Plan, Planner
from pyarith.errors import InputError, InputTypeError

HERE = Path(__file__).parent
QUIET: dict[str, Any] = {"verify": 0, "progress": False}


class Killed(BaseException):
    """In place of a kill."""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "plan", lambda self, budget, ranks=1: PLAN)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts of every block that is computed."""
    seen: list[list[int]] = []
    real = run._block

    def block(sites: Any, batch: Any, replay: Any, prefix: Any, groups: Any, *rest: Any) -> Any:
        seen.append(torch.cat(groups).tolist())
        return real(sites, batch, replay, prefix, groups, *rest)

    monkeypatch.setattr(run, "_block", block)
    return seen


def patch(where: torch.nn.Module | None = None, **options: Any) -> pa.PatchResult:
    return pa.fast_patch(where or model(), **{**given(), **QUIET, **options})


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("options", [{}, {"mlps": "frozen", "log_probs": True, "foils": [[i, 9] for i in range(11)]}])
def test_a_killed_run_goes_on_bit_for_bit(options: Any, tmp_path: Path, blocks: list[list[int]]) -> None:
    mine, calls = model(), []
    whole = patch(mine, **options, progress=lambda *call: calls.append(call))
    assert calls == [(2, 11), (4, 11), (6, 11), (8, 11), (10, 11), (11, 11)]
    order = list(blocks)
    assert [LENGTHS[b[0]] for b in order] == sorted((LENGTHS[b[0]] for b in order), reverse=True), "the longest first"
    for stop in (0, 2, 4):
        folder, told = tmp_path / str(stop), []

        def kill(done: int, total: int, stop: int = stop) -> None:
            if (done, total) == calls[stop]:
                raise Killed

        with unchanged(mine), pytest.raises(Killed):
            patch(mine, **options, progress=kill, resume=folder)
        blocks.clear()
        again = patch(mine, **options, progress=lambda *call: told.append(call), resume=folder)  # noqa: B023
        assert bits(again) == bits(whole) and again.settings["plan"] == whole.settings["plan"]
        assert blocks == order[stop + 1 :] and again.settings["resumed_blocks"] == stop + 1 and told == calls
    blocks.clear()
    assert bits(patch(mine, **options, resume=str(folder))) == bits(whole) and blocks == []
    assert "resumed_blocks" not in whole.settings


@pytest.mark.usefixtures("planned")
def test_damaged_and_foreign_parts_are_computed_again(tmp_path: Path, blocks: list[list[int]]) -> None:
    mine = model()
    whole = patch(mine, resume=tmp_path)
    files = parts(tmp_path)
    contents = [file.read_bytes() for file in files]
    assert len(files) == 1 + 6  # the plan, the blocks
    for number, file in enumerate(files):
        content = contents[number]
        for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), contents[number - 1]):
            file.write_bytes(wrong)
            blocks.clear()
            assert bits(patch(mine, resume=tmp_path)) == bits(whole)
            assert file.read_bytes() == content and len(blocks) <= 1


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize(
    "changed",
    [
        {"mlps": "frozen"},
        {"senders": ("heads",)},
        {"log_probs": True},
        {"foils": [[1]] * 11},
        {"answers": [5] * 11},
        {"backend": "reference"},
        {"weight": 0.5},
        {"plan": Plan(2, 32, 64)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_parts_of_another_call_are_not_taken(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, options = model(), dict(changed)
    patch(mine, resume=tmp_path)
    if options.pop("weight", None):
        mine.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.5
    if "plan" in options:
        plan = options.pop("plan")
        monkeypatch.setattr(Planner, "plan", lambda self, budget, ranks=1: plan)
        options["memory_budget"] = "1GiB"
    found = patch(mine, resume=tmp_path, **options)
    assert found.settings["resumed_blocks"] == 0
    assert bits(found) == bits(patch(mine, **options))


def test_blocks_of_the_interrupted_run_stay(
    tmp_path: Path, blocks: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan would be made by now, and memory ran out twice; what fits is kept, what does not is not."""
    mine, failed = model(), []
    real = run.capture

    def tight(sites: Any, batch: Any, indices: torch.Tensor, *rest: Any) -> None:
        if len(indices) > 2 or (len(indices) > 1 and len(parts(tmp_path)) > 2):
            failed.append(len(indices))
            raise torch.OutOfMemoryError("full")
        real(sites, batch, indices, *rest)

    monkeypatch.setattr(Planner, "plan", lambda self, budget, ranks=1: Plan(4, 64, 64))
    monkeypatch.setattr(run, "capture", tight)
    whole = patch(mine, resume=tmp_path)
    assert failed == [4, 2] and whole.settings["plan"]["prompts"] == 1
    monkeypatch.setattr(run, "capture", real)
    monkeypatch.setattr(Planner, "plan", lambda self, budget, ranks=1: Plan(11, 2048, 512))
    kept = parts(tmp_path)
    assert len(kept) == 4  # the plans and three blocks, the first of two halves
    blocks.clear()
    again = patch(mine, resume=tmp_path)
    assert blocks == [] and bits(again) == bits(whole) and again.settings["plan"] == whole.settings["plan"]
    for number, file in enumerate(kept):  # each block is computed again as it was
        content = file.read_bytes()
        if len(content) > 1000:
            file.unlink()
            assert bits(patch(mine, resume=tmp_path)) == bits(whole) and file.read_bytes() == content, number
    monkeypatch.setattr(run, "free_bytes", lambda device: 1000)
    smaller = patch(mine, resume=tmp_path)
    assert smaller.settings["plan"]["prompts"] == 11 and smaller.settings["resumed_blocks"] == 0
    np.testing.assert_allclose(smaller.head_logits, whole.head_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("planned")
def test_batches_of_one_call_are_kept_apart(tmp_path: Path, blocks: list[list[int]]) -> None:
    inputs = given()
    batches = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(0, 5), slice(5, 11))]
    whole = pa.fast_patch(model(), batches, **QUIET, resume=tmp_path)
    calls = len(blocks)
    assert bits(pa.fast_patch(model(), batches, **QUIET, resume=tmp_path)) == bits(whole) and len(blocks) == calls
    assert pa.fast_patch(model(), batches[1], **QUIET, resume=tmp_path).settings["resumed_blocks"] == 3


@pytest.mark.usefixtures("planned")
def test_without_resume_no_key_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "circumstances", lambda sites: pytest.fail("a key was made"))
    monkeypatch.setattr(patching, "common", lambda sites: pytest.fail("facts were made"))
    patch()


@pytest.mark.usefixtures("planned")
def test_what_resume_refuses(tmp_path: Path) -> None:
    mine = model()
    handle = mine.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"resume: expected a model without hooks .* on model.layers.1.mlp"):
        patch(mine, resume=tmp_path)
    handle.remove()
    with pytest.raises(InputTypeError, match="resume: expected None or a folder"):
        patch(mine, resume=3)
    (tmp_path / "file").write_text("notes")
    with pytest.raises(InputError, match="resume: expected a folder, got the file"):
        patch(mine, resume=tmp_path / "file")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, pa.PromptPairs]:
    loaded, tokenizer = pa.load_demo()
    return loaded, pa.tasks.arithmetic(tokenizer, "+", n=12, seed=0)


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "confidence": 0.9}], ids=["all", "race"])
def test_discover_goes_on(options: Any, demo: Any, tmp_path: Path, blocks: list[list[int]]) -> None:
    whole = pa.discover(*demo, **QUIET, **options)
    calls = len(blocks)

    def kill(done: int, total: int) -> None:
        if done > 5:
            raise Killed

    with pytest.raises(Killed):
        pa.discover(*demo, **{**QUIET, "progress": kill}, **options, resume=tmp_path)
    blocks.clear()
    again = pa.discover(*demo, **QUIET, **options, resume=tmp_path)
    assert 0 < len(blocks) < calls
    for name in ("head_logits", "clean_logits"):
        np.testing.assert_array_equal(getattr(again.result, name), getattr(whole.result, name))
    for name in ("correct", "still_correct"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    blocks.clear()
    written = {file: file.stat().st_mtime_ns for file in parts(tmp_path)}
    pa.discover(*demo, **QUIET, **options, resume=tmp_path)
    assert blocks == [] and written == {file: file.stat().st_mtime_ns for file in parts(tmp_path)}, "answers too"


def test_force_forgets_and_a_note_tells(tmp_path: Path, loud_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "plan", lambda self, budget, ranks=1: PLAN)
    real, kill = run._block, []

    def block(*arguments: Any) -> Any:
        if kill and kill.pop() == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "_block", block)
    out = tmp_path / "run"
    demo = Path(pa.__file__).parent / "demo" / "model"
    command = [str(one) for one in ("discover", demo, "-n", 8, "--verify", 0, "--out", out)]
    kill[:] = [0, 1]
    assert CliRunner().invoke(app, command, prog_name="pyarith").exit_code == 130
    assert [one.name for one in out.iterdir()] == [".discover.parts"]
    before = len(parts(out / ".discover.parts"))
    done = CliRunner().invoke(app, command, prog_name="pyarith")
    assert done.exit_code == 0 and "Going on with the parts that an interrupted run left" in done.stderr
    record = json.loads((out / "run.json").read_text())
    assert before >= 2 and record["runs"]["+"]["patching"]["resumed_blocks"] == 1 and not list(out.glob(".*"))
    kill[:] = [0, 1]
    assert CliRunner().invoke(app, [*command, "--force"], prog_name="pyarith").exit_code == 130
    assert (out / "run.json").is_file() and parts(out / ".discover.parts"), "the run that is there stays"
    done = CliRunner().invoke(app, [*command, "--force"], prog_name="pyarith")
    record = json.loads((out / "run.json").read_text())
    assert done.exit_code == 0 and record["runs"]["+"]["patching"]["resumed_blocks"] == 0 and not list(out.glob(".*"))


# runs that are killed by the system, or have company


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("jobs")
    script = [sys.executable, "patch_jobs.py", str(folder)]
    done = subprocess.run(script, cwd=HERE, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def alone() -> str:
    with on_one_thread(), pytest.MonkeyPatch.context() as context:
        context.setattr(Planner, "plan", lambda self, budget, ranks=1: PLAN)
        found: str = rank_jobs.patch()["bits"]
        return found


def test_sigkill_at_random_points(jobs: dict[str, Any], alone: str) -> None:
    for seen in jobs["kills"]:
        assert seen["end"] == alone and seen["hidden"] == [], seen
        assert set(seen["statuses"]) <= {-signal.SIGKILL, 0}, seen
    statuses = [status for seen in jobs["kills"] for status in seen["statuses"]]
    assert statuses.count(-signal.SIGKILL) >= 6 and any(0 < seen["kept"] for seen in jobs["kills"])


def test_processes_with_one_folder_end_alike_even_if_it_is_thrown_away(jobs: dict[str, Any], alone: str) -> None:
    assert jobs["together"] == {"statuses": [0, 0, 0], "bits": [alone] * 3}


def test_sigkill_of_the_command_at_random_points(jobs: dict[str, Any]) -> None:
    for seen in jobs["killed"]:
        assert seen["statuses"][0] in (-signal.SIGKILL, 0) and seen["statuses"][1] == 0, seen
        assert {name: seen[name] for name in jobs["whole"]} == jobs["whole"], seen


def test_two_commands_with_one_run_directory_end_alike(jobs: dict[str, Any]) -> None:
    assert jobs["both"] == {"statuses": [0, 0], **jobs["whole"]}
