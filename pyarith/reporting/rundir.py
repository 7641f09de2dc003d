"""The run directory: ``run.json`` says how everything beside it was made."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarith.discovery.discover import Discovery
from pyarith.errors import InputError, check
from pyarith.reporting.files import (
    REPORT,
    file_hash,
    is_report,
    locked,
    settings_hash,
    throw_away,
    whole,
    write_json,
)
from pyarith.reporting.fingerprint import data_hash, model_fingerprint
from pyarith.reporting.judgement import Judgement
from pyarith.reporting.saved import FORMAT, RECORD
from pyarith.reporting.tables import head_rows, mlp_rows, prompt_rows, write_csv
from pyarith.reporting.versions import versions as versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = ("knockout", "analysis", "transfer", "tune", "profile")  # of later commands; gone with their run
_STAGE, _PARTS, _LOCK = ".partial", ".discover.parts", ".lock"


class RunDirectory:
    """A directory that holds one run. Nothing is written before the first ``add_...``.

    Files are written to a hidden folder in it; ``finish`` moves them and writes ``run.json`` last, so a kill leaves the
    earlier run as it was, or no ``run.json``. An earlier run of pyarith is replaced by then: the files that it and the
    steps after it list are deleted, others stay. Of several processes that do the same run at the same time, each
    inside ``alone`` from the first file on, the first to finish writes it.

    Args:
        path: new, empty, or holding an earlier run.
    Raises:
        InputError: ``path`` is a file, or a directory with something else in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: list[str] = []
        self._runs: dict[str, dict[str, Any]] = {}
        self._started = datetime.now(timezone.utc)
        check(not self.path.exists() or self.path.is_dir(), f"out: expected a directory, got the file {self.path}")
        self._stage = self.path / _STAGE
        self._old, self._record = self._earlier()

    def _earlier(self) -> tuple[list[str], dict[str, Any]]:
        """The files of an earlier run and its record. Of an interrupted one there may be no more than the stage."""
        entries = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if not [name for name in entries if not name.startswith((_STAGE, _PARTS, _LOCK))]:
            return [], {}
        # the record may be on its way from the second place to the first
        for file in (self.path / RECORD, self._stage / RECORD, self.path / RECORD):
            record = _read(file)
            if record is not None:
                return [str(name) for name in record["files"]], record
        raise InputError(
            f"out: expected a new or empty directory or one with an earlier run of pyarith, got {self.path} with "
            f"{entries[:3]} in it; choose another"
        )

    def done(self, command: str, model: Any, settings: dict[str, Any]) -> bool:
        """Whether the directory holds this very run, finished: command, settings, model and all files."""
        return (self.path / RECORD).is_file() and self._same(self._record, command, model, settings)

    def _same(self, old: dict[str, Any], command: str, model: Any, settings: dict[str, Any]) -> bool:
        same = old.get("command") == command and old.get("format") == FORMAT
        same = same and old.get("key") == _key(command, settings) and whole(self.path, old.get("hashes"))
        return same and bool(old["model"]["fingerprint"] == model_fingerprint(model))

    @property
    def parts(self) -> Path:
        """A folder for finished blocks of prompts, kept over a kill; gone with ``finish``."""
        return self.path / _PARTS

    def forget_parts(self) -> None:
        """Throw away finished blocks."""
        throw_away(self.parts)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is inside this in the same directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / _LOCK):
            yield

    def file(self, name: str) -> Path:
        """Where to write a file, its folder made; it gets to its place, and is listed in the record, by ``finish``."""
        if not self._files:
            shutil.rmtree(self._stage, ignore_errors=True)  # what an interrupted run left
        path = self._stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(name)
        return path

    def _clear(self) -> None:
        """Delete the earlier run: its record first, since a run without one counts as unfinished."""
        root = self.path.resolve()
        for step in STEPS:
            try:
                record = json.loads((root / step / f"{step}.json").read_text(encoding="utf-8"))
                self._old += [f"{step}/{step}.json", *(f"{step}/{name}" for name in record["hashes"])]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        if self._old and is_report(root / REPORT):
            self._old.append(REPORT)
        for step in STEPS if self._old else ():
            shutil.rmtree(root / f".{step}.parts", ignore_errors=True)  # of a step that was interrupted
        for name in [RECORD, *self._old] if self._old else []:
            old = (root / name).resolve()
            if old.is_relative_to(root) and old.is_file():
                old.unlink()
                for folder in old.parents:
                    if folder == root or any(folder.iterdir()):
                        break
                    folder.rmdir()
        self._old = []

    def add_discovery(
        self,
        name: str,
        discovery: Discovery,
        folder: str = "",
        threshold: float = -0.05,
        judgement: Judgement | None = None,
    ) -> None:
        """Write heads.csv, mlps.csv, prompts.csv and result/ into ``folder``, and note the rest for the record."""
        at = f"{folder}/" if folder else ""
        result = discovery.result
        sure = None if judgement is None else judgement.confidence
        tables = {
            "heads": head_rows(result, threshold, sure, discovery.top),
            "mlps": mlp_rows(result, sure),
            "prompts": prompt_rows(discovery),
        }
        for table, rows in tables.items():
            if rows:
                write_csv(self.file(f"{at}{table}.csv"), rows)
        saved = [self.file(f"{at}result/{file}") for file in ("result.json", "tensors.safetensors")]
        result.save(saved[0].parent)
        self._runs[name] = {
            "folder": folder or ".",
            "data": {"hash": data_hash(discovery.pairs), **discovery.pairs.settings},
            "summary": discovery.summary(threshold),
            "quantity": result.semantics,
            "patching": result.settings,
            "seconds": discovery.seconds,
            **({} if judgement is None else judgement.record(threshold)),
            **({} if discovery.top is None else {"top": discovery.top.record()}),
        }

    def add_figure(self, name: str, figure: Figure) -> Path:
        """Write a picture; returns where it will lie."""
        figure.savefig(self.file(name), dpi=150)
        return self.path / name

    def finish(
        self,
        command: str,
        model: Any,
        *,
        name: str,
        settings: dict[str, Any],
        seeds: dict[str, int],
        seconds: dict[str, float],
        revision: str | None = None,
    ) -> Path:
        """Move all files to their place and write ``run.json``; a directory without it was not finished.

        Where another process has finished the same run meanwhile, that one stays.

        Args:
            command: what was run, such as ``"discover"``.
            model: the model, for its fingerprint.
            name: what the model was asked for by.
            settings: every option of the command.
            seeds: what each seed was for.
            seconds: wall-clock time of each step.
            revision: the commit of a hub model, where it is known.
        """
        now = _read(self.path / RECORD)
        if now is not None and now != self._record:
            if self._same(now, command, model, settings):
                shutil.rmtree(self._stage)
                self.forget_parts()
                return self.path / RECORD
            self._old = [str(name) for name in now["files"]]
        first: dict[str, Any] = next((run["patching"] for run in self._runs.values()), {})
        parameters = list(model.parameters())
        record = {
            "tool": "pyarith",
            "format": FORMAT,
            "command": command,
            "key": _key(command, settings),
            "command_line": sys.argv,
            "started": self._started.isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": {"system": platform.platform(), "processor": platform.machine()},
            "model": {
                "name": name,
                "revision": revision,
                "class": type(model).__name__,
                "family": first.get("family"),
                "parameters": sum(p.numel() for p in parameters),
                "dtype": str(parameters[0].dtype).removeprefix("torch."),
                "device": str(parameters[0].device),
                "fingerprint": model_fingerprint(model),
            },
            "seeds": seeds,
            "settings": settings,
            "backends": first.get("backends", {}),
            "seconds": seconds,
            "runs": self._runs,
        }
        names = list(self._files)
        hashes = {name: file_hash(self._stage / name) for name in names}
        record |= {"files": [*names, RECORD], "hashes": hashes}
        write_json(self.file(RECORD), record)
        self._clear()
        for file in [*names, RECORD]:  # the record last
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._stage / file, self.path / file)
        shutil.rmtree(self._stage)
        self.forget_parts()
        return self.path / RECORD


def _read(file: Path) -> dict[str, Any] | None:
    """A record of pyarith, None where there is none that can be read."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if record["tool"] == "pyarith" and isinstance(record["files"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(command: str, settings: dict[str, Any]) -> str:
    return settings_hash({"command": command, "settings": settings})
