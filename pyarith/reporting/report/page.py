"""The page: sections put into one HTML file with plotly.js inside, opened without any network."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pyarith import __version__
from pyarith.errors import InputError, NotAvailableError, check
from pyarith.reporting.files import REPORT, is_report, plain, write_text
from pyarith.reporting.report.blocks import moment, printable
from pyarith.reporting.report.sections import SECTIONS, Section
from pyarith.reporting.report.source import Source
from pyarith.reporting.saved import SavedRun

_PACKAGE = "pyarith.reporting.report"


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        path: the file.
        shown: titles of the sections with content.
        missing: one line for each section without, why and what makes it.
    """

    path: Path
    shown: tuple[str, ...]
    missing: tuple[str, ...]


def write_report(run: SavedRun) -> Report:
    """Write ``RUN_DIR/report.html`` from whatever the run directory holds.

    Only finished steps of this very run are shown; for every other section a line says why not, and which command makes
    it. The file is written under a temporary name and renamed.

    Raises:
        InputError: ``report.html`` is there and not of pyarith, or a record lacks what it should hold.
        NotAvailableError: plotly or jinja2 is not installed.
    """
    path = run.path / REPORT
    ours = not path.exists() or is_report(path)
    check(ours, f"RUN_DIR: {path} is there and was not written by pyarith report; move it away")
    source = Source(run)
    parts = [_built(section, source) for section in SECTIONS]
    write_text(path, _rendered(source, parts))
    shown = tuple(part["title"] for part in parts if part["blocks"])
    missing = (part for part in parts if part["missing"])
    return Report(path, shown, tuple(f"{part['title']}: {part['missing']} {part['command']}" for part in missing))


def _built(section: Section, source: Source) -> dict[str, Any]:
    """What the template needs of a section: its blocks, or the line in their place."""
    part: dict[str, Any] = {"id": section.id, "title": section.title, "blocks": (), "missing": "", "command": ""}
    where = source.run.path
    if section.step:
        step = source.step(section.step)
        where = step.folder
        if step.record is None:
            command = source.command(section.command) + (" --force" if step.reason else "")
            return part | {"missing": step.reason or "Not done yet.", "command": command}
    try:
        return part | {"blocks": section.build(source)}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OSError) as error:
        raise InputError(
            f"RUN_DIR: {where} cannot be shown: its records or tables lack what this version of pyarith writes "
            f"({type(error).__name__}: {error}); make it again with --force"
        ) from error


@cache
def plotly_js() -> str:
    """plotly.js as the plotly package ships it.

    Raises:
        NotAvailableError: the package is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise NotAvailableError("report: needs plotly; pip install plotly") from error
    return str(get_plotlyjs())


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise NotAvailableError("report: needs jinja2; pip install jinja2") from error
    loader = PackageLoader(_PACKAGE)
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.policies["json.dumps_function"] = _json  # jinja2 itself escapes <, >, & and ' in what this returns
    return found


def _json(value: Any, **_: Any) -> str:
    return json.dumps(plain(value), allow_nan=False, separators=(",", ":"))


def _rendered(source: Source, parts: list[dict[str, Any]]) -> str:
    from markupsafe import Markup

    environment = _environment()
    texts = {name: environment.loader.get_source(environment, name)[0] for name in ("style.css", "report.js")}
    scripts = [plotly_js(), texts["report.js"]]
    for text in [*scripts, *texts.values()]:
        assert "</script" not in text.lower() and "</style" not in text.lower()
    return str(
        environment.get_template("page.html").render(
            title=printable(source.run.record["model"]["name"]),
            operators=[printable(title) for title in source.titles.values()],
            sections=parts,
            style=Markup(texts["style.css"]),
            scripts=[Markup(script) for script in scripts],
            policy=" ".join(_allowed(script) for script in scripts),
            made=moment(datetime.now(timezone.utc).isoformat()),
            version=__version__,
            plotly=metadata.version("plotly"),
        )
    )


def _allowed(script: str) -> str:
    """A script by its hash: no other runs, whatever gets into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
