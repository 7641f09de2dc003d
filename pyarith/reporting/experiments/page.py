"""The page: records in, Markdown out. Nothing but records (and the text of the experiments) goes into it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pyarith.errors import check
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results

DEMO = "pyarith demo model"
_PICTURE = re.compile(r"\]\((E\d+\.png)\)")
_ABOUT_DEMO = (
    " It is tiny and was trained on prompts of this kind to show the paper's pattern (early attention was slowed down "
    "so that heads form in middle layers; division was held weak). What is shown here is the method, and where the "
    "pattern holds on such a model and where it does not; it is no evidence about large models."
)


def render(experiments: Mapping[str, Experiment], records: Mapping[str, Results], out: Path, page: Path) -> str:
    """The page of the records of one folder.

    Args:
        experiments: name -> experiment, in the order of the sections.
        records: name -> record, of one model.
        out, page: where the records lie and where the page will, as the command was given them.
    Raises:
        InputError: there is no record.
    """
    check(bool(records), "page: expected at least one record, got none; run an experiment first")
    known = {name: records[name] for name in experiments if name in records}
    folder = Path(os.path.relpath(out, page.parent)).as_posix()
    rows = [
        [
            f"[{name}](#{_anchor(experiments[name])})",
            experiments[name].question,
            experiments[name].paper,
            experiments[name].short(record),
        ]
        for name, record in known.items()
    ]
    parts = [
        "# Experiments",
        "*Written by `pyarith reproduce` from the records beside it. Do not edit: change the program, and run it "
        "again.*",
        _about(known),
        *_warning(known),
        _how(known, out, page),
        words.table(["", "question", "the paper on LLaMA2-7B (second-hand)", "this model"], rows),
    ]
    for name, record in known.items():
        parts += _section(experiments[name], record, folder, out, page)
    return "\n\n".join(parts) + "\n"


def _about(records: Mapping[str, Results]) -> str:
    model = next(iter(records.values()))["model"]
    seconds = sum(record["cpu_seconds"] for record in records.values())
    shared = "" if model["kv_heads"] == model["heads"] else f", {model['kv_heads']} key-value heads"
    return (
        f"Model: `{model['name']}` ({model['family']}, {model['layers']} layers of {model['heads']} heads{shared}, "
        f"{model['parameters'] / 1e6:.1f} million parameters, {model['dtype']} on {model['device']})."
        f"{_ABOUT_DEMO if model['name'] == DEMO else ''} All records together took {seconds / 60:.1f} minutes of "
        f"processor time (what one computes, later ones reuse), with {words.count(model['threads'], 'thread')}."
    )


def _warning(records: Mapping[str, Results]) -> list[str]:
    quick = [name for name, record in records.items() if record["quick"]]
    said = "sizes only large enough to see that everything runs; the numbers mean nothing."
    return [f"> **Quick run** of {words.listing(quick)}: {said}"] if quick else []


def _how(records: Mapping[str, Results], out: Path, page: Path) -> str:
    made = {one["origin"] for record in records.values() for one in record["also"] if one["origin"]}
    first = "".join(f"{origin}  # once: another model, for E2\n" for origin in sorted(made))
    return (
        "All of it again, pictures included (a record that is there already is not made again; `--force` does):\n\n"
        f"```sh\n{first}{_command('all', records, out, page)}\n```\n\n"
        "*Effect*: mean relative change of the answer's logit when one head or MLP gets its output at the last "
        "token from the "
        "corrupted prompt (see the README). Where heads are chosen and then tested, they are chosen on one "
        "half of the prompts and tested on the other, and no operand pair is in both. The paper is "
        "arXiv:2409.01659; its "
        "figures were read second-hand, and its layer ranges are soft."
    )


def _command(names: str, records: Mapping[str, Results], out: Path, page: Path) -> str:
    """The command line that makes these records and this page."""
    first = next(iter(records.values()))["model"]["name"]
    model = "" if first == DEMO else f" {first}"
    also = dict.fromkeys(one["name"] for record in records.values() for one in record["also"])
    options = "".join(f" --also {name}" for name in also)
    return f"pyarith reproduce {names}{model}{options} --out {out.as_posix()} --page {page.as_posix()}"


def _heading(experiment: Experiment) -> str:
    return f"{experiment.name} {experiment.title}"


def _anchor(experiment: Experiment) -> str:
    """What a heading is called in links."""
    return re.sub(r"[^\w\- ]", "", _heading(experiment).lower()).replace(" ", "-")


def _section(experiment: Experiment, record: Results, folder: str, out: Path, page: Path) -> list[str]:
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in record["settings"].items())
    quick = " **Quick run: the numbers mean nothing.**" if record["quick"] else ""
    return [
        f"## {_heading(experiment)}",
        f"{experiment.question}{quick}",
        f"`{_command(experiment.name, {experiment.name: record}, out, page)}` - "
        f"[record]({folder}/{experiment.name}.json): {settings}; {record['cpu_seconds']:.0f} s of processor time.",
        f"*The paper on LLaMA2-7B (second-hand):* {experiment.paper}",
        *(_PICTURE.sub(rf"]({folder}/\1)", part) for part in experiment.section(record)),
    ]


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value) or "none"
