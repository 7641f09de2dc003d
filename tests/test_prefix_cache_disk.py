"""The folder of a ``PrefixCache``: found again by another process, never believed when broken, never overfull."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_runs import fixed, same, tiny, train, tuner
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged

import pyarith as pa
from pyarith.errors import InputError
from pyarith.tuning import PrefixCache

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = 3 * 6 * 32 * 4  # bytes of the first batch of ``fixed`` in fp32


def filled(folder: Path, **options: Any) -> dict[str, Any]:
    """What a cache over the three batches says of itself after one pass."""
    model = tiny()
    with tuner(model) as trained, torch.no_grad():
        cache = PrefixCache(trained, disk=folder, **options)
        for one in fixed():
            cache(**one)
        return cache.stats()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_files_are_served_to_a_later_cache(tmp_path: Path) -> None:
    plain = train(tiny(), lambda _: fixed())
    stats = filled(tmp_path)
    assert stats["computed"] == 3 and stats["disk_bytes"] == sum(one.stat().st_size for one in files(tmp_path))
    again = train(tiny(), lambda _: fixed(), lambda one: PrefixCache(one, disk=tmp_path))
    assert same(plain, again)
    stats = again[2].stats()
    assert (stats["computed"], stats["served"], stats["corrupted"]) == (0, 9, 0)
    assert stats["seconds_saved"] is not None  # against what the first cache measured


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from prefix_runs import fixed, tiny, tuner
from pyarith.tuning import PrefixCache
model = tiny()
with tuner(model) as trained:
    cache = PrefixCache(trained, disk=sys.argv[1])
    for one in fixed():
        cache(**one).loss.backward()
    print(cache.stats()["served"], cache.stats()["computed"])
    print([value.grad.double().sum().item() for value in trained.parameters()])
"""


def test_another_process_finds_them(tmp_path: Path) -> None:
    def run() -> list[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    filled(tmp_path)
    found = run()
    assert found[0] == "3 0"
    model = tiny()
    with tuner(model) as trained:
        for one in fixed():
            model(**one, use_cache=False).loss.backward()
        assert str([value.grad.double().sum().item() for value in trained.parameters()]) == found[1]


def test_memory_in_front_of_the_folder(tmp_path: Path) -> None:
    plain = train(tiny(), lambda _: fixed())
    cached = train(tiny(), lambda _: fixed(), lambda one: PrefixCache(one, STATES, disk=tmp_path))
    assert same(plain, cached)
    stats = cached[2].stats()
    assert (stats["computed"], stats["served"], stats["not_kept"], stats["memory_bytes"]) == (3, 6, 0, STATES)


def test_examples_of_files_are_put_together(tmp_path: Path) -> None:
    filled(tmp_path)
    model, turned = tiny(), {name: value.flip(0) for name, value in fixed()[2].items()}
    with tuner(model) as trained:
        cache = PrefixCache(trained, 1, disk=tmp_path)
        torch.testing.assert_close(cache(**turned).loss, model(**turned).loss)
        assert cache.stats()["assembled"] == 1


def _flip(place: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return damage


def _swap_rows(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-256] + data[-128:] + data[-256:-128])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of the header": _flip(0.05),
    "a bit of the metadata": _flip(0.2),
    "a bit of the states": _flip(0.9),
    "the last bit": _flip(1.0),
    "two rows swapped": _swap_rows,
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing left": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_bytes(b"not this" * 400),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "while in use"])
@pytest.mark.parametrize("name", DAMAGE)
def test_broken_files_are_computed_again(tmp_path: Path, name: str, late: bool) -> None:
    filled(tmp_path)
    names = files(tmp_path)
    model = tiny()
    with tuner(model) as trained, torch.no_grad():
        if not late:
            DAMAGE[name](files(tmp_path)[0])
        cache = PrefixCache(trained, 1, disk=tmp_path)
        if late:
            DAMAGE[name](files(tmp_path)[0])
        for one in fixed():
            assert torch.equal(cache(**one).logits, model(**one).logits)
        stats = cache.stats()
        assert stats["corrupted"] == 1
        assert stats["computed"] == 1
        for one in fixed():
            assert torch.equal(cache(**one).logits, model(**one).logits)
        assert cache.stats()["computed"] == 1
    assert files(tmp_path) == names
    assert filled(tmp_path)["computed"] == 0


def test_a_file_that_vanished_is_computed_again(tmp_path: Path) -> None:
    filled(tmp_path)
    model = tiny()
    with tuner(model) as trained, torch.no_grad():
        cache = PrefixCache(trained, 1, disk=tmp_path)
        files(tmp_path)[0].unlink()
        for one in fixed():
            cache(**one)
        assert cache.stats()["computed"] == 1 and len(files(tmp_path)) == 3


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    plain = train(tiny(), lambda _: fixed())
    with warnings.catch_warnings(record=True) as caught, largest_file(1000):
        warnings.simplefilter("always")
        cached = train(tiny(), lambda _: fixed(), lambda one: PrefixCache(one, 1, disk=tmp_path))
    assert same(plain, cached)
    assert [str(one.message).count("has no more room") for one in caught if "PrefixCache" in str(one.message)] == [1]
    stats = cached[2].stats()
    assert (stats["computed"], stats["not_kept"], stats["disk_bytes"]) == (9, 9, 0)
    assert files(tmp_path) == []


def test_other_errors_of_the_disk_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained, disk=tmp_path)
        monkeypatch.setattr(os, "replace", broken)
        with unchanged(model), pytest.raises(OSError, match="Input/output"):
            cache(**fixed()[0])
    assert files(tmp_path) == []


