"""A finished discovery, read back from its run directory for the steps that follow."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.discovery.adaptive import TopHeads
from pyarith.errors import InputError, check
from pyarith.prompts import PromptPairs
from pyarith.reporting.files import whole
from pyarith.reporting.fingerprint import data_hash, model_fingerprint
from pyarith.result import PatchResult
from pyarith.types import Head

RECORD = "run.json"
FORMAT = 1
_KINDS = ("discover", "demo")
_DRAWN = ("operator", "corruption", "n", "seed", "styles", "operands")  # what the prompts of a run are drawn by


def ranking_of(effects: np.ndarray) -> tuple[Head, ...]:
    """All heads, most negative effect first; NaN counts as no effect."""
    order = np.nan_to_num(effects, nan=0.0).ravel().argsort(kind="stable")
    return tuple(Head(*map(int, np.unravel_index(i, effects.shape))) for i in order)


@dataclass(frozen=True)
class SavedRun:
    """What ``run.json`` says, and the results beside it.

    Attributes:
        path: the run directory.
        record: the content of ``run.json``.
    """

    path: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> SavedRun:
        """Read a run directory.

        Raises:
            InputError: there is none, it was not finished, is of another kind or another tool, newer, or incomplete.
        """
        path = Path(path)
        check(path.is_dir(), f"RUN_DIR: no folder {str(path)!r}; pyarith discover MODEL --out {path} makes one")
        file = path / RECORD
        check(
            file.is_file(),
            f"RUN_DIR: expected a finished run with {RECORD}, got {str(path)!r} without one; pyarith discover makes it",
        )
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            own = record["tool"] == "pyarith"
        except (ValueError, KeyError, TypeError):
            own = False
        check(own, f"RUN_DIR: {file} was not written by pyarith, or not to its end")
        found = record.get("format")
        check(
            isinstance(found, int) and found <= FORMAT,
            f"RUN_DIR: {file} has format {found}, this version of pyarith reads up to {FORMAT}; use the version that "
            "wrote it, or discover again",
        )
        kind = record.get("command")
        check(kind in _KINDS, f"RUN_DIR: expected a run of pyarith discover or demo, got one of {kind!r} in {path}")
        try:
            complete = bool(record["runs"]) and record["model"]["fingerprint"] and record["model"]["name"]
            complete = complete and all({"folder", "data"} <= run.keys() for run in record["runs"].values())
        except (KeyError, TypeError, AttributeError):
            complete = False
        check(bool(complete), f"RUN_DIR: {file} lacks the model or the results of a run; discover again")
        hashes = record.get("hashes")
        fits = hashes is None or whole(path, hashes)
        check(fits, f"RUN_DIR: the files in {path} are not those that its {RECORD} lists: changed, or half written")
        return cls(path, record)

    @property
    def signs(self) -> tuple[str, ...]:
        """The operators of the run."""
        return tuple(self.record["runs"])

    @property
    def identity(self) -> dict[str, Any]:
        """What a later step depends on: the model, the prompts and the moment of the discovery."""
        data = {sign: run["data"].get("hash") for sign, run in self.record["runs"].items()}
        return {"model": self.record["model"]["fingerprint"], "data": data, "started": self.record.get("started")}

    @cached_property
    def results(self) -> dict[str, PatchResult]:
        """Operator -> its patching result."""
        found = {}
        for sign, run in self.record["runs"].items():
            folder = self.path / run["folder"] / "result"
            try:
                found[sign] = PatchResult.load(folder)
            except InputError as error:
                raise InputError(f"RUN_DIR: cannot read the result of {sign}: {error}") from None
            except Exception as error:  # what a broken tensor file raises is the library's own
                raise InputError(f"RUN_DIR: cannot read the result of {sign} in {folder}: {error}") from error
        return found

    @cached_property
    def prompts(self) -> dict[str, list[dict[str, str]]]:
        """Operator -> the rows of its prompts.csv."""
        found = {}
        for sign, run in self.record["runs"].items():
            file = self.path / run["folder"] / "prompts.csv"
            check(file.is_file(), f"RUN_DIR: expected the prompts of {sign} in {file}, got none")
            with open(file, newline="", encoding="utf-8") as opened:
                found[sign] = list(csv.DictReader(opened))
        return found

    def factors(self, sign: str) -> dict[str, np.ndarray]:
        """Operand pair and template of each prompt, for resampling.

        Raises:
            InputError: the prompts have none.
        """
        rows = self.prompts[sign]
        known = bool(rows) and {"pair", "template"} <= rows[0].keys()
        check(known, f"RUN_DIR: the prompts of {sign} have no columns pair and template")
        return {name: np.array([row[name] for row in rows]) for name in ("pair", "template")}

    def effects(self, sign: str) -> np.ndarray:
        """[n_layers, n_heads] mean relative effects.

        Raises:
            InputError: the run has no heads.
        """
        effects = self.results[sign].head_effects
        if effects is None:
            raise InputError(f"RUN_DIR: expected effects of heads for {sign}, got a run without them")
        return np.asarray(effects)

    def top(self, sign: str) -> TopHeads | None:
        """The top heads of a run with ``top_k``, None of others."""
        record = self.record["runs"][sign].get("top")
        return None if record is None else TopHeads.from_record(record)

    def key_heads(self, sign: str, threshold: float) -> list[Head]:
        """Heads below ``threshold``, strongest first; of a run with ``top_k`` those of its top k."""
        self.effects(sign)
        top, below = self.top(sign), self.results[sign].key_heads(threshold)
        return below if top is None else [head for head in top.heads if head in below]

    def ranking(self, sign: str) -> tuple[Head, ...]:
        """All heads, most negative effect first; of a run with ``top_k`` its top k first, each part by the mean change
        of the answer's logit that the race found."""
        top = self.top(sign)
        if top is None:
            return ranking_of(self.effects(sign))
        return (*top.heads, *(head for head in ranking_of(top.change) if head not in top.heads))

    def same_model(self, model: Any) -> None:
        """Refuse a model that is not the run's.

        Raises:
            InputError: with both fingerprints.
        """
        expected, found = self.record["model"]["fingerprint"], model_fingerprint(model)
        check(
            found == expected,
            f"RUN_DIR: the run was made with another model: {self.record['model']['name']} had fingerprint "
            f"{expected[:19]}..., the model loaded now has {found[:19]}...; give the run's model with --model, or "
            "discover again",
        )

    def draw(self, tokenizer: Any, sign: str, **changed: Any) -> PromptPairs:
        """Prompts of the run's task, drawn as the run's were except for what is ``changed``.

        Raises:
            InputError: the run is of a task that cannot be drawn again.
            Whatever ``tasks.arithmetic`` raises.
        """
        from pyarith import tasks

        data = self.record["runs"][sign]["data"]
        known = data.get("task") == "arithmetic" and all(name in data for name in _DRAWN)
        check(known, f"RUN_DIR: expected prompts of pa.tasks.arithmetic, got task {data.get('task')!r} for {sign}")
        options = {name: data[name] for name in _DRAWN} | changed
        options["styles"], options["operands"] = tuple(options["styles"]), tuple(options["operands"])
        return tasks.arithmetic(tokenizer, **options)

    def pairs(self, tokenizer: Any, sign: str) -> PromptPairs:
        """The run's own prompts, in the order of its result.

        Raises:
            InputError: they do not come out as they were, by their hash.
        """
        drawn = self.draw(tokenizer, sign)
        places = {text: i for i, text in enumerate(drawn.prompts)}
        rows = self.prompts[sign]
        fits = all(row["prompt"] in places for row in rows)
        pairs = drawn.subset([places[row["prompt"]] for row in rows]) if fits and rows else drawn
        fits = fits and data_hash(pairs) == self.record["runs"][sign]["data"].get("hash")
        check(
            fits, f"RUN_DIR: the prompts of {sign} cannot be made again as they were: another tokenizer, or templates"
        )
        return pairs
