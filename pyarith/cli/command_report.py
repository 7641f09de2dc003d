"""``pyarith report``."""

from __future__ import annotations

import time

from pyarith.cli.options import Debug, RunDir
from pyarith.cli.terminal import Terminal, reported


def report(run_dir: RunDir, debug: Debug = False) -> None:
    """A run and its finished steps as one HTML page.

    RUN_DIR/report.html needs no network and no other file. Steps that are missing are named with their command.
    """
    terminal = Terminal()
    with reported(debug):
        start = time.perf_counter()
        with terminal.step("Writing the report"):
            from pyarith.reporting import SavedRun
            from pyarith.reporting.report import write_report

            written = write_report(SavedRun.open(run_dir))
        terminal.line(f"Shown: {', '.join(written.shown)}")
        for line in dict.fromkeys(written.missing):
            terminal.line(line)
        size = written.path.stat().st_size / 1e6
        terminal.line(f"Wrote {written.path} ({size:.1f} MB), took {time.perf_counter() - start:.1f} s")
