"""The record of ``pyarith evaluate``: scores of one model, or of two and what changed."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from pyarith.evaluation.evaluate import Evaluation, changes
from pyarith.reporting.versions import versions

FORMAT = 1


def evaluation_record(
    models: dict[str, dict[str, Any]],
    evaluations: dict[str, Evaluation],
    harness: dict[str, list[dict[str, Any]]],
    settings: dict[str, Any],
    seconds: dict[str, float],
    command: list[str],
) -> dict[str, Any]:
    """Everything that was measured, item by item too, so that any other test can be made later.

    Args:
        models: "before" and, where there are two, "after": name and fingerprint.
        evaluations, harness: by the same names; either may be empty.
        settings: as asked for.
        seconds: by what took them.
        command: the command line.
    """
    record: dict[str, Any] = {
        **{"tool": "pyarith", "format": FORMAT, "kind": "evaluation", "command_line": command},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{"versions": versions(), "models": models, "settings": settings, "seconds": seconds},
        "scores": {
            name: [
                {
                    **row,
                    "correct": "".join("01"[int(value)] for value in found.scores[row["task"]].accuracy.correct),
                    "probabilities": found.scores[row["task"]].probability,
                }
                for row in found.rows()
            ]
            for name, found in evaluations.items()
        },
        "harness": harness,
    }
    if len(evaluations) == 2:
        record["changes"] = [vars(one) for one in changes(evaluations["before"], evaluations["after"])]
    return record
