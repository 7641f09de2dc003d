"""``pyarith tune``."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, ModelNow, RunDir, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, percent, reported

if TYPE_CHECKING:
    from pyarith.reporting.tunes import ChosenHeads
    from pyarith.tuning.data import Examples
    from pyarith.tuning.loop import Progress

# options that are settings of the same name; None leaves the preset's value
_SETTINGS = (
    *("lr", "lr_scale", "grad_scale", "weight_decay", "max_grad_norm", "schedule", "warmup", "epochs", "steps"),
    *(
        "batch_size",
        "micro_batch_size",
        "max_length",
        "packing",
        "prefix_cache",
        "regroup",
        "task_weight",
        "replay_batch_size",
    ),
    *("kv", "stochastic_rounding", "seed", "save_every"),
)
_LINES = 10  # of progress where stderr is no terminal


def tune(
    run_dir: RunDir,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|TASK",
            help="JSON lines, JSON, CSV or TSV of prompt and completion (or GSM8K-like columns, or messages); or a "
            "task of pyarith such as / or power, drawn with --n.",
            show_default=False,
        ),
    ],
    heads: Annotated[
        int | None, typer.Option(metavar="N", help="The run's N heads with the most negative effect.")
    ] = None,
    operator: Annotated[
        str | None, typer.Option(metavar="SIGN", help="Rank by this operator. [mean rank over the run's]")
    ] = None,
    head: Annotated[list[str] | None, typer.Option(metavar="LAYER.HEAD", help="This head; may be repeated.")] = None,
    head_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Heads that pyarith saved as JSON.")] = None,
    mlps: Annotated[str, typer.Option(metavar="L,L,...", help="Layers whose whole MLP is trained.")] = "",
    n: Annotated[int, typer.Option("--n", "-n", metavar="N", help="Problems of a task.")] = 200,
    prompt: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column, or template such as 'Q: {question}'. [recognised]")
    ] = None,
    completion: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column. [recognised]")] = None,
    eos: Annotated[
        bool | None, typer.Option("--eos/--no-eos", help="End-of-text behind completions. [if there is one]")
    ] = None,
    on_bad: Annotated[str, typer.Option(metavar="HOW", help="raise, or drop rows that cannot be used.")] = "raise",
    replay: Annotated[
        str | None, typer.Option(metavar="FILE|TASK", help="General data, used with --task-weight below 1.")
    ] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help="default (small data), or paper.")] = "default",
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    lr_scale: Annotated[float | None, typer.Option(metavar="X", help="A factor on it.")] = None,
    grad_scale: Annotated[
        str | None, typer.Option(metavar="X", help="A factor on gradients; heads = all heads / chosen heads.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", help="On the trained slices only.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(metavar="X", help="Clip gradients; 0 does not.")] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="cosine, linear, polynomial or constant.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of steps with a rising rate.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Examples of an optimizer step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(metavar="N", help="Rows at once.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an example.")] = None,
    packing: Annotated[bool | None, typer.Option("--packing", help="Several examples in a row.")] = None,
    prefix_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Keep what lower layers give over epochs; bytes or 2GiB.")
    ] = None,
    regroup: Annotated[
        bool | None, typer.Option("--regroup/--no-regroup", help="Other examples share a step in every epoch. [yes]")
    ] = None,
    task_weight: Annotated[float | None, typer.Option(metavar="X", help="Of the task's loss beside replay.")] = None,
    replay_batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="General examples of a step. [as many as of the task]")
    ] = None,
    kv: Annotated[str | None, typer.Option(metavar="HOW", help="group, or none: keys and values stay.")] = None,
    stochastic_rounding: Annotated[
        bool | None, typer.Option("--stochastic-rounding", help="Into 16-bit weights.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the order, and of a task's draw.")] = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between checkpoints. [a tenth of the run]")
    ] = None,
    model: ModelNow = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Fine-tune only the top heads of a run; everything else keeps its bits.

    Writes the trained slices, the losses and a record into RUN_DIR/tune. After a kill the same command goes on from the
    last checkpoint.
    """
    given = {name: value for name, value in locals().items() if name in _SETTINGS and value is not None}
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.runs import done_already, model_of
        from pyarith.errors import check
        from pyarith.reporting import SavedRun, Step
        from pyarith.reporting.tunes import choose_heads, data_identity, read_data
        from pyarith.tuning.settings import TuneSettings

        start = time.perf_counter()
        run = SavedRun.open(run_dir)
        settings = TuneSettings.of(preset, _numbers(given))
        layers = _layers(mlps)
        chosen = choose_heads(run, top=heads, heads=head or (), file=head_file, operator=operator)
        check(
            bool(chosen.heads or layers),
            "heads: expected --heads N, --head LAYER.HEAD, --head-file or --mlps, got none",
        )
        reading = {"prompt": prompt, "completion": completion, "eos": eos, "on_bad": on_bad}
        sources = {"data": data, **({} if replay is None else {"replay": replay})}
        step = Step(
            run,
            "tune",
            {
                "heads": [str(one) for one in chosen.heads],
                "mlps": layers,
                "chosen": chosen.words,
                **{name: data_identity(source, n, settings.seed) for name, source in sources.items()},
                "reading": reading,
                "settings": settings.identity(),
            },
        )
        if step.finished and not force:
            done_already(terminal, step)
            return
        loaded, tokenizer = model_of(terminal, run, model=model, device=device, trust_remote_code=trust_remote_code)
        from pyarith.models.sites import resolve
        from pyarith.tuning.sft import most_tokens

        most, _ = most_tokens(resolve(loaded), settings)
        examples = {}
        for name, source in sources.items():
            with terminal.step(f"Reading {source}"):
                columns = reading if name == "data" else {"on_bad": on_bad, "eos": eos}
                examples[name] = read_data(source, tokenizer, n, settings.seed, max_length=most, **columns)
        _say_heads(terminal, chosen)
        for name, source in sources.items():
            _say_data(terminal, source, examples[name])
        seconds = {"loading": time.perf_counter() - start}
        _train(terminal, step, loaded, chosen, layers, settings, examples, seconds, resume=not force)
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _train(
    terminal: Terminal,
    step: Any,
    model: Any,
    chosen: ChosenHeads,
    layers: list[int],
    settings: Any,
    examples: dict[str, Examples],
    seconds: dict[str, float],
    resume: bool,
) -> None:
    """Train, and write the step's files."""
    from pyarith.plots import loss_figure
    from pyarith.tuning import SelectiveTuner
    from pyarith.tuning.checkpoint import NAME
    from pyarith.tuning.sft import steps_of, tune

    place = step.folder / NAME
    total = steps_of(examples["data"], settings)
    with SelectiveTuner(model, chosen.heads, layers, kv=settings.kv) as tuner:
        terminal.line(repr(tuner))
        terminal.line(
            f"{count(total, 'step')} of {settings.batch_size} examples, learning rate "
            f"{settings.lr * settings.lr_scale:g}, {settings.schedule}, weight decay {settings.weight_decay:g}"
        )
        with terminal.bar("Training", total) as bar:
            result = tune(
                tuner,
                examples["data"],
                settings,
                replay=examples.get("replay"),
                checkpoint=place,
                resume=resume,
                progress=_progress(terminal, bar),
            )
        title = f"{Path(str(step.run.record['model']['name'])).name}: {len(chosen.heads)} heads, {len(layers)} MLPs"
        with terminal.step("Writing"), step.alone():
            step.add_folder("delta", lambda folder: tuner.save_delta(folder, result.made_by()))
            step.file("losses.csv").write_text(result.losses_csv(), encoding="utf-8")
            step.add_figure("loss.png", loss_figure(result.history, title, result.steps_per_epoch))
            files = step.finish({"result": {**result.record(), "delta": "delta"}}, {**seconds, **result.seconds})
    place.unlink(missing_ok=True)
    terminal.line(repr(result))
    for file in files:
        terminal.line(f"Wrote {file}")


