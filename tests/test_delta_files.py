"""Deltas as files: what is written, what is refused, and what a kill or a full disk leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from deltas import HEADS, MLPS, base, same, shift, state, tuned
from safetensors.torch import load_file, save_file

import pyarith as pa
from pyarith.errors import InputError, StorageError
from pyarith.tuning import read_delta
from pyarith.tuning.delta import values_hash


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A delta of the tiny Llama."""
    folder = tmp_path_factory.mktemp("delta")
    tuned(base(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may spoil."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def values_of(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def edit(folder: Path, change: Any) -> None:
    record = json.loads((folder / "delta.json").read_text())
    change(record)
    (folder / "delta.json").write_text(json.dumps(record))


def refused(folder: Path, message: str) -> None:
    model = base()
    before = state(model)
    with pytest.raises(InputError, match=message) as error:
        pa.load_delta(model, folder)
    assert same(model, before) and not hasattr(model, "pyarith_delta") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [([(2, 7)], torch.float32), ([(2, 7), (3, 1), (3, 2)], torch.float32), ([(2, 7), (2, 1), (3, 2)], torch.bfloat16)],
)
def test_a_bundle_is_at_most_a_tenth_larger_than_its_slices(heads, dtype, tmp_path):
    model = pa.load_demo()[0].to(dtype)
    with pa.SelectiveTuner(model, heads) as tuner:
        assert tuner.save_delta(tmp_path) == tmp_path
        slices = tuner.n_parameters * dtype.itemsize
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".safetensors", ".json"]
    assert slices < sum(file.stat().st_size for file in files) <= 1.1 * slices
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_files_hold_new_values_and_what_they_replace(name, tmp_path):
    model = base(name, torch.bfloat16)
    with pa.SelectiveTuner(model, HEADS, MLPS) as tuner:
        shift(tuner, 0)  # not synced: saving does that
        tuner.save_delta(tmp_path, {"lr": 1e-3})
        found = load_file(values_of(tmp_path))
        record = json.loads((tmp_path / "delta.json").read_text())
        assert set(found) == {one.name for one in tuner.slices}
        for one, value in zip(tuner.slices, tuner.parameters(), strict=True):
            assert torch.equal(found[one.name], value.bfloat16())
    assert [(one["name"], one["dim"]) for one in record["slices"]] == [(one.name, one.dim) for one in tuner.slices]
    assert record["heads"] == [list(head) for head in HEADS] and record["mlps"] == MLPS and record["kv"] == "group"
    assert record["format"] == 1 and record["settings"] == {"lr": 1e-3} and record["dtype"] == "torch.bfloat16"
    assert (
        record["versions"]["torch"] == torch.__version__ and record["config"]["model_type"] == model.config.model_type
    )
    assert record["values"] == values_hash(found)
    read = read_delta(tmp_path)
    assert read.base == tuner.base and repr(read).startswith("Delta: 3 heads, 1 MLPs, ")


def test_saved_again_it_replaces_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    tuned(base(), tmp_path)
    first = values_of(tmp_path)
    trained = tuned(base(), tmp_path, seed=1)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "delta.json", values_of(tmp_path).name}
    assert values_of(tmp_path) != first
    model = base()
    pa.load_delta(model, tmp_path)
    assert same(model, trained)


