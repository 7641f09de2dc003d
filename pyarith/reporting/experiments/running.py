"""Which experiments there are to do in a folder, and doing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarith.errors import check
from pyarith.reporting.experiments import records
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import Subject
from pyarith.reporting.files import file_hash

_DPI = 100


@dataclass(frozen=True)
class Plan:
    """Experiments on one model with their settings, checked against what the folder holds.

    Attributes:
        subject: the model.
        folder: for the records.
        settings: name -> settings, of the experiments that were asked for.
        todo: names of those whose record is not there yet.
        left_out: name -> why it was left out.
    """

    experiments: Mapping[str, Experiment]
    subject: Subject
    folder: Path
    settings: dict[str, dict[str, Any]]
    todo: tuple[str, ...]
    left_out: dict[str, str]
    quick: bool

    @classmethod
    def of(
        cls,
        experiments: Mapping[str, Experiment],
        names: Sequence[str],
        subject: Subject,
        folder: Path,
        *,
        quick: bool = False,
        force: bool = False,
        data: Path | None = None,
        **overrides: int | None,
    ) -> Plan:
        """What is to be done.

        Args:
            experiments: all there are.
            names: of those wanted; ``all`` for every one that can be done with what was given.
            quick: tiny sizes.
            force: do again what is done.
            data: a file of questions for the experiments that take one.
            overrides: ``n`` and ``seed``; None = the experiment's own.
        Raises:
            InputError: an unknown name; a folder with records of another model, or (with ``quick``) with full ones; an
                experiment that needs other models, asked for by name without any.
        """
        wanted = chosen(experiments, names)
        check(not folder.exists() or folder.is_dir(), f"out: expected a folder, got the file {folder}")
        check(data is None or data.is_file(), f"data: expected a file of questions, got {str(data)!r}")
        taking = [name for name in wanted if "data" in experiments[name].settings]
        check(data is None or bool(taking), f"data: none of {', '.join(wanted)} takes a file of questions")
        left_out = {
            name: "compares with other models, which --also PATH gives"
            for name in wanted
            if experiments[name].needs_also and not subject.also
        }
        alone = [name for name in left_out if name in names]
        check(not alone, f"also: {', '.join(alone)} {left_out.get(alone[0], '') if alone else ''}")
        extra = {} if data is None else {"data": str(data), "data_hash": file_hash(data)}
        settings = {
            name: experiments[name].chosen(quick=quick, **overrides) | (extra if name in taking else {})
            for name in wanted
            if name not in left_out
        }
        found = {name: old for name in experiments if (old := records.read(records.path_of(folder, name))) is not None}
        same = subject.identity["fingerprint"]
        others = [
            n for n, old in found.items() if old["model"]["fingerprint"] != same and not (force and n in settings)
        ]
        check(
            not others,
            f"out: {folder} holds {', '.join(others)} of another model, "
            f"{found[others[0]]['model']['name'] if others else ''!r}; use a folder for each model, or do all of "
            "these again with --force",
        )
        full = [name for name in settings if quick and name in found and not found[name]["quick"]]
        check(not full, f"quick: {folder} holds full records of {', '.join(full)}; use another folder for a quick run")
        todo = tuple(
            name
            for name, one in settings.items()
            if force or name not in found or found[name]["key"] != records.key_of(experiments[name], one, subject)
        )
        return cls(experiments, subject, folder, settings, todo, left_out, quick)

    def run(self, command: list[str]) -> Iterator[Results]:
        """Do what is to be done, one after another; each record is written, with its pictures, before it is given."""
        for name in self.todo:
            experiment = self.experiments[name]
            record = records.perform(experiment, self.subject, self.settings[name], quick=self.quick, command=command)
            record["pictures"] = [path.name for path in draw(experiment, record, self.folder)]
            records.write(self.folder, record)
            yield record


def chosen(experiments: Mapping[str, Experiment], names: Sequence[str]) -> list[str]:
    """The names in the order of the experiments, each once.

    Raises:
        InputError: no name, or an unknown one.
    """
    every = [*experiments, "all"]
    unknown = [name for name in names if name not in every]
    check(bool(names) and not unknown, f"experiments: expected some of {', '.join(every)}, got {unknown or 'none'}")
    return [name for name in experiments if name in names or "all" in names]


def draw(experiment: Experiment, record: Results, folder: Path) -> list[Path]:
    """Write the pictures of a record beside it; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in experiment.figures(record).items():
        path = folder / name
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
        made.append(path)
    return made


def draw_missing(experiments: Mapping[str, Experiment], found: Mapping[str, Results], folder: Path) -> None:
    """Draw again, from the records, what pictures are no longer there."""
    for name, record in found.items():
        if any(not (folder / picture).is_file() for picture in record["pictures"]):
            draw(experiments[name], record, folder)
