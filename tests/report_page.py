"""A report taken apart for tests."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pyarith.reporting import SavedRun
from pyarith.reporting.report import write_report

HOSTILE = """</script><script>window.bad=1</script><img src=x onerror="window.bad=1"><b>&lt;i&gt;</b> ${x} {{7*7}} '"""


class Page(HTMLParser):
    """Sections with their text, tables and figures, and every tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.scripts, self.styles = [], [], []
        self.sections: dict[str, dict[str, Any]] = {}
        self._within, self._now = [], None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._within.append((tag, dict(attributes)))
        if tag == "section":
            self._now = self.sections[dict(attributes)["aria-labelledby"]] = {"text": "", "tables": [], "figures": []}
        elif tag in ("meta", "link", "img", "br"):
            self._within.pop()
        elif tag == "table":
            self._now["tables"].append([])
        elif tag == "tr":
            self._now["tables"][-1].append([])
        elif tag in ("td", "th"):
            self._now["tables"][-1][-1].append("")

    def handle_endtag(self, tag):
        while self._within.pop()[0] != tag:
            pass
        if tag == "section":
            self._now = None

    def handle_data(self, data):
        tag, attributes = self._within[-1] if self._within else ("", {})
        if tag == "script":
            is_figure = attributes.get("type") == "application/json"
            (self._now["figures"] if is_figure else self.scripts).append(json.loads(data) if is_figure else data)
        elif tag == "style":
            self.styles.append(data)
        elif self._now is not None:
            self._now["text"] += data
            if tag in ("td", "th"):
                self._now["tables"][-1][-1][-1] += data


def made(path) -> Page:
    return Page(write_report(SavedRun.open(path)).path)