def _progress(terminal: Terminal, bar: Any) -> Any:
    """The bar on a terminal; elsewhere a line for each tenth of the run."""
    begun = False

    def told(now: Progress) -> None:
        nonlocal begun
        if not begun and now.step > 1:
            terminal.line(f"Went on from the checkpoint after step {now.step - 1}")
        begun = True
        if callable(bar):
            bar(now.step, now.steps, f": {now}")
        elif now.step == now.steps or now.step % max(1, now.steps // _LINES) == 0:
            terminal.note(f"step {now.step} of {now.steps}: {now}")

    return told


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    """Options as settings: grad_scale may be a number, max_grad_norm 0 means none."""
    changed = dict(given)
    if "grad_scale" in changed:
        with suppress(ValueError):  # "heads" stays as it is; other texts are refused by the settings
            changed["grad_scale"] = float(changed["grad_scale"])
    if changed.get("max_grad_norm") == 0:
        changed["max_grad_norm"] = None
    return changed


def _layers(text: str) -> list[int]:
    from pyarith.errors import InputError

    try:
        return [int(part) for part in text.split(",") if text.strip()]
    except ValueError:
        raise InputError(f"mlps: expected layers such as 17,18, got {text!r}") from None


def _say_heads(terminal: Terminal, chosen: ChosenHeads) -> None:
    if not chosen.heads:
        return
    terminal.line(
        f"{count(len(chosen.heads), 'head')}, {chosen.words}; effects {' '.join(chosen.effects[chosen.heads[0]])}:"
    )
    told = [
        f"{head} ({' '.join(percent(effect) for effect in chosen.effects[head].values())})" for head in chosen.heads
    ]
    for at in range(0, len(told), 4):
        terminal.line("  " + "  ".join(told[at : at + 4]))
    if chosen.not_negative:
        names = ", ".join(map(str, chosen.not_negative))
        terminal.line(f"  {len(chosen.not_negative)} of them do not lower the answer's logit: {names}")


def _say_data(terminal: Terminal, source: str, examples: Examples) -> None:
    from pyarith.reporting.tunes import left_out

    made = examples.settings
    how = [f"layout {made['layout']}"] if "layout" in made else []
    spaces = {"answer": "space before the completion", "prompt": "space behind the prompt"}
    how += [spaces[made["space"]]] if made.get("space") in spaces else []
    how += ["end of text added"] if made.get("eos") else []
    terminal.line(f"{source}: {examples!r}{''.join(f', {one}' for one in how)}")
    for line in left_out(examples):
        terminal.line(f"  {line}")
