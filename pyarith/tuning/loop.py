"""The one training loop: for a ``SelectiveTuner``, LoRA and full fine-tuning alike, so that arms of a comparison differ
in nothing else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pyarith.errors import InputTypeError, NonFiniteError, check
from pyarith.tuning.batches import IGNORED, Batches, MicroBatch
from pyarith.tuning.checkpoint import Checkpoint, Saved, pack_optimizer, unpack_optimizer
from pyarith.tuning.settings import TuneSettings

COLUMNS = ("loss", "task_loss", "general_loss", "lr", "grad_norm", "completion_tokens", "tokens", "seconds", "memory")
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What a loop trains.

    Attributes:
        objective: sum of the cross-entropy over the labelled tokens of a micro-batch, with its gradient.
        parameters: what the optimizer updates.
        optimizer: any torch optimizer over them; it clips by itself or leaves it to ``max_grad_norm``.
        state, load: give and take back what training changes beside the optimizer's state.
        device: where micro-batches go.
        max_grad_norm: clip the norm of all gradients in the loop; None does not.
    """

    objective: Callable[[MicroBatch], Tensor]
    parameters: tuple[nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    state: Callable[[], Mapping[str, Tensor]]
    load: Callable[[Mapping[str, Tensor]], None]
    device: torch.device
    max_grad_norm: float | None = None

    @classmethod
    def of_model(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None
    ) -> Trainee:
        """All parameters of a model that require a gradient: full fine-tuning, or adapters in it."""
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}

        @torch.no_grad()
        def load(state: Mapping[str, Tensor]) -> None:
            for name, value in trained.items():
                value.copy_(state[name])

        return cls(
            objective=lambda micro: completion_loss(model, micro),
            parameters=tuple(trained.values()),
            optimizer=optimizer,
            state=lambda: trained,
            load=load,
            device=next(model.parameters()).device,
            max_grad_norm=max_grad_norm,
        )


def completion_loss(forward: Callable[..., Any], micro: MicroBatch) -> Tensor:
    """Sum over labelled tokens of -log p(token | those before it), from the model's own logits at these places only.

    Args:
        forward: a Hugging Face causal LM, or what runs it.
        micro: on its device.
    Returns:
        A scalar in fp32 (fp64 for fp64 models); equal to ``labels=`` times the number of labels, up to rounding.
    """
    targets = F.pad(micro.labels[:, 1:], (0, 1), value=IGNORED)
    keep = targets != IGNORED
    if _logits_by_mask():
        logits = forward(**micro.inputs(), use_cache=False, logits_to_keep=keep).logits
    else:  # the same places in all rows
        columns = keep.any(0).nonzero()[:, 0]
        logits = forward(**micro.inputs(), use_cache=False, logits_to_keep=columns).logits[keep[:, columns]]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets[keep], reduction="sum")


def _logits_by_mask() -> bool:
    """Whether this transformers takes a bool [batch, pos] of the places that logits are wanted for."""
    from transformers import modeling_utils

    return hasattr(modeling_utils, "slice_logits_to_keep")


@dataclass
class History:
    """One entry a step in each column.

    ``loss`` is the weighted one, ``task_loss`` and ``general_loss`` (NaN without replay) the mean cross-entropy over
    completion tokens; ``grad_norm`` is before clipping and before an optimizer's own factor; ``completion_tokens`` and
    ``tokens`` were counted without padding; ``seconds`` and ``memory`` (bytes) are of the step, and the peak so far.
    ``resumed_at`` is the number of steps in the checkpoint that the run went on from.
    """

    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    resumed_at: int | None = None

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def add(self, **values: float) -> None:
        for name in COLUMNS:
            self.columns[name].append(values[name])

    def arrays(self) -> dict[str, np.ndarray]:
        """fp64 [step] each."""
        return {name: np.array(values, np.float64) for name, values in self.columns.items()}


