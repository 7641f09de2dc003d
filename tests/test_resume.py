"""Parts of long runs in a folder: the store, and sweeps that go on after a kill, bit for bit."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from sweep_oracle import POSITIONS, QUIET, SETS, given, rows
from tiny_models import make

import pyarith as pa
from pyarith.engine import sweep_run
from pyarith.engine.store import Store, digest
from pyarith.engine.sweep_layers import Carrier
from pyarith.engine.sweep_plan import SweepPlan, SweepPlanner
from pyarith.errors import InputError, InputTypeError, StorageError

# the store


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def test_what_is_put_is_found_under_its_key_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "er").under(lambda: {"a": 1})
    arrays = {"x": np.arange(6.0).reshape(2, 3).T, "b": np.array([True, False]), "i": np.array([2**60])}
    store.put(("one", 2), arrays, {"plan": [1, 2], "rate": 0.1, "none": None})
    found = store.get("one", 2)
    assert found is not None and found.record == {"plan": [1, 2], "rate": 0.1, "none": None}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    assert store.get("one", 3) is None and store.get("one") is None
    again = Store(tmp_path / "deep" / "er")
    assert again.under(lambda: {"a": 1}).get("one", 2) is not None
    assert again.under(lambda: {"a": 2}).get("one", 2) is None and again.get("one", 2) is None
    assert not list((tmp_path / "deep" / "er").glob(".*"))


def test_without_a_folder_nothing_is_kept_and_no_key_is_made() -> None:
    store = Store(None).under(lambda: pytest.fail("the key was made"))
    store.put(("a",), {"x": np.ones(2)})
    assert store.get("a") is None


def test_damaged_and_foreign_files_count_as_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(("a",), {"x": np.ones(3)}, {"n": 1})
    store.put(("b",), {"x": np.zeros(3)}, {"n": 2})
    first, second = (tmp_path / f"{digest(['', [name]])}.part" for name in "ab")
    whole, other = first.read_bytes(), second.read_bytes()
    for place in range(len(whole)):
        first.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert store.get("a") is None, f"byte {place} of {len(whole)}"
    for content in (*(whole[:size] for size in range(len(whole))), whole + b"\n", other, b"notes", b"{}"):
        first.write_bytes(content)
        assert store.get("a") is None, content[:40]
    store.put(("a",), {"x": np.ones(3)}, {"n": 1})
    assert first.read_bytes() == whole


def test_a_kill_while_a_part_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            store.put(("a",), {"x": np.ones(3)})
    assert store.get("a") is None and len(list(tmp_path.iterdir())) == 1
    store.put(("b",), {"x": np.ones(3)})
    assert len(list(tmp_path.iterdir())) == 2
    store.put(("a",), {"x": np.ones(3)})
    assert parts(tmp_path) == sorted(tmp_path.iterdir()) and len(parts(tmp_path)) == 2


def test_two_processes_may_write_the_same_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has it ready between the writing and the renaming of this one."""
    replace = os.replace

    def late(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        Store(tmp_path).put(("a",), {"x": np.ones(3)})
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    Store(tmp_path).put(("a",), {"x": np.ones(3)})
    assert Store(tmp_path).get("a") is not None and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"resume: cannot keep a part in .*No space left"):
        Store(tmp_path / "new").put(("a",), {"x": np.ones(3)})
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot keep a part"):
        Store(tmp_path / "file" / "below").put(("a",), {"x": np.ones(3)})


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="resume: expected a folder, got the file"):
        Store(tmp_path / "file")
    with pytest.raises(InputTypeError, match="resume: expected None or a folder, got int"):
        Store(5)  # type: ignore[arg-type]


def test_digest_tells_values_apart() -> None:
    x = np.arange(4, dtype=np.float32)
    values = [
        x,
        x.astype(np.float64),
        x.reshape(2, 2),
        x + 1,
        x[::2],
        x[:2],
        torch.from_numpy(x).bfloat16(),
        "x",
        1,
        1.5,
    ]
    values += [[1, 2], [2, 1], {"a": 1}, {"a": [1]}, None, True, float("nan")]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": (2, np.int64(3))}) == digest({"b": [np.int32(2), 3], "a": 1})
    assert digest(x[::2]) == digest(x[::2].copy()) and digest(torch.ones(2, 3).T) == digest(torch.ones(3, 2))
    with pytest.raises(TypeError, match="digest: expected JSON's types, arrays and tensors, got object"):
        digest([object()])


# sweeps