def test_the_budget_of_the_folder_holds_over_processes(tmp_path: Path) -> None:
    one_file = filled(tmp_path / "all")["disk_bytes"] // 3
    room = int(1.5 * one_file)
    stats = filled(tmp_path / "few", memory=1, disk_budget=room)
    assert (stats["not_kept"], len(files(tmp_path / "few"))) == (2, 1)
    assert 0 < stats["disk_bytes"] <= room
    stats = filled(tmp_path / "few", memory=1, disk_budget=room)
    assert (stats["computed"], stats["served"], len(files(tmp_path / "few"))) == (2, 1, 1)


def test_what_a_killed_process_left_is_removed_in_time(tmp_path: Path) -> None:
    old, new = tmp_path / "0.1.prefix.partial", tmp_path / "0.2.prefix.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    filled(tmp_path)
    assert not old.exists() and new.exists()  # the new one may be another process's


def test_a_folder_of_other_states_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    other, deeper = tiny(seed=1), tiny()
    with tuner(other) as trained, pytest.raises(InputError, match="would not compute here: weights below was"):
        PrefixCache(trained, disk=tmp_path)
    with tuner(deeper, 2) as trained, pytest.raises(InputError, match=r"first_layer was 1, now 2"):
        PrefixCache(trained, disk=tmp_path)
    with tuner(tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) as trained:
        with pytest.raises(InputError, match=r"config\.rope_parameters\.rope_theta was 10000\.0, now 500000\.0"):
            PrefixCache(trained, disk=tmp_path)
    torch.set_num_threads(2)
    with tuner(tiny()) as trained, pytest.raises(InputError, match="threads was 1, now 2"):
        PrefixCache(trained, disk=tmp_path)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_other_heads_above_share_a_folder(tmp_path: Path) -> None:
    filled(tmp_path)
    model = tiny()
    with pa.SelectiveTuner(model, [(1, 3)]) as trained:
        cache = PrefixCache(trained, disk=tmp_path)
        cache(**fixed()[0])
        assert cache.stats()["served"] == 1


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with tuner(tiny()) as trained:
        with pytest.raises(InputError, match=r"disk: .*file cannot be used as a folder"):
            PrefixCache(trained, disk=tmp_path / "file")
        with pytest.raises(InputError, match="disk_budget: expected together with disk"):
            PrefixCache(trained, disk_budget="1GiB")
        with pytest.raises(InputError, match="disk_budget: expected bytes"):
            PrefixCache(trained, disk=tmp_path / "new", disk_budget="much")
    assert not (tmp_path / "new").exists()