@dataclass(frozen=True)
class Progress:
    """What a progress function is told after each step: numbers counted from 1, and the last entries of the history."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_second: float
    memory: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, {self.tokens_per_second:,.0f} tokens/s, peak {self.memory / 2**20:,.0f} MiB"


def n_steps(settings: TuneSettings, batches: Batches) -> int:
    """Optimizer steps of a run."""
    return settings.steps or settings.epochs * batches.steps_per_epoch


def train(
    trainee: Trainee,
    batches: Batches,
    settings: TuneSettings,
    *,
    replay: Batches | None = None,
    checkpoint: Checkpoint | None = None,
    resume: bool = True,
    progress: bool | Callable[[Progress], None] | None = None,
) -> History:
    """Run all steps; the gradient of a step is that of the mean over all completion tokens of its examples.

    Args:
        trainee: what is trained, and by which optimizer.
        batches: of the task.
        settings: of which epochs or steps, schedule, warm-up and ``task_weight`` are read.
        replay: batches of general data, used where ``task_weight`` is below 1.
        checkpoint: where to save every so many steps; the run goes on from there with ``resume``.
        resume: False overwrites an older checkpoint.
        progress: None = a bar on a terminal, False = none, or a callable.
    Returns:
        The history of all steps, those before a resumption included.
    Raises:
        NonFiniteError: loss or gradient are not finite. Nothing was updated in that step: the model keeps the last good
            state, which also is saved where there is a checkpoint. Where the step before has spoilt the trained values
            themselves, the model goes back to the checkpoint, or the message says that it has to be loaded again.
        InputError: the checkpoint is another run's.
        StorageError: a checkpoint could not be written.
    Notes: same seed, same bits, as far as the device's kernels are repeatable; interrupted and resumed gives the bits
        of the uninterrupted run. Random numbers (dropout of a model in training mode) are torch's own, which the caller
        seeds; their state is part of a checkpoint.
    """
    told = progress is None or isinstance(progress, bool) or callable(progress)
    check(told, f"progress: expected None, False or a callable, got {type(progress).__name__}", InputTypeError)
    general = replay if settings.task_weight < 1 else None
    check(
        general is not None or settings.task_weight == 1,
        f"replay: expected general data beside task_weight={settings.task_weight}, got none",
    )
    run = _Run(trainee, batches, general, settings, checkpoint)
    saved = checkpoint.load() if checkpoint is not None and resume else None
    if saved is not None:
        run.restore(saved)
    with _Bar(progress, run.total, len(run.history)) as bar:
        while len(run.history) < run.total:
            bar.call(run.step())
    return run.history


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self,
        trainee: Trainee,
        batches: Batches,
        general: Batches | None,
        settings: TuneSettings,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.trainee, self.batches, self.general, self.checkpoint = trainee, batches, general, checkpoint
        self.weight, self.total, self.history = settings.task_weight, n_steps(settings, batches), History()
        self.scheduler = make_schedule(trainee.optimizer, settings, self.total)
        trainee.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Progress:
        """One optimizer step, and a checkpoint where one is due."""
        trainee, step, start = self.trainee, len(self.history), time.perf_counter()
        losses, counts = [], np.zeros(2, np.int64)
        arms = [(self.batches, self.weight)] + ([] if self.general is None else [(self.general, 1 - self.weight)])
        for batches, weight in arms:
            mean, found = _accumulate(trainee, batches, step, weight)
            losses.append(mean)
            counts += found
        norm = get_total_norm([value.grad for value in trainee.parameters if value.grad is not None])
        *parts, length = torch.stack([*losses, norm.to(losses[0].dtype)]).tolist()  # one wait for the device
        if not all(map(math.isfinite, [*parts, length])):
            trainee.optimizer.zero_grad(set_to_none=True)
            what = self._non_finite(parts, length)
            raise NonFiniteError(f"{what}; {self._keep_good()}. Lower lr, set max_grad_norm, or look at these rows")
        if trainee.max_grad_norm is not None:
            clip_grads_with_norm_(trainee.parameters, trainee.max_grad_norm, norm)
        rate = float(self.scheduler.get_last_lr()[0])
        trainee.optimizer.step()
        self.scheduler.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        loss = sum(weight * part for (_, weight), part in zip(arms, parts, strict=True))
        seconds, memory = time.perf_counter() - start, peak_memory(trainee.device)
        values = {"loss": loss, "task_loss": parts[0], "general_loss": parts[1] if self.general else math.nan}
        values |= {"lr": rate, "grad_norm": length, "seconds": seconds, "memory": memory}
        self.history.add(**values, completion_tokens=int(counts[0]), tokens=int(counts[1]))
        done = len(self.history)
        if self.checkpoint is not None and done % self.checkpoint.every == 0 and done < self.total:
            self.save(self.checkpoint)
        return Progress(done, self.total, loss, rate, int(counts[1]) / seconds, memory)

    def save(self, checkpoint: Checkpoint) -> None:
        values, tensors = pack_optimizer(self.trainee.optimizer)
        groups = {
            "state": self.trainee.state(),
            "optimizer": tensors,
            "history": {name: torch.from_numpy(value) for name, value in self.history.arrays().items()},
            "random": _random(self.trainee.device),
        }
        flat = {f"{group}/{name}": value for group, some in groups.items() for name, value in some.items()}
        schedule = self.scheduler.state_dict()
        checkpoint.save({"step": len(self.history), "optimizer": values, "schedule": schedule}, flat)

    def restore(self, saved: Saved) -> None:
        device = self.trainee.device
        self.trainee.load({name: value.to(device) for name, value in saved.part("state").items()})
        unpack_optimizer(self.trainee.optimizer, saved.values["optimizer"], saved.part("optimizer"))
        self.scheduler.load_state_dict(saved.values["schedule"])
        for name, values in saved.part("history").items():
            self.history.columns[name] = values.tolist()
        self.history.resumed_at = len(self.history)
        random = saved.part("random")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], device)

    def _keep_good(self) -> str:
        """Save the state after the last step; or go back to the last checkpoint, if that step has spoilt it. Returns
        which state is where, in words."""
        step, place = len(self.history), self.checkpoint
        if all(bool(value.isfinite().all()) for value in self.trainee.state().values()):
            if place is not None:
                self.save(place)
            return f"the state after step {step} is in the model{'' if place is None else f' and in {place.path}'}"
        saved = None if place is None or step < place.every else place.load()
        if saved is None:
            return f"the update of step {step} was too large: the model holds values that are not finite, load it again"
        self.restore(saved)
        return (
            f"the update of step {step} was too large: the model holds the state after step {len(self.history)} again"
        )

    def _non_finite(self, losses: list[float], norm: float) -> str:
        """Which step, what, and on which rows."""
        step = len(self.history)
        names = ["loss", "loss of the general data"][: len(losses)]
        what = ", ".join(f"{name} {value}" for name, value in zip(names, losses, strict=True))
        rows = sorted(self.batches.examples.rows[self.batches.chosen(step)].tolist())
        shown = f"{', '.join(map(str, rows[:_SHOWN]))}{f' and {len(rows) - _SHOWN} more' if len(rows) > _SHOWN else ''}"
        return (
            f"step {step + 1} of {self.total}: expected finite numbers, got {what}, gradient norm {norm} (learning "
            f"rate {self.scheduler.get_last_lr()[0]:.3g}, rows {shown}); stopped before the update"
        )


def make_schedule(optimizer: torch.optim.Optimizer, settings: TuneSettings, total: int) -> Any:
    """The learning-rate schedule, transformers' own; warm-up is rounded up to whole steps."""
    from transformers import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    options = {"lr_end": 0.0, "power": 2.0} if name == "polynomial" else None
    warmup = math.ceil(settings.warmup * total)
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=options
    )