PLAN = SweepPlan(4, 5, 20)  # two blocks of prompts, chunks that start in different layers


class Killed(Exception):
    pass


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepPlanner, "plan", lambda self, budget: PLAN)


def sweep(model: Any, where: str = "all", **options: Any) -> pa.AblationSweep:
    single = [(layer, head) for layer in range(3) for head in range(4)]
    wanted: dict[str, Any] = {"sets": [*single, *SETS], "predictions": True, "foils": torch.ones(6, 2).long()}
    return pa.ablation_sweep(model, **{**given(rows()), "positions": where, **wanted, **QUIET, **options})


def bits(result: pa.AblationSweep) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in vars(result).items() if isinstance(value, np.ndarray)}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed from here on: a name for each pass over the intact model and each chunk of sets."""
    seen: list[str] = []
    real = Carrier.run

    def run(self: Any, *rest: Any) -> torch.Tensor:
        seen.append("sets")
        return real(self, *rest)

    for name in ("prepare_all", "prepare_end"):
        prepare = getattr(sweep_run, name)
        monkeypatch.setattr(sweep_run, name, lambda *rest, prepare=prepare: (seen.append("clean"), prepare(*rest))[1])
    monkeypatch.setattr(Carrier, "run", run)
    return seen


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "neox"])
def test_a_killed_sweep_goes_on_bit_for_bit(
    name: str, where: str, tmp_path: Path, planned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each chunk in turn; of two families only after the first, and at the ends of blocks."""
    model = make(name, torch.float32)
    calls: list[tuple[int, int]] = []
    whole = sweep(model, where, progress=lambda *call: calls.append(call))
    assert len(calls) == 2 * 5 and "resumed_parts" not in whole.settings
    for stop in range(len(calls)) if name == "llama-gqa2" else (0, 4, 9):
        folder, told = tmp_path / str(stop), []

        def kill(done: int, total: int, stop: int = stop) -> None:
            if (done, total) == calls[stop]:
                raise Killed

        with unchanged(model), pytest.raises(Killed):
            sweep(model, where, progress=kill, resume=folder)
        with monkeypatch.context() as patch:
            seen = counted(patch)
            again = sweep(model, where, progress=lambda *call: told.append(call), resume=folder)  # noqa: B023
        assert bits(again) == bits(whole) and again.settings["plan"] == whole.settings["plan"]
        assert seen.count("sets") == len(calls) - stop - 1 and again.settings["resumed_parts"] == stop + 1
        assert seen.count("clean") == (2 if stop < 4 else 1 if stop < 9 else 0) and told == calls


