"""What a report is made from: a saved run, and those of its steps that are finished and belong to it."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarith.errors import InputError
from pyarith.reporting.report.blocks import operator_title
from pyarith.reporting.saved import SavedRun
from pyarith.reporting.steps import Step

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class FoundStep:
    """A step of a run as it lies on disk.

    Attributes:
        name: of the step.
        folder: where it lies.
        record: its record, None where it is not to be shown.
        reason: why it is not to be shown; empty where it was never begun.
    """

    name: str
    folder: Path
    record: dict[str, Any] | None
    reason: str = ""

    def table(self, name: str) -> Rows:
        """Rows of a CSV file of the step; none where the step did not write it."""
        assert self.record is not None
        return read_table(self.folder / name) if name in self.record["hashes"] else []


def read_table(path: Path) -> Rows:
    """Rows of a CSV file, all values as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find_step(run: SavedRun, name: str) -> FoundStep:
    """Read a step, and say why it is not to be shown if it is not.

    To be shown it must be finished, its files must be the ones that it wrote, and it must have been made from this run.
    """
    folder = run.path / name
    path = folder / f"{name}.json"
    if not path.exists():
        begun = folder.is_dir() or (run.path / f".{name}.partial").is_dir()
        return FoundStep(name, folder, None, f"{name}/ was not finished." if begun else "")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        own, settings, of = record["tool"] == "pyarith", dict(record["settings"]), record["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return FoundStep(name, folder, None, f"{name}/{name}.json is not the whole record of a step.")
    if not own:
        return FoundStep(name, folder, None, f"Not shown: {name}/{name}.json was not written by pyarith.")
    try:
        step = Step(run, name, settings)
    except InputError as error:  # of a newer version
        return FoundStep(name, folder, None, f"Not shown: {error}.")
    if of != run.identity:
        return FoundStep(name, folder, None, f"Not shown: {name}/ belongs to another run.")
    if not step.finished:
        return FoundStep(name, folder, None, f"Not shown: the files in {name}/ are not those that the step wrote.")
    return FoundStep(name, folder, step.record)


@dataclass
class Source:
    """A run and its steps, each read once.

    Attributes:
        run: the saved run.
    """

    run: SavedRun
    _steps: dict[str, FoundStep] = field(default_factory=dict)

    def step(self, name: str) -> FoundStep:
        """A step by name."""
        if name not in self._steps:
            self._steps[name] = find_step(self.run, name)
        return self._steps[name]

    @property
    def steps(self) -> tuple[FoundStep, ...]:
        """The steps that were asked for so far and are to be shown."""
        return tuple(step for step in self._steps.values() if step.record is not None)

    @cached_property
    def titles(self) -> dict[str, str]:
        """Operator -> its name in words."""
        return {sign: operator_title(sign) for sign in self.run.signs}

    def table(self, sign: str, name: str) -> Rows:
        """heads.csv or mlps.csv of an operator; none where these were not among the senders."""
        path = self.run.path / self.file(sign, name)
        return read_table(path) if path.is_file() else []

    def file(self, sign: str, name: str) -> str:
        """A file of an operator, from the run directory."""
        return (Path(self.run.record["runs"][sign]["folder"]) / name).as_posix()

    def command(self, name: str) -> str:
        """The command that makes a step of this run."""
        return shlex.join(["pyarith", name, str(self.run.path)])
