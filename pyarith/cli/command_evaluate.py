"""``pyarith evaluate``."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, TrustRemoteCode
from pyarith.cli.terminal import Terminal, reported, table

if TYPE_CHECKING:
    from pyarith.evaluation.evaluate import Change, Evaluation

_TASKS = ("+", "-", "*", "/")


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub name, or demo.", show_default=False)],
    delta: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A delta for MODEL: before it and with it.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model on the same items, such as MODEL after tuning.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A task of pyarith; may be repeated. [+ - * /]")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="JSON lines, JSON, CSV or TSV of prompt and answer; may be repeated."),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", metavar="N", help="Items per task.", min=1)] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the items and of the resampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Of free answers.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts at once.", min=1)] = 16,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", metavar="TASK", help="A task of the lm-evaluation-harness; may be repeated."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option("--lm-eval-path", metavar="FOLDER", help="Harness tasks of one's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Items per harness task. [all]")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Record, as JSON.")] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), fp32, bf16, fp16 or fp64.")] = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """How well a model answers: exact match and probability of the right answer, before and after a change.

    With --delta or --against both models answer the same items, and what changed has intervals and tests by clusters
    of items.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.loading import load
        from pyarith.cli.terminal import quiet_libraries
        from pyarith.errors import check
        from pyarith.evaluation import load_items, named_task
        from pyarith.evaluation.evaluate import changes
        from pyarith.models.fingerprint import model_fingerprint
        from pyarith.reporting.evaluations import evaluation_record
        from pyarith.reporting.files import write_json

        check(delta is None or against is None, "against: expected either --delta or --against, got both")
        check(out is None or out.parent.is_dir(), f"out: expected a file in a folder that exists, got {out}")
        start, seconds = time.perf_counter(), {}
        names = task or ([] if data or lm_eval else list(_TASKS))
        files = {file.name: load_items(file) for file in data or []}
        check(
            len(files) == len(data or []), f"data: expected files of different names, got {list(map(str, data or []))}"
        )
        models, evaluations, harness = {}, {}, {}
        for when, name in _models(model, delta, against):
            begun = time.perf_counter()
            with terminal.step(f"Loading {name}"):
                quiet_libraries()
                loaded = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, note=terminal.note)
            with _changed(loaded.model, delta if when == "after" else None):
                models[when] = {"name": name, "fingerprint": model_fingerprint(loaded.model)}
                if when == "after" and delta is not None:
                    models[when]["delta"] = str(delta)
                if names or files:
                    tasks = {one: named_task(loaded.tokenizer, one, n, seed) for one in names} | files
                    evaluations[when] = _evaluate(terminal, loaded, tasks, n, seed, max_new_tokens, batch_size)
                if lm_eval:
                    harness[when] = _harness(terminal, loaded, lm_eval, lm_eval_path, limit, batch_size, seed)
            seconds[when] = time.perf_counter() - begun
        _say(terminal, evaluations, changes(*evaluations.values()) if len(evaluations) == 2 else [])
        _say_harness(terminal, harness)
        if out is not None:
            settings = {
                "tasks": names,
                "data": list(map(str, data or [])),
                "n": n,
                "seed": seed,
                "max_new_tokens": max_new_tokens,
            }
            settings |= {"lm_eval": lm_eval or [], "limit": limit, "dtype": dtype}
            command = ["pyarith", *sys.argv[1:]]
            write_json(out, evaluation_record(models, evaluations, harness, settings, seconds, command))
            terminal.line(f"Wrote {out}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _models(model: str, delta: Path | None, against: str | None) -> list[tuple[str, str]]:
    """(when, name) of each model to load."""
    after = against if against is not None else model if delta is not None else None
    return [("before", model), *([] if after is None else [("after", after)])]


def _changed(model: Any, delta: Path | None) -> AbstractContextManager[Any]:
    """The model with a delta, as long as the block lasts."""
    if delta is None:
        return nullcontext()
    from pyarith.tuning import load_delta

    found: AbstractContextManager[Any] = load_delta(model, delta)
    return found


def _evaluate(
    terminal: Terminal, loaded: Any, tasks: dict[str, Any], n: int, seed: int, max_new_tokens: int, batch_size: int
) -> Evaluation:
    from pyarith.evaluation.evaluate import evaluate as run

    with terminal.bar("Evaluating", len(tasks)) as bar:
        return run(
            loaded.model,
            loaded.tokenizer,
            tasks,
            n=n,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=bar if callable(bar) else None,
        )


def _harness(
    terminal: Terminal, loaded: Any, tasks: list[str], path: Path | None, limit: int | None, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    from pyarith.evaluation.harness import harness_scores

    with terminal.step("lm-evaluation-harness"):
        return harness_scores(
            loaded.model,
            loaded.tokenizer,
            tasks,
            include_path=path,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
        )


def _say(terminal: Terminal, found: dict[str, Evaluation], changed: list[Change]) -> None:
    if not found:
        return
    made = table()
    if not changed:
        for name in ("task", "items", "accuracy", "95 % interval", "P(answer)"):
            made.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
        for row in found["before"].rows():
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            cells = [str(row["n"]), f"{100 * row['accuracy']:.1f}%", interval, f"{row['probability']:.3f}"]
            made.add_row(row["task"], *cells)
    else:
        # in points, so that all fits into 80 columns
        for name in ("task", "items", "before", "after", "change (95 %)", "lost", "won", "q", "P(answer)"):
            made.add_column(name, justify="left" if name == "task" else "right", no_wrap=name != "task")
        for one in changed:
            known = one.low == one.low
            interval = f" ({100 * one.low:+.1f} {100 * one.high:+.1f})" if known else ""
            cells = [str(one.n), f"{100 * one.accuracy_before:.1f}", f"{100 * one.accuracy_after:.1f}"]
            cells += [f"{100 * one.difference:+.1f}{interval}", str(one.lost), str(one.gained)]
            cells += [f"{one.q:.2g}" if known else "n/a"]
            cells += [f"{one.probability_before:.2f} {one.probability_after:.2f}"]
            made.add_row(one.task, *cells)
    terminal.out.print(made)
    terminal.line()


def _say_harness(terminal: Terminal, harness: dict[str, list[dict[str, Any]]]) -> None:
    if not harness:
        return
    made = table()
    for name in ("harness task", "metric", "filter", "items", *harness):
        made.add_column(name, justify="left" if name in ("harness task", "metric", "filter") else "right")
    for rows in zip(*harness.values(), strict=True):
        values = [f"{row['value']:.4f}" + ("" if row["stderr"] is None else f" +- {row['stderr']:.4f}") for row in rows]
        made.add_row(rows[0]["task"], rows[0]["metric"], rows[0]["filter"], str(rows[0]["n"]), *values)
    terminal.out.print(made)
    terminal.line()