def test_saving_works_after_the_end_and_refuses_what_slices_do_not_give(tmp_path):
    model, want = base(), tuned(base(), tmp_path / "during")
    with pa.SelectiveTuner(model, HEADS, MLPS) as tuner:
        shift(tuner, 0)
    tuner.save_delta(tmp_path / "after")
    other = base()
    pa.load_delta(other, tmp_path / "after")
    assert same(other, want)
    for settings, message in [({"lr": float("nan")}, "settings: .*not JSON compliant"), ({"f": print}, "settings: ")]:
        with pytest.raises(InputError, match=message):
            tuner.save_delta(tmp_path / "no", settings)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    with pytest.raises(InputError, match=r"changed are also lm_head\.weight, model\.layers\.0\.self_attn\.q_proj\.wei"):
        tuner.save_delta(tmp_path / "no")
    model.half()
    with pytest.raises(InputError, match=r"expected weights in torch\.float32, .* got torch\.float16"):
        tuner.save_delta(tmp_path / "no")
    model.float().register_buffer("more", torch.zeros(1))
    with pytest.raises(InputError, match=r"expected 30 tensors, .* got 31"):
        tuner.save_delta(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("")
    del model.more
    with pa.SelectiveTuner(model, HEADS) as tuner, pytest.raises(InputError, match="expected a folder, got the file"):
        tuner.save_delta(tmp_path / "file")


def test_missing_and_half_written_files_are_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", r"expected a delta with delta\.json, got '.*nowhere' without one")
    text, values = (folder / "delta.json").read_bytes(), values_of(folder)
    for part, message in [(text[: len(text) // 2], "to be whole JSON"), (b"", "to be whole JSON")]:
        (folder / "delta.json").write_bytes(part)
        refused(folder, message)
    (folder / "delta.json").write_bytes(b"[" * 100_000)
    refused(folder, "to be whole JSON, got RecursionError")
    (folder / "delta.json").write_bytes(b"\xff\xfe")
    refused(folder, "to be whole JSON, got UnicodeDecodeError")
    (folder / "delta.json").write_bytes(text)
    data = values.read_bytes()
    for part in (data[:-1], data[:100], b"", data + b"x"):
        values.write_bytes(part)
        refused(folder, r"safetensors cannot be read")
    values.unlink()
    refused(folder, r"expected .*\.safetensors, which delta\.json names, and which is not there")


def test_changed_values_are_refused(folder):
    path = values_of(folder)
    good = load_file(path)
    first = next(iter(good))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    refused(folder, r"was changed: expected values with SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}$")
    for changed, message in [
        (
            {name: value for name, value in good.items() if name != first},
            rf"{first}: expected \[.*\] in .*, got nothing",
        ),
        ({**good, "lm_head.weight": torch.zeros(3)}, r"lm_head\.weight: expected nothing, got \[3\] in torch\.float32"),
        ({**good, first: good[first].t().contiguous()}, rf"{first}: expected \[.*\] in torch\.float32, got \["),
        ({**good, first: good[first].half()}, rf"{first}: expected .* in torch\.float32, got .* in torch\.float16"),
    ]:
        save_file(changed, path)
        refused(folder, f"does not hold what delta\\.json names: {message}")


def put(*keys: Any, value: Any) -> Any:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def all_whole(record: Any) -> None:
    record["slices"][0] |= {"name": "model.embed_tokens.weight", "shape": [97, 32], "dim": 0, "ranges": [[0, 16]]}


RECORDS = {
    "newer": (put("format", value=2), r"expected format 1 in .*delta\.json, got 2; a newer pyarith wrote it: update"),
    "older": (put("format", value=0), r"expected format 1 in .*, got 0$"),
    "tool": (put("tool", value="other"), "the record of a delta, which pyarith did not write"),
    "kind": (put("kind", value="result"), "the record of a delta"),
    "heads": (put("heads", value=[[1, 0], [1, 3], [2, 3]]), "does not name the slices of its heads.*q_proj.*ranges"),
    "head": (put("heads", value=[[9, 0]]), r"delta\.json: heads: the model has layers 0 to 2.*got 9\.0"),
    "twice": (put("heads", value=[[1, 0], [1, 0]]), r"delta\.json: heads: expected each head once, got twice 1\.0"),
    "nothing": (lambda r: r.update(heads=[], mlps=[]), "expected at least one head or MLP, got none"),
    "mlps": (put("mlps", value=[]), r"does not name the slices.*up_proj|gate_proj.*expected .* None, got"),
    "kv": (put("kv", value="none"), "does not name the slices.*k_proj.*expected .* None, got"),
    "class": (put("class", value="Phi3ForCausalLM"), "class: expected Phi3ForCausalLM, got LlamaForCausalLM"),
    "dtype": (put("dtype", value="torch.bfloat16"), r"does not hold .*in torch\.bfloat16, got .*in torch\.float32"),
    "path": (put("values", value="../../../etc/passwd"), "'values' to be a SHA-256 in hex, got '../../../etc/passwd'"),
    "digests": (put("tensors", value="0123456789abcdef"), "expected 2 tensors, got 30"),
    "base": (put("slices", 0, "base", value="0" * 64), r"q_proj\.weight: expected SHA-256 000000000000 of the slice"),
    "range": (put("slices", 0, "ranges", value=[[24, 40]]), r"slice 0: expected 'ranges' .* within 32, got \[\[24, 40"),
    "crossed": (put("slices", 0, "ranges", value=[[8, 24], [16, 24]]), "expected 'ranges' to be rising"),
    "moved": (put("slices", 0, "ranges", value=[[8, 24]]), "does not name the slices.*q_proj.*expected.*got"),
    "axis": (put("slices", 0, "dim", value=2), r"slice 0: expected 'dim' to be an axis of \[32, 32\], got 2"),
    "name": (put("slices", 0, "name", value="model.nothing"), r"model\.nothing: expected \[16, 32\]"),
    "repeated": (lambda r: r["slices"].append(r["slices"][0]), "expected each parameter once in slices"),
    "slice": (put("slices", 0, value=3), r"slice 0: expected an object, got 3"),
    "elsewhere": (all_whole, r"embed_tokens\.weight"),
}


@pytest.mark.parametrize("which", RECORDS)
def test_changed_records_are_refused(which, folder):
    change, message = RECORDS[which]
    edit(folder, change)
    refused(folder, message)


def test_a_record_and_values_that_agree_reach_no_other_parameter(folder):
    """Made with care: a slice of the embedding, with values and hash that fit."""
    path = values_of(folder)
    values = load_file(path)
    values["model.embed_tokens.weight"] = values.pop("model.layers.1.self_attn.q_proj.weight")
    digest = values_hash(values)
    save_file(values, folder / f"delta-{digest[:12]}.safetensors")
    edit(folder, lambda record: (all_whole(record), record.update(values=digest)))
    read_delta(folder)
    refused(folder, r"does not name the slices of its heads and MLPs: .*q_proj.*got None; .*embed_tokens.*None, got")


def test_no_value_of_any_field_does_more_than_be_refused(folder):
    record = json.loads((folder / "delta.json").read_text())
    harmless = {"settings", "fingerprint", "versions"}
    places = [(key,) for key in record] + [("slices", 1, key) for key in record["slices"][1]]
    model = base()
    before, n = state(model), 0
    for place in places:
        for value in (None, True, -1, 1.5, 10**30, "x", [], {}, [[1]], [[True, 1]], [[0, 1, 2]], {"a": []}):
            spoilt = json.loads(json.dumps(record))
            put(*place, value=value)(spoilt)
            (folder / "delta.json").write_text(json.dumps(spoilt))
            if place[0] in harmless:
                with contextlib.suppress(InputError):
                    pa.load_delta(model, folder).unload()
                    n += 1
            else:
                with pytest.raises(InputError, match=r"^(folder|model): "):
                    pa.load_delta(model, folder)
        missing = json.loads(json.dumps(record))
        holder = missing
        for key in place[:-1]:
            holder = holder[key]
        del holder[place[-1]]
        (folder / "delta.json").write_text(json.dumps(missing))
        with pytest.raises(InputError, match=r"^folder: "):
            pa.load_delta(model, folder)
    assert same(model, before) and n == 4  # {} and {"a": []} as settings, {} as versions, "x" as fingerprint


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("there", ["another", "the same", ""])
def test_a_full_disk_leaves_the_old_delta(there, tmp_path, monkeypatch):
    place = tmp_path / "delta"
    if there:
        tuned(base(), place)
    files = {file.name: file.read_bytes() for file in place.iterdir()} if there else {}
    expected = "the one before is still there" if there else "nothing was there before"
    with pa.SelectiveTuner(base(), HEADS, MLPS) as tuner:
        shift(tuner, 0 if there == "the same" else 1)
        with full_disk(4096), pytest.raises(StorageError, match=r"delta-.*\.safetensors \(about 0\.\d MiB\): .*large"):
            tuner.save_delta(place)
        assert {file.name: file.read_bytes() for file in place.iterdir()} == files
        calls: list[Any] = []
        replace = os.replace

        def second_fails(source: Any, target: Any) -> None:
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", second_fails)
            with pytest.raises(StorageError, match=rf"delta\.json: .*No space left on device; {expected}"):
                tuner.save_delta(place)
        assert {file.name: file.read_bytes() for file in place.iterdir()} == files
        tuner.save_delta(place)
    assert len(list(place.iterdir())) == 2 and read_delta(place).base == tuner.base


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_a_kill_at_any_point_leaves_the_old_delta_or_the_new_one(call, tmp_path):
    tuned(base(), tmp_path)
    old = read_delta(tmp_path).values
    with pa.SelectiveTuner(base(), HEADS, MLPS) as tuner:
        shift(tuner, 1)
        tuner.sync()
        new = {one.name: torch.cat(one.views(), one.dim) for one in tuner.slices}
        survived = []
        for number in range(3):
            child = os.fork()
            if child == 0:
                killed_at(call, number)
                try:
                    tuner.save_delta(tmp_path)
                finally:
                    os._exit(7)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 7 and number > 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            found = read_delta(tmp_path).values
            survived.append("old" if values_hash(found) == values_hash(old) else "new")
            assert values_hash(found) == values_hash(old if survived[-1] == "old" else new)
        assert survived == {"fsync": ["old", "old"], "replace": ["old", "old"], "unlink": ["new"]}[call]
        tuner.save_delta(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and values_hash(read_delta(tmp_path).values) == values_hash(new)


def killed_at(call: str, number: int) -> None:
    """Kill this process where it calls a function of ``os`` for the ``number``-th time, before that does anything."""
    function, calls = getattr(os, call), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls[0] += 1
        return function(*arguments, **options)

    setattr(os, call, counted)
