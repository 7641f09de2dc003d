"""Records of experiments: one JSON file each, written whole, recognised when it is the one that is asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pyarith.errors import check
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import Subject
from pyarith.reporting.files import plain, settings_hash, write_json
from pyarith.reporting.versions import versions

FORMAT = 1
_DIGITS = 6  # enough to compare, few enough to keep records small


def key_of(experiment: Experiment, settings: Mapping[str, Any], subject: Subject) -> str:
    """Same key, same numbers: experiment, settings, models, format."""
    models = [one.identity["fingerprint"] for one in (subject, *(subject.also if experiment.needs_also else ()))]
    return settings_hash({"experiment": experiment.name, "settings": settings, "models": models, "format": FORMAT})


def path_of(folder: Path, name: str) -> Path:
    """Where the record of an experiment lies."""
    return folder / f"{name}.json"


def perform(
    experiment: Experiment, subject: Subject, settings: Mapping[str, Any], *, quick: bool, command: list[str]
) -> Results:
    """Run an experiment; its record, not yet written.

    Args:
        command: the command line, as it is to be recorded.
    Raises:
        Whatever the experiment raises.
    """
    started, begun, used = datetime.now(timezone.utc), time.perf_counter(), time.process_time()
    results = rounded(plain(experiment.run(subject, settings)))
    return {
        "tool": "pyarith",
        "format": FORMAT,
        "experiment": experiment.name,
        "what": experiment.question,
        "quick": quick,
        "key": key_of(experiment, settings, subject),
        "command_line": command,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "versions": versions(),
        "model": subject.identity,
        "also": [one.identity for one in subject.also] if experiment.needs_also else [],
        "settings": plain(dict(settings)),
        "results_hash": settings_hash(results),
        "results": results,
    }


def rounded(value: Any) -> Any:
    """Numbers to six significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{_DIGITS}g}")
    return value


def write(folder: Path, record: Results) -> Path:
    """Write a record; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, record["experiment"])
    write_json(path, record)
    return path


def read(path: Path) -> Results | None:
    """The record in a file, None where there is no such file.

    Raises:
        InputError: it is no record, one of a newer version, or one whose numbers were changed since.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        own = record["tool"] == "pyarith" and record["experiment"] == path.stem
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    check(own, f"out: {path} is no record of an experiment {path.stem}; choose another folder, or remove it")
    found = record.get("format")
    newer = isinstance(found, int) and found <= FORMAT
    check(newer, f"out: {path} has format {found}, this version of pyarith reads up to {FORMAT}; use the newer pyarith")
    whole = record.get("results_hash") == settings_hash(record.get("results") or {})
    check(whole, f"out: the numbers in {path} are not those that were recorded; run the experiment again (--force)")
    return record


def read_all(folder: Path, names: list[str]) -> dict[str, Results]:
    """The records that are in a folder, by experiment.

    Raises:
        InputError: as ``read``; records of different models.
    """
    found = {name: record for name in names if (record := read(path_of(folder, name))) is not None}
    models = {record["model"]["fingerprint"]: record["model"]["name"] for record in found.values()}
    check(
        len(models) < 2,
        f"out: expected records of one model in {folder}, got those of {', '.join(map(repr, models.values()))}; use a "
        "folder for each model",
    )
    return found
