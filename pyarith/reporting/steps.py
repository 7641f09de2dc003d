"""Steps that follow a discovery and live in its run directory: ``knockout/``, ``analysis/``, ``tune/``.

A step's files are written to a hidden folder first and moved when all are there; its record, which lists them with
their hashes, comes last. So a step without a record, or whose files do not fit it, was not finished. Of two processes
that do the same step at the same time, each writes ``alone``; the last one's files stay.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarith.errors import check
from pyarith.reporting.files import file_hash, locked, settings_hash, throw_away, whole, write_json
from pyarith.reporting.saved import SavedRun
from pyarith.reporting.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP_FORMAT = 1


class Step:
    """One step of a saved run.

    Args:
        run: the run that the step belongs to.
        name: of the step and of its folder; the record is ``NAME/NAME.json``.
        settings: everything that can change a number. Together with the run's own identity they say whether a finished
            step is the one that is asked for.
    Raises:
        InputError: the step was written by a newer version.
    """

    def __init__(self, run: SavedRun, name: str, settings: dict[str, Any]) -> None:
        self.run, self.name, self.settings = run, name, settings
        self.folder = run.path / name
        self.record_path = self.folder / f"{name}.json"
        self.key = settings_hash({"step": name, "settings": settings, "run": run.identity})
        self._stage = run.path / f".{name}.partial"
        self._names: list[str] = []
        self._started = datetime.now(timezone.utc)
        self._old = self._read()

    def _read(self) -> dict[str, Any]:
        """The record of an earlier run of the step; empty where there is none that can be read."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(record, dict) or record.get("tool") != "pyarith":
            return {}
        found = record.get("format")
        check(
            isinstance(found, int) and found <= STEP_FORMAT,
            f"RUN_DIR: {self.record_path} has format {found}, this version of pyarith reads up to {STEP_FORMAT}; "
            "use the version that wrote it, or another run directory",
        )
        return record

    @property
    def finished(self) -> bool:
        """Whether the step was finished with these settings on this run, and its files are as it left them."""
        return self._old.get("key") == self.key and whole(self.folder, self._old.get("hashes"))

    @property
    def record(self) -> dict[str, Any]:
        """The record of the finished step."""
        return self._old

    @property
    def parts(self) -> Path:
        """A folder for what is finished of a long step, kept over a kill; gone with ``finish``."""
        return self.run.path / f".{self.name}.parts"

    def forget_parts(self) -> None:
        """Throw away what an interrupted run left."""
        throw_away(self.parts)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is inside this for the same step: the files are written and moved here."""
        with locked(self.run.path / f".{self.name}.lock"):
            self._old = self._read()  # another process may have written it meanwhile
            yield

    def file(self, name: str) -> Path:
        """Where to write a file of the step, its folder made; it gets to its place with ``finish``."""
        path = self._begin(name)
        self._names.append(name)
        return path

    def add_folder(self, name: str, write: Callable[[Path], Any]) -> None:
        """Let ``write`` fill a folder; the step has all files that are in it then."""
        folder = self._begin(name)
        write(folder)
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        self._names += [path.relative_to(self._stage).as_posix() for path in found]

    def _begin(self, name: str) -> Path:
        if not self._names:
            shutil.rmtree(self._stage, ignore_errors=True)  # what a kill left behind
        path = self._stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_figure(self, name: str, figure: Figure) -> None:
        """Write a picture."""
        figure.savefig(self.file(name), dpi=150)

    def finish(self, content: dict[str, Any], seconds: dict[str, float]) -> list[Path]:
        """Move the files to their place and write the record; returns all of them, the record last."""
        hashes = {name: file_hash(self._stage / name) for name in self._names}
        record = {
            "tool": "pyarith",
            "format": STEP_FORMAT,
            "step": self.name,
            "key": self.key,
            "command_line": sys.argv,
            "started": self._started.isoformat(timespec="seconds"),
            "versions": versions(),
            "run": self.run.identity,
            "settings": self.settings,
            "seconds": seconds,
            **content,
            "hashes": hashes,
        }
        self.folder.mkdir(exist_ok=True)
        # without a record nothing in the folder counts as finished, so a kill from here on costs the step, no more
        self.record_path.unlink(missing_ok=True)
        root = self.folder.resolve()
        for name in self._old.get("hashes", {}):
            old = (root / name).resolve()
            if old.is_relative_to(root) and old.is_file():
                old.unlink()
        for name in self._names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._stage / name, self.folder / name)
        write_json(self.record_path, record)
        shutil.rmtree(self._stage)
        self.forget_parts()
        return [*(self.folder / name for name in self._names), self.record_path]
