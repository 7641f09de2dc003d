"""Several processes that work on one run (torch.distributed): which blocks each takes, and what became of the others.

Everything passes through the key-value store of the process group, in small pieces, and none of it waits inside the
library: a collective that a dead rank never joins hangs until its timeout and then does not say who is missing. Each
rank counts up a key of its own once a second; a rank whose key stands still is named by those that wait for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarith import __version__
from pyarith.engine.progress import Progress
from pyarith.engine.store import Part, pack, unpack, versions
from pyarith.errors import RankError, check
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.sites import ModelSites

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a rank counts as dead
ARRIVAL = 1800.0  # seconds that ranks wait for each other where all should arrive
LAST_WORDS = 5.0  # seconds that rank 0 waits, when it ends with an error, for the others to read why
_PAUSE = 0.02  # seconds between two looks
_CHUNK = 4 * 2**20  # a value of torch's TCPStore holds 8 MiB
_SHORT = 19  # characters of a fingerprint in a message
_LEFT, _FAILED, _TOLD = "left", "failed ", "told "  # told: an error that names the rank that it is about

_active: Team | None = None
_teams = 0  # teams so far; every rank makes them in the same order


class Team:
    """The ranks that work on a run together; alone, it is one rank that asks nobody."""

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._store, self._meetings = store, 0
        self._names = [f"rank {one}" for one in range(size)]
        self.neighbours = 1  # ranks on this host, this one among them
        self._seen: dict[int, tuple[str, float]] = {}
        self._dead: set[int] = set()
        self._left: set[int] = set()
        self._looked = -BEAT
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of the key "alive": what is said last stays

    @property
    def name(self) -> str:
        """This rank, its host and process."""
        return self._names[self.rank]

    def shown(self, progress: Progress) -> Progress:
        """The bar is rank 0's; the caller's own function is called on every rank."""
        return progress if self.rank == 0 or callable(progress) else False

    # words to each other

    def gather(self, value: Callable[[], Any]) -> list[Any]:
        """The value of every rank, each of JSON's types; every rank must come here.

        Raises:
            RankError: one is gone, ended with an error, or does not come.
        """
        if self.size == 1:
            return [value()]
        meeting = self._meeting()
        self._set(f"{meeting}/{self.rank}", json.dumps(value()))
        return [json.loads(self._wait(f"{meeting}/{rank}", rank)) for rank in range(self.size)]

    def tell(self, value: Callable[[], Any]) -> Any:
        """Rank 0's value, which only that one works out.

        Raises:
            RankError: rank 0 is gone, ended with an error, or does not come.
        """
        if self.size == 1:
            return value()
        key = f"{self._meeting()}/0"
        if self.rank == 0:
            self._set(key, json.dumps(value()))
        return json.loads(self._wait(key, 0))

    def meet(self) -> None:
        """Every rank waits here for the others."""
        self.gather(lambda: None)

    def same(self, facts: Callable[[], dict[str, Any]]) -> None:
        """See that every rank has the same facts; not called on one rank.

        Raises:
            RankError: which ranks differ, in what. Every rank raises it.
        """
        if self.size == 1:
            return
        found = self.gather(facts)
        for name in found[0]:
            values = [json.dumps(one.get(name), sort_keys=True) for one in found]
            usual = Counter(values).most_common(1)[0][0]
            other = [rank for rank, value in enumerate(values) if value != usual]
            check(
                not other,
                f"ranks: expected the same {name} on all {self.size}, got {usual} on the others and "
                + ", ".join(f"{values[rank]} on {self._names[rank]}" for rank in other)
                + "; start every rank with the same code, model, data and settings",
                RankError,
            )

    def share(self, n: int, compute: Callable[[int], Part]) -> Iterator[tuple[int, Part]]:
        """``(i, compute(i))`` for i < n in any order: each computed by the rank that is free first, all given to all.

        Raises:
            RankError: a rank is gone or ended with an error.
        """
        if self.size == 1:
            yield from ((i, compute(i)) for i in range(n))
            return
        meeting = self._meeting()
        left, read, mine = set(range(n)), 0, -1
        while left:
            self._watch()
            if mine < n and (mine := self._add(f"{meeting}/next") - 1) < n:
                part = compute(mine)
                self._publish(meeting, mine, part)
                left.remove(mine)
                yield mine, part
            before = read
            while (found := self._published(meeting, read + 1)) is not None:
                read += 1
                if found:
                    left.remove(found[0])
                    yield found
            if mine >= n and read == before and left:
                time.sleep(_PAUSE)

    def _publish(self, meeting: int, number: int, part: Part) -> None:
        content = pack(part.arrays, part.record, str(number))
        key = f"{meeting}/done/{self._add(f'{meeting}/done')}"
        chunks = [content[a : a + _CHUNK] for a in range(0, len(content), _CHUNK)]
        for i, chunk in enumerate(chunks):
            self._set(f"{key}/{i}", chunk)
        self._set(key, json.dumps([self.rank, number, len(chunks)]))

    def _published(self, meeting: int, place: int) -> tuple[int, Part] | tuple[()] | None:
        """What a rank put as number ``place``; empty where it was this one, None where there is none yet."""
        key = f"{meeting}/done/{place}"
        said = self._get(key)
        if said is None:
            return None
        rank, number, chunks = json.loads(said)
        if rank == self.rank:
            return ()
        keys = [f"{key}/{i}" for i in range(chunks)]
        part = unpack(b"".join(self._get(one) or b"" for one in keys), str(number))
        check(part is not None, f"ranks: block {number} of {self._names[rank]} arrived damaged; start again", RankError)
        assert part is not None
        if self._add(f"{key}/read") == self.size - 1:  # the last that needs it
            for one in keys:
                self._do(self._store.delete_key, one)
        return number, part

    # signs of life

    def enter(self) -> None:
        """Begin to give signs of life, and learn who the others are."""
        self._say("0")
        threading.Thread(target=self._beat, name="pyarith-beat", daemon=True).start()
        found = self.gather(lambda: [socket.gethostname(), os.getpid()])
        self._names = [f"rank {rank} (host {host}, process {pid})" for rank, (host, pid) in enumerate(found)]
        self.neighbours = sum(host == found[self.rank][0] for host, _ in found)

    def leave(self) -> None:
        """This rank needs nothing more. Rank 0, which may hold the store, goes last."""
        if self.rank == 0:
            for rank in range(1, self.size):
                while self._status(rank) != _LEFT:
                    self._watch()
                    time.sleep(_PAUSE)
        self._end(_LEFT)

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error: the others end, too, and name it. Only the first error counts."""
        if self.size == 1 or self._ended.is_set():
            return
        try:
            self._end((_TOLD if isinstance(error, RankError) else _FAILED) + _text(error))
            until = time.monotonic() + LAST_WORDS
            # the store may live with rank 0: the others should read what happened before it goes
            while self.rank == 0 and isinstance(error, Exception) and time.monotonic() < until:
                said = [self._status(rank) for rank in range(self.size) if rank != self.rank and rank not in self._dead]
                # one that never said anything was never there
                if all(one.startswith((_LEFT, _FAILED, _TOLD)) for one in said if one):
                    break
                time.sleep(_PAUSE)
        except RankError:
            pass  # the store is gone, so nobody is left to be told; the caller raises the first error

    def first_says(self, error: BaseException) -> bool:
        """Whether rank 0 ends with the very error that this rank ends with, waiting a moment for it."""
        until = time.monotonic() + 2 * BEAT
        while self.rank and time.monotonic() < until:
            try:
                said = self._status(0)
            except RankError:
                return False
            if said.startswith((_FAILED, _TOLD)):
                return said.partition(" ")[2] == _text(error)
            time.sleep(_PAUSE)
        return False

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    self._say(str(count))
                except RankError:
                    return  # the main thread meets the same error at its next look, and tells it

    def _end(self, status: str) -> None:
        with self._lock:
            self._ended.set()
            self._say(status)

    def _say(self, status: str) -> None:
        self._set(f"alive/{self.rank}", status)

    def _status(self, rank: int) -> str:
        return (self._get(f"alive/{rank}") or b"").decode()

    def _watch(self) -> None:
        """Raise RankError where a rank is dead or ended with an error; note which have left."""
        now = time.monotonic()
        if now - self._looked < BEAT / 4:
            return
        self._looked = now
        for rank in range(self.size):
            if rank == self.rank:
                continue
            before, since = self._seen.get(rank, ("", now))
            said = self._status(rank)
            if said.startswith(_TOLD):
                raise RankError(said.removeprefix(_TOLD))
            if said.startswith(_FAILED):
                raise RankError(f"{self._names[rank]} ended with an error: {said.removeprefix(_FAILED)}")
            if said == _LEFT:
                self._left.add(rank)
            elif said != before or rank not in self._seen:
                self._seen[rank] = said, now
            elif said and now - since > SILENCE:
                self._dead.add(rank)
                raise RankError(
                    f"{self._names[rank]} has given no sign of life for {now - since:.0f} s: it was killed, or its "
                    "machine is gone; the run ends here (with resume, what is finished is kept)"
                )

    # the store

    def _meeting(self) -> int:
        self._meetings += 1
        return self._meetings

    def _wait(self, key: str, rank: int) -> bytes:
        start = time.monotonic()
        while (found := self._get(key)) is None:
            self._watch()
            # what it said last it said before it left
            if rank in self._left and (found := self._get(key)) is not None:
                break
            check(rank not in self._left, f"{self._names[rank]} left while this rank waits for it", RankError)
            check(
                time.monotonic() - start < ARRIVAL,
                f"{self._names[rank]} did not come within {ARRIVAL:.0f} s: every rank must make the same calls",
                RankError,
            )
            time.sleep(_PAUSE)
        return found

    def _get(self, key: str) -> bytes | None:
        """None where there is none; the store's own ``get`` would wait, and keep the signs of life waiting."""
        return bytes(self._do(self._store.get, key)) if self._do(self._store.check, [key]) else None

    def _set(self, key: str, value: str | bytes) -> None:
        self._do(self._store.set, key, value)

    def _add(self, key: str) -> int:
        return int(self._do(self._store.add, key, 1))

    def _do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:  # torch's DistError among them
            raise RankError(
                f"the store of the process group does not answer any more ({' '.join(str(error).split())[:200]}): "
                f"{self._names[0]}, with which it usually lives, was killed, or its machine is gone"
            ) from error


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def team() -> Iterator[Team]:
    """The ranks of the initialised process group, or this process alone; inside another ``team``, that one.

    Raises:
        RankError: a rank does not come.
    """
    global _active, _teams
    if _active is not None:
        yield _active
        return
    found = _of_group()
    if found.size == 1:
        yield found
        return
    _teams += 1
    _active = found
    try:
        found.enter()
        yield found
        found.leave()
    except BaseException as error:
        found.failed(error)
        raise
    finally:
        _active = None


def _of_group() -> Team:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Team()
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    store = PrefixStore(f"pyarith/{_teams}", _get_default_store())
    return Team(store, dist.get_rank(), dist.get_world_size())


def common(sites: ModelSites) -> dict[str, Any]:
    """What the ranks of any run on a model have in common: facts for ``Team.same``."""
    return {
        "code": code(),
        "versions": versions(),
        "model": [model_fingerprint(sites.model)[:_SHORT], str(sites.dtype), sites.attention],
    }


@functools.cache
def code() -> str:
    """The version, and a hash of all Python files of the package."""
    root, hashed = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        hashed.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{__version__} ({hashed.hexdigest()[:12]})"