def _accumulate(trainee: Trainee, batches: Batches, step: int, weight: float) -> tuple[Tensor, np.ndarray]:
    """All backward passes of a step: (mean cross-entropy, on the device; [completion tokens, tokens])."""
    chosen = batches.chosen(step)
    counts = np.array([batches.examples.targets[chosen].sum(), batches.examples.lengths[chosen].sum()])
    share = 1.0 / int(counts[0])
    sums = []
    for micro in batches.at(step):
        loss = trainee.objective(micro.to(trainee.device))
        (loss * (weight * share)).backward()
        sums.append(loss.detach())
    return torch.stack(sums).sum() * share, counts


def _random(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that the process took since it began; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Bar:
    """The bar, or the caller's function."""

    def __init__(self, progress: bool | Callable[[Progress], None] | None, total: int, done: int) -> None:
        self._function = progress if callable(progress) else None
        self._show = progress is True or (progress is None and sys.stderr.isatty())
        self._total, self._done, self._bar = total, done, None

    def __enter__(self) -> _Bar:
        if self._show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._total, initial=self._done, unit="step", desc="precise_sft")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def call(self, told: Progress) -> None:
        if self._function is not None:
            self._function(told)
        if self._bar is not None:
            self._bar.set_postfix_str(str(told), refresh=False)
            self._bar.update()
