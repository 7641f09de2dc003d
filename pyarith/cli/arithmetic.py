"""What ``demo`` and ``discover`` share: discovery per operator, what is printed of it, what is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarith.cli.terminal import Terminal, count, percent, table

if TYPE_CHECKING:
    from pyarith.discovery.adaptive import TopHeads
    from pyarith.discovery.discover import Discovery
    from pyarith.reporting import Judgement, RunDirectory
    from pyarith.result import PatchResult

_NAMES = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}
_FOLDERS = {"+": "add", "-": "sub", "*": "mul", "/": "div"}


@dataclass(frozen=True)
class Prompts:
    """Which prompts are drawn; see ``pa.tasks.arithmetic``."""

    operators: Sequence[str]
    corruption: str
    n: int
    seed: int
    styles: Sequence[str] = ()
    only_correct: bool = False


@dataclass
class Found:
    """Discoveries by operator sign, how sure they are, and how long each step took."""

    discoveries: dict[str, Discovery] = field(default_factory=dict)
    judgements: dict[str, Judgement] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def explore(
    terminal: Terminal, model: Any, tokenizer: Any, prompts: Prompts, *, judged: bool = True, **options: Any
) -> Found:
    """Draw prompts and patch, operator by operator. All prompts are drawn first: a bad option fails at once.

    Args:
        judged: also say how sure the effects are.
        options: for ``discover``.
    """
    from pyarith import tasks
    from pyarith.discovery.discover import discover
    from pyarith.reporting import judge

    found = Found()
    start = time.perf_counter()
    drawn = {}
    for operator in prompts.operators:
        with terminal.step(f"Drawing prompts for {operator}"):
            pairs = tasks.arithmetic(
                tokenizer,
                operator,
                prompts.corruption,
                n=prompts.n,
                seed=prompts.seed,
                styles=tuple(prompts.styles) or tasks.STYLES,
            )
        drawn[str(pairs.settings["operator"])] = pairs
    found.seconds["prompts"] = time.perf_counter() - start
    for sign, pairs in drawn.items():
        start = time.perf_counter()
        what = "Patching every head and MLP" if options.get("top_k") is None else "Racing the heads"
        with terminal.bar(f"{what}: {name_of(sign)}", len(pairs)) as progress:
            found.discoveries[sign] = discover(
                model, pairs, only_correct=prompts.only_correct, progress=progress, **options
            )
        found.seconds[f"discovery {sign}"] = time.perf_counter() - start
    if not judged:
        return found
    start = time.perf_counter()
    for sign, discovery in found.discoveries.items():
        with terminal.step(f"Intervals and p-values: {name_of(sign)}"):
            found.judgements[sign] = judge(discovery)
    found.seconds["confidence"] = time.perf_counter() - start
    return found


def name_of(sign: str) -> str:
    """``addition +``."""
    return f"{_NAMES.get(sign, 'operator')} {sign}"


def show(terminal: Terminal, found: Found, top: int) -> None:
    """Print the summary, the rankings and how sure they are."""
    discoveries = found.discoveries
    first = next(iter(discoveries.values())).result
    terminal.text(f"Quantity: {first.semantics}")
    terminal.text(f"Backends: {', '.join(f'{op} {name}' for op, name in first.settings['backends'].items())}")
    terminal.line()
    _columns(terminal, discoveries, "", _summary(discoveries))
    terminal.line()
    races = {sign: discovery.top for sign, discovery in discoveries.items() if discovery.top is not None}
    if races:
        _races(terminal, races)
    else:
        terminal.line("Heads: layer.head, relative effect, change of the answer's logit", style="bold")
        _columns(terminal, discoveries, "#", _ranked({s: _heads(d.result, top) for s, d in discoveries.items()}))
        terminal.line()
        _intervals(terminal, found, top)
        terminal.line()
        terminal.line("MLPs, largest effect of either sign first: layer, relative effect, change", style="bold")
        _columns(terminal, discoveries, "#", _ranked({s: _mlps(d.result) for s, d in discoveries.items()}))
    for sign, discovery in discoveries.items():
        for line in _left_out(discovery):
            terminal.line(f"{sign}  {line}")


def _races(terminal: Terminal, races: Mapping[str, TopHeads]) -> None:
    """The top heads of each operator with interval and decision, what is guaranteed, and what it cost."""
    made = table()
    for name in ("", "head", "change in logits", "interval", "prompts", "decision"):
        made.add_column(name, justify="left" if name in ("", "head", "decision") else "right", no_wrap=True)
    for sign, race in races.items():
        for head in race.heads:
            interval = f"{race.low[head]:+.3f} .. {race.high[head]:+.3f}"
            cells = f"{race.change[head]:+.3f}", interval, f"{race.n_prompts[head]}", race.decision(head)
            made.add_row(sign, str(head), *cells)
    terminal.line("The heads that lower the answer's logit most, as far as they were raced", style="bold")
    terminal.out.print(made)
    for sign, race in races.items():
        spent = f"{race.n_used} of {race.n_given} prompts, {race.rows / race.rows_full:.0%} of the rows of a full run"
        terminal.text(f"{sign}  {spent}; {race.guarantee}")


def _intervals(terminal: Terminal, found: Found, top: int) -> None:
    """The heads below -5 % (where there are none, the three strongest) with interval and p; else why there are none."""
    made = table()
    for name in ("", "head", "effect", "95% interval", "adjusted p", "whole interval below -5%"):
        made.add_column(name, justify="left" if name in ("", "head") else "right", no_wrap=True)
    lines = []
    for sign, judgement in found.judgements.items():
        result, sure = found.discoveries[sign].result, judgement.confidence
        if sure is None or sure.heads is None:
            lines.append(f"{sign}  no intervals or p-values: {judgement.reason or 'heads were not among the senders'}")
            continue
        certain = sure.key_heads(-0.05)
        for head in (result.key_heads(-0.05) or [row.head for row in result.top(3)])[:top]:
            low, high, p = (float(getattr(sure.heads, name)[head]) for name in ("low", "high", "p_adjusted"))
            effect = percent(float(sure.heads.estimate[head]))
            made.add_row(
                sign,
                str(head),
                effect,
                f"{percent(low)} .. {percent(high)}",
                f"{p:.2g}",
                "yes" if head in certain else "no",
            )
        halves = judgement.stability
        if halves is None:
            lines.append(f"{sign}  no split halves: {judgement.reason}")
        else:
            lines.append(
                f"{sign}  halves of the operand pairs rank the heads alike to {halves['spearman']['median']:.2f} "
                f"(Spearman; {halves['spearman']['low']:.2f} .. {halves['spearman']['high']:.2f} over 200 splits)"
            )
    if made.row_count:
        terminal.line("How sure: two-way bootstrap over operand pairs and templates, sign flips", style="bold")
        terminal.out.print(made)
    for line in lines:
        terminal.line(line)


def _columns(terminal: Terminal, signs: Iterable[str], first: str, rows: Mapping[str, list[str]]) -> None:
    """A table with a column per operator."""
    made = table()
    made.add_column(first)
    for sign in signs:
        made.add_column(sign, justify="right", no_wrap=True)
    for name, cells in rows.items():
        made.add_row(name, *cells)
    terminal.out.print(made)


def _summary(discoveries: Mapping[str, Discovery]) -> dict[str, list[str]]:
    columns = [discovery.summary() for discovery in discoveries.values()]
    rerouted = [discovery.result.n_rerouted for discovery in discoveries.values()]
    return {
        "prompts": [f"{c['prompts']}" for c in columns],
        "left out: misaligned": [f"{sum(c['misaligned_left_out'].values())}" for c in columns],
        "left out: answered wrongly": [f"{c['wrong_left_out']}" for c in columns],
        "answered wrongly, kept": [f"{c['wrong'] - c['wrong_left_out']}" for c in columns],
        "P(answer), clean prompt": [f"{c['p_clean']:.3f}" for c in columns],
        "P(answer), corrupted prompt": [f"{c['p_corrupted']:.3f}" for c in columns],
        "corruption strength": [f"{c['strength']:.3f}" for c in columns],
        "still answered when corrupted": [f"{100 * c['corrupted_still_correct']:.1f}%" for c in columns],
        "answer logit, clean prompt": [f"{c['clean_logit']:.3f}" for c in columns],
        "answer logit, corrupted prompt": [f"{c['corrupted_logit']:.3f}" for c in columns],
        "clean logit <= 0, no ratio": [f"{c['ratio_excluded']}" for c in columns],
        "noise floor, in logits": [f"{c['noise_floor']:.1e}" for c in columns],
        **({"identity rows at other experts": [f"{number}" for number in rerouted]} if any(rerouted) else {}),
        "literal re-runs agree to": [_or_dash(c["verification_error"], ".1e") for c in columns],
        "heads below -5%": [f"{len(c['key_heads'])} of {c['heads']}" for c in columns],
    }


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ranked(columns: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Rows by rank; columns may differ in length."""
    most = max(map(len, columns.values()))
    return {str(i + 1): [cells[i] if i < len(cells) else "" for cells in columns.values()] for i in range(most)}


