"""The run directory: ``run.json`` says how everything beside it was made."""

from __future__ import annotations

import json
import math
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith import __version__
from pyarith.discovery.discover import Discovery
from pyarith.errors import InputError, check
from pyarith.reporting.fingerprint import data_hash, model_fingerprint
from pyarith.reporting.tables import head_rows, mlp_rows, prompt_rows, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "run.json"
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib")


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that can change a number; None where one is not installed."""
    found: dict[str, str | None] = {"pyarith": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


class RunDirectory:
    """A directory that holds one run. Nothing is written before the first ``add_...``.

    An earlier run of pyarith in it is replaced: the files that its ``run.json`` lists are deleted, others stay.

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
        self._old = self._earlier()

    def _earlier(self) -> list[str]:
        """The files of an earlier run, by its record."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return []
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            own = record["tool"] == "pyarith"
            files = [str(name) for name in record["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            own, files = False, []
        if not own:
            raise InputError(
                f"out: expected a new or empty directory or one with an earlier run of pyarith, got {self.path} with "
                f"{sorted(entry.name for entry in self.path.iterdir())[:3]} in it; choose another"
            )
        return files

    def file(self, name: str) -> Path:
        """The path of a file that is about to be written, its folder made, and listed in the record."""
        self._clear()
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(name)
        return path

    def _clear(self) -> None:
        root = self.path.resolve()
        for name in self._old:
            old = (root / name).resolve()
            if old.is_relative_to(root) and old.is_file():
                old.unlink()
                if old.parent != root and not any(old.parent.iterdir()):
                    old.parent.rmdir()
        self._old = []

    def add_discovery(self, name: str, discovery: Discovery, folder: str = "", threshold: float = -0.05) -> None:
        """Write heads.csv, mlps.csv, prompts.csv and result/ into ``folder``, and note the rest for the record."""
        at = f"{folder}/" if folder else ""
        result = discovery.result
        tables = {"heads": head_rows(result, threshold), "mlps": mlp_rows(result), "prompts": prompt_rows(discovery)}
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
        }

    def add_figure(self, name: str, figure: Figure) -> Path:
        """Write a picture."""
        path = self.file(name)
        figure.savefig(path, dpi=150)
        return path

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
        """Write ``run.json``; a directory without it was not finished.

        Args:
            command: what was run, such as ``"discover"``.
            model: the model, for its fingerprint.
            name: what the model was asked for by.
            settings: every option of the command.
            seeds: what each seed was for.
            seconds: wall-clock time of each step.
            revision: the commit of a hub model, where it is known.
        """
        first: dict[str, Any] = next((run["patching"] for run in self._runs.values()), {})
        parameters = list(model.parameters())
        record = {
            "tool": "pyarith",
            "format": _FORMAT,
            "command": command,
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
        path = self.file(RECORD)
        text = json.dumps(plain({**record, "files": self._files}), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: numpy scalars and arrays unpacked, NaN and infinity as None, the rest as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