def test_a_finished_sweep_runs_nothing_again(tmp_path: Path, planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama-gqa2", torch.float32)
    whole = sweep(model, resume=tmp_path)
    seen = counted(monkeypatch)
    again = sweep(model, resume=str(tmp_path), verify=2)
    assert seen == [] and bits(again) == bits(whole) and again.verification_error < 1e-5
    assert again.settings["resumed_parts"] == 10 and again.settings["seconds"]["ablated"] == 0


def test_damaged_parts_are_computed_again(tmp_path: Path, planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama-gqa2", torch.float32)
    whole = sweep(model, resume=tmp_path)
    files = parts(tmp_path)
    assert len(files) == 1 + 2 * (2 + 5)  # plans; per block the clean run, what chunks start from, the chunks
    seen = counted(monkeypatch)
    contents = [file.read_bytes() for file in files]
    for number, file in enumerate(files):
        for wrong in (
            contents[number][:-1],
            contents[number][:-1] + bytes([contents[number][-1] ^ 1]),
            contents[number - 1],
        ):
            file.write_bytes(wrong)
            seen.clear()
            assert bits(sweep(model, resume=tmp_path)) == bits(whole)
            assert file.read_bytes() == contents[number]
            assert seen in ([], ["clean"], ["clean", "sets"])


@pytest.mark.parametrize(
    "changed",
    [
        {"sets": [(0, 0)]},
        {"predictions": False},
        {"foils": None},
        {"positions": "end"},
        {"baseline": "mean"},
        {"input_ids": given(rows(seed=2))["input_ids"]},
        {"answers": torch.zeros(6, dtype=torch.int64)},
        {"attention_mask": None},
        {"backend": "reference"},
        {"weight": 0.5},
        {"plan": SweepPlan(4, 6, 20)},
        {"threads": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_parts_of_another_sweep_are_not_taken(
    changed: dict[str, Any], tmp_path: Path, planned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama-gqa2", torch.float32)
    sweep(model, resume=tmp_path)
    options = dict(changed)
    if options.pop("weight", None):
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.5
    if "plan" in options:
        plan = options.pop("plan")
        monkeypatch.setattr(SweepPlanner, "plan", lambda self, budget: plan)
        options["memory_budget"] = "1GiB"
    if "baseline" in options:
        inputs = given(rows())
        options["baseline"] = pa.MeanAblation.from_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    threads = options.pop("threads", 1)
    torch.set_num_threads(threads)
    try:
        found = sweep(model, resume=tmp_path, **options)
    finally:
        torch.set_num_threads(1)
    assert found.settings["resumed_parts"] == 0
    assert bits(found) == bits(sweep(model, **options)) or threads > 1


def test_two_baselines_of_one_kind_are_told_apart(tmp_path: Path, planned: None) -> None:
    model = make("llama-gqa2", torch.float32)
    inputs = given(rows())
    one, other = (
        pa.MeanAblation.from_inputs(model, inputs["input_ids"][:n], inputs["attention_mask"][:n]) for n in (2, 6)
    )
    sweep(model, baseline=one, resume=tmp_path)
    assert sweep(model, baseline=other, resume=tmp_path).settings["resumed_parts"] == 0
    assert sweep(model, baseline=one, resume=tmp_path).settings["resumed_parts"] == 10


def test_blocks_of_the_interrupted_run_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan would be made by now, and memory ran out in the middle; what fits is kept, what does not is not."""
    model = make("llama-gqa2", torch.float32)
    real, failed = Carrier.run, []

    def once(self: Any, clean: Any, chunk: Any, *rest: Any) -> torch.Tensor:
        if not failed and int(clean.indices[0]) not in (1, 4) and chunk.first[0] == 1:
            failed.append(True)
            raise torch.OutOfMemoryError("full")
        return real(self, clean, chunk, *rest)

    monkeypatch.setattr(SweepPlanner, "plan", lambda self, budget: SweepPlan(2, 8, 40))
    with monkeypatch.context() as patch:
        patch.setattr(Carrier, "run", once)
        whole = sweep(model, resume=tmp_path)
    assert failed and whole.settings["plan"] == {"prompts": 1, "sets": 4, "tokens": 20}
    monkeypatch.setattr(SweepPlanner, "plan", lambda self, budget: SweepPlan(6, 100, 2048))
    seen = counted(monkeypatch)
    again = sweep(model, resume=tmp_path)
    assert seen == [] and bits(again) == bits(whole) and again.settings["plan"] == whole.settings["plan"]
    monkeypatch.setattr(sweep_run, "free_bytes", lambda device: 1000)
    smaller = sweep(model, resume=tmp_path)
    assert smaller.settings["plan"]["prompts"] == 6 and smaller.settings["resumed_parts"] == 0
    np.testing.assert_allclose(smaller.logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_models_with_hooks_are_refused(tmp_path: Path, planned: None) -> None:
    model = make("llama-gqa2", torch.float32)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"resume: expected a model without hooks .* on model.layers.1.mlp"):
        sweep(model, resume=tmp_path)
    sweep(model)
    handle.remove()
    with pytest.raises(InputError, match="resume: expected a model without hooks"), pa.ablated(model, [(0, 1)]):
        sweep(model, resume=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputTypeError, match="resume: expected None or a folder"):
        sweep(model, resume=3)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_resume, torch
from tiny_models import make
torch.set_num_threads(1)
test_resume.SweepPlanner.plan = lambda self, budget: test_resume.PLAN
test_resume.sweep(make("llama-gqa2", torch.float32), progress=lambda *_: time.sleep(0.05), resume=sys.argv[1])
"""


def killed(script: str, folder: Path, least: int, wait: float) -> None:
    """Run a script in a process of its own and kill it ``wait`` seconds after it has ``least`` parts in ``folder``."""
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(parts(folder)) < least and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors


def test_sigkill_at_a_random_point(tmp_path: Path, planned: None) -> None:
    wait = random.uniform(0, 0.35)
    print(f"killed {wait:.4f} s after the first part")
    killed(SCRIPT.format(tests=str(Path(__file__).parent)), tmp_path, 1, wait)
    model = make("llama-gqa2", torch.float32)
    again = sweep(model, resume=tmp_path)
    assert bits(again) == bits(sweep(model))
    assert 0 <= again.settings["resumed_parts"] < 10 and not list(tmp_path.glob(".*")), wait