def _heads(result: PatchResult, top: int) -> list[str]:
    """The heads that lower the logit most, bold below -5 %."""
    cells = []
    for row in result.top(top):
        text = f"{row.head!s} {_effect(row.effect, row.logit_change)}"
        cells.append(f"[bold]{text}[/bold]" if row.effect < -0.05 else text)
    return cells


def _mlps(result: PatchResult, most: int = 6) -> list[str]:
    """The MLPs that move the logit furthest, either way."""
    from pyarith.reporting.tables import mlp_rows

    return [f"{row['layer']} {_effect(row['effect'], row['logit_change'])}" for row in mlp_rows(result)[:most]]


def _effect(effect: float, change: float) -> str:
    return f"{percent(effect):>6} {change:+5.2f}"


def _left_out(discovery: Discovery) -> list[str]:
    """In words, which prompts are missing and why."""
    from pyarith.prompts import REASONS

    lines = []
    for reason, number in discovery.pairs.settings.get("dropped", {}).items():
        lines.append(f"{count(number, 'drawn prompt')} left out: {REASONS.get(reason, reason.replace('_', ' '))}")
    if discovery.n_left_out:
        lines.append(f"{count(discovery.n_left_out, 'prompt')} left out: answered wrongly by the intact model")
    return lines


def write(
    run: RunDirectory,
    found: Found,
    model: Any,
    *,
    command: str,
    name: str,
    title: str,
    settings: dict[str, Any],
    prompts: Prompts,
    revision: str | None = None,
) -> list[Path]:
    """Fill a run directory; returns the files to tell of. One operator lies at the top, several in a folder each."""
    with run.alone():
        return _write(run, found, model, command, name, title, settings, prompts, revision)


def _write(
    run: RunDirectory,
    found: Found,
    model: Any,
    command: str,
    name: str,
    title: str,
    settings: dict[str, Any],
    prompts: Prompts,
    revision: str | None,
) -> list[Path]:
    from pyarith.plots import effects_figure, effects_panels

    discoveries = found.discoveries
    start = time.perf_counter()
    for sign, discovery in discoveries.items():
        folder = "" if len(discoveries) == 1 else _FOLDERS[sign]
        run.add_discovery(sign, discovery, folder=folder, judgement=found.judgements.get(sign))
    effects = {name_of(s): (d.result.head_effects, d.result.mlp_effects) for s, d in discoveries.items()}
    if len(effects) == 1:
        figure = effects_figure(*next(iter(effects.values())), title=f"{title}, {next(iter(effects))}")
    else:
        figure = effects_panels(effects, title=title)
    picture = run.add_figure("heatmap.png", figure)
    seconds = {**found.seconds, "writing": time.perf_counter() - start}
    record = run.finish(
        command,
        model,
        name=name,
        settings=settings,
        seeds={"prompts": prompts.seed},
        seconds=seconds,
        revision=revision,
    )
    return [picture, record]
