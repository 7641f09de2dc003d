"""``precise_sft``: fine-tune only chosen heads and MLPs on prompts with completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch

from pyarith.engine.memory import is_out_of_memory
from pyarith.errors import InputError, MemoryBudgetError, check
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.sites import ModelSites, length_limits, resolve
from pyarith.tuning.batches import Batches, MicroBatch, check_isolated
from pyarith.tuning.checkpoint import NAME, Checkpoint
from pyarith.tuning.data import Examples, load_examples
from pyarith.tuning.loop import Progress, Trainee, n_steps, peak_memory, train
from pyarith.tuning.loss import label_loss
from pyarith.tuning.prefix import PrefixCache
from pyarith.tuning.selective import SelectiveTuner
from pyarith.tuning.settings import BY_HEADS, PACKED, TuneSettings
from pyarith.tuning.sft_result import TuneResult

DELTA = "delta"


def precise_sft(
    model: Any,
    tokenizer: Any,
    data: Any,
    heads: Iterable[tuple[int, int]],
    mlps: Iterable[int] = (),
    *,
    settings: TuneSettings | str = "default",
    replay: Any = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | Callable[[Progress], None] | None = None,
    **changes: Any,
) -> TuneResult:
    """Train only chosen heads and MLPs on prompts with completions; every other parameter keeps its bits.

        loss = task_weight * mean over the completion tokens of a step of -log p(token | those before it)
               + (1 - task_weight) * the same over general data

    Args:
        model: a supported Hugging Face causal LM. It holds the tuned weights afterwards, and is an ordinary model. It
            runs in the mode it is in: training mode has dropout and, where enabled, gradient checkpointing.
        tokenizer: its tokenizer.
        data: what ``load_examples`` takes, or ``Examples`` that it made (for columns, templates, and rows to drop).
        heads: ``(layer, head)`` tuples.
        mlps: layers whose whole MLP is trained.
        settings: ``TuneSettings``, or a preset, ``"default"`` or ``"paper"``.
        replay: general data in the same forms, used where ``task_weight`` is below 1.
        out: folder for the checkpoint, which is deleted at the end, and then ``delta/`` (the trained slices),
            ``tune.json`` and ``losses.csv``.
        resume: go on from the checkpoint of this very run in ``out``, if there is one; False starts anew.
        progress: None = a bar on a terminal, False = none, or a callable that is told a ``Progress`` after each step.
        changes: single settings by name, such as ``lr=1e-3``.
    Returns:
        A ``TuneResult``.
    Raises:
        InputError, InputTypeError: settings, heads or data are wrong, see ``SelectiveTuner`` and ``load_examples``; an
            example longer than ``max_length`` or than the model allows (all are named); the checkpoint of another run.
        UnsupportedModelError: the model; ``packing`` where its attention does not keep examples apart.
        NonFiniteError: loss or gradient are not finite at some step; the message names it.
        MemoryBudgetError: out of memory.
        StorageError: a file could not be written; the one before is still there.
    Notes: on an error and on Ctrl-C the model keeps the state after the last finished step. Same seed, same bits, as
        far as the device's kernels are repeatable; interrupted and resumed gives the bits of the uninterrupted run
        (with ``prefix_cache`` if ``regroup=False``, else up to rounding).
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 5 (Precise SFT); replay of general data: arXiv:2403.19962.

    Examples:
        >>> import pyarith as pa
        >>> model, tokenizer = pa.load_demo()
        >>> data = pa.tasks.draw_problems("/", n=32)
        >>> result = pa.precise_sft(model, tokenizer, data, [(2, 7), (3, 1)], steps=2, lr=1e-3, progress=False)
        >>> result.n_steps, result.n_parameters
        (2, 32768)
    """
    chosen = TuneSettings.of(settings, changes)
    sites = resolve(model)
    examples = readable(sites, data, tokenizer, chosen, "data")
    general = None if replay is None else readable(sites, replay, tokenizer, chosen, "replay")
    place = None if out is None else Path(out)
    with SelectiveTuner(model, heads, mlps, kv=chosen.kv) as tuner:
        result = tune(
            tuner,
            examples,
            chosen,
            replay=general,
            checkpoint=None if place is None else place / NAME,
            resume=resume,
            progress=progress,
        )
        if place is not None:
            tuner.save_delta(place / DELTA, result.made_by())
            result = changed(result, delta=place / DELTA)
            result.save(place)
            (place / NAME).unlink(missing_ok=True)
    return result


def readable(sites: ModelSites, data: Any, tokenizer: Any, settings: TuneSettings, name: str) -> Examples:
    """``load_examples`` with the longest that settings and model allow.

    Raises:
        InputError: an example is longer; all rows are named.
    """
    most, why = most_tokens(sites, settings)
    examples = load_examples(data, tokenizer, max_length=most)
    long = examples.rows[examples.lengths > most].tolist()  # of examples that were made before
    check(
        not long,
        f"{name}: expected at most {most} tokens ({why}), got more in {len(long)} of {len(examples)} examples (row "
        f"{', '.join(map(str, long[:8]))}); shorten them, or load_examples(..., max_length={most}, on_bad='drop')",
    )
    return examples


def most_tokens(sites: ModelSites, settings: TuneSettings) -> tuple[int, str]:
    """(most tokens of an example, what says so)."""
    limits = [(limit, what) for what, limit in length_limits(sites)]
    limits.append((sites.config.max_position_embeddings, "the model's max_position_embeddings"))
    limits += [] if settings.max_length is None else [(settings.max_length, "max_length")]
    return min(limits)


def tune(
    tuner: SelectiveTuner,
    examples: Examples,
    settings: TuneSettings,
    *,
    replay: Examples | None = None,
    checkpoint: Path | None = None,
    resume: bool = True,
    progress: bool | Callable[[Progress], None] | None = None,
) -> TuneResult:
    """``precise_sft`` for a tuner that is attached already, without writing anything but the checkpoint.

    Args:
        checkpoint: the file; None saves none.
    """
    model, start = tuner.model, time.perf_counter()
    sites, base = resolve(model), model_fingerprint(model)
    factor = grad_scale(sites, tuner, settings)
    data = {"task": examples.record()} | ({} if replay is None else {"replay": replay.record()})
    identity = _identity(tuner, settings, data, base)
    batches = _batches(examples, settings, settings.batch_size, 0)
    general = _batches(replay, settings, settings.replay_batch_size or settings.batch_size, 1) if replay else None
    total = n_steps(settings, batches)
    if settings.packing:
        check_isolated(model, model, examples, settings.micro_batch_size)
    optimizer = tuner.optimizer(
        settings.lr * settings.lr_scale,
        weight_decay=settings.weight_decay,
        grad_scale=factor,
        max_grad_norm=settings.max_grad_norm,
        stochastic_rounding=settings.stochastic_rounding,
        seed=settings.seed,
    )
    trainee = Trainee(
        objective=objective(sites),
        parameters=tuple(tuner.parameters()),
        optimizer=optimizer,
        state=tuner.state_dict,
        load=tuner.load_state_dict,
        device=sites.device,
    )
    every = settings.save_every or max(1, -(-total // 10))
    place = None if checkpoint is None else Checkpoint(checkpoint, identity, every)
    if sites.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sites.device)
    devices = [sites.device] if sites.device.type == "cuda" else []
    budget = settings.prefix_cache
    cache = nullcontext() if budget is None else PrefixCache(tuner, budget, exact=not settings.regroup)
    with torch.random.fork_rng(devices), cache:
        torch.manual_seed(settings.seed)
        try:
            history = train(
                trainee, batches, settings, replay=general, checkpoint=place, resume=resume, progress=progress
            )
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryBudgetError(
                f"micro_batch_size: out of memory on {sites.device} with {settings.micro_batch_size} rows at once "
                f"({error}); lower micro_batch_size (the steps stay those of batch_size), or turn on gradient "
                "checkpointing: model.gradient_checkpointing_enable(); model.train()"
            ) from error
    arrays = history.arrays()
    return TuneResult(
        heads=tuner.heads,
        mlps=tuner.mlps,
        shared_heads=tuner.shared_heads,
        n_parameters=tuner.n_parameters,
        state_bytes=tuner.state_bytes,
        history=arrays,
        steps_per_epoch=batches.steps_per_epoch,
        resumed_at=history.resumed_at,
        settings={**settings.record(), "grad_scale_used": factor, "lr_used": settings.lr * settings.lr_scale},
        data=data,
        base=base,
        machine={
            "device": str(sites.device),
            "dtype": str(sites.dtype).removeprefix("torch."),
            "attention": sites.attention,
            "threads": torch.get_num_threads(),
        },
        seconds={"training": float(arrays["seconds"].sum()), "with preparation": time.perf_counter() - start},
        memory=peak_memory(sites.device),
        prefix_cache=None if isinstance(cache, nullcontext) else cache.stats(),
    )


def steps_of(examples: Examples, settings: TuneSettings) -> int:
    """Optimizer steps of a run on these examples."""
    return n_steps(settings, _batches(examples, settings, settings.batch_size, 0))


def objective(sites: ModelSites) -> Callable[[MicroBatch], torch.Tensor]:
    """Sum of the cross-entropy over the labelled tokens of a micro-batch, in blocks that never hold all logits."""
    return lambda micro: label_loss(sites, micro.labels, reduction="sum", **micro.inputs())


def grad_scale(sites: ModelSites, tuner: SelectiveTuner, settings: TuneSettings) -> float:
    """The factor on gradients: a number, or heads of the model / chosen heads.

    Raises:
        InputError: "heads" without a chosen head.
    """
    if settings.grad_scale != BY_HEADS:
        return float(settings.grad_scale)
    if not tuner.heads:
        raise InputError(f"grad_scale: expected a number where no heads are chosen, got {BY_HEADS!r}")
    return sites.n_layers * sites.n_heads / len(tuner.heads)


def _batches(examples: Examples, settings: TuneSettings, size: int, stream: int) -> Batches:
    packed = max(PACKED, int(examples.lengths.max())) if settings.packing else None
    return Batches(examples, size, settings.micro_batch_size, settings.seed, stream, packed, settings.regroup)


def _identity(tuner: SelectiveTuner, settings: TuneSettings, data: dict[str, Any], base: str) -> dict[str, Any]:
    """What makes two runs the same, as far as the caller chooses it."""
    return {
        "settings": settings.identity(),
        "heads": [str(head) for head in tuner.heads],
        "mlps": list(tuner.mlps),
        "data": {name: one["hash"] for name, one in data.items()},
        "base": base,
    }
