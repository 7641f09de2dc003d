"""``TuneSettings``: everything about a fine-tuning run that can change a number, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pyarith.engine.planner import parse_bytes
from pyarith.errors import InputError, check
from pyarith.tuning.slices import KV

SCHEDULES = ("cosine", "linear", "polynomial", "constant")
BY_HEADS = "heads"  # grad_scale: heads of the model / chosen heads
PACKED = 512  # tokens of a row that holds several examples, where no example is longer


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Settings of ``precise_sft``.

        learning rate of a step = lr * lr_scale * schedule(step)
        gradient of a step      = grad_scale * (task_weight * d task / d p + (1 - task_weight) * d general / d p)

    with ``task`` and ``general`` the mean cross-entropy over all completion tokens of the step's examples.

    Attributes:
        lr: learning rate.
        lr_scale: a factor on it, recorded apart from it.
        grad_scale: a factor on every gradient, or ``"heads"`` = heads of the model / chosen heads, as in the paper.
            Under Adam it matters only beside ``eps`` and clipping; ``lr_scale`` is what changes the steps.
        weight_decay: decoupled, on the trained slices only.
        max_grad_norm: clip the norm over all trained slices (after ``grad_scale``); None does not.
        schedule: "cosine", "linear", "polynomial" (quadratic) down to 0, or "constant"; after the warm-up.
        warmup: share of the steps in which the rate rises from 0.
        epochs: passes over the data.
        steps: optimizer steps in place of epochs.
        batch_size: examples of an optimizer step (the last of an epoch may have fewer).
        micro_batch_size: rows that go through the model at once, which memory grows with; gradients add up over a step.
        max_length: most tokens of an example; None = what the model allows. Longer ones are refused, never cut.
        packing: several examples in one row, kept apart by position and attention.
        prefix_cache: bytes (or "2GiB") for what the layers below the trained ones give, kept over epochs; None = none.
        regroup: other examples share a step in every epoch; False: always the same, in another order of steps. Only
            then a prefix cache gives the bits of a run without one (else equal up to rounding) and serves packed rows.
        task_weight: weight of the task's loss beside that of general data (lambda); 1 = without.
        replay_batch_size: examples of general data in an optimizer step; None = as many as of the task.
        kv: "group" trains keys and values that the chosen heads read, "none" does not.
        stochastic_rounding: of new values into 16-bit weights.
        seed: of the order of examples, dropout where the model is in training mode, and stochastic rounding.
        save_every: steps between checkpoints, where there is a place for them; None = a tenth of the run.
    Raises:
        InputError: a value out of its range; the message says which are allowed.
    """

    lr: float = 1e-4
    lr_scale: float = 1.0
    grad_scale: float | str = 1.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05
    epochs: int = 3
    steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int = 8
    max_length: int | None = None
    packing: bool = False
    prefix_cache: int | str | None = None
    regroup: bool = True
    task_weight: float = 1.0
    replay_batch_size: int | None = None
    kv: str = "group"
    stochastic_rounding: bool = False
    seed: int = 0
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "lr_scale", "max_grad_norm", "grad_scale"):
            value = getattr(self, name)
            other = {"max_grad_norm": None, "grad_scale": BY_HEADS}
            known = (_is_number(value) and value > 0) or (name in other and value == other[name])
            also = f" or {other[name]!r}" if name in other else ""
            check(known, f"{name}: expected a positive number{also}, got {value!r}")
        check(
            _is_number(self.weight_decay) and self.weight_decay >= 0,
            f"weight_decay: expected a number >= 0, got {self.weight_decay!r}",
        )
        check(_is_number(self.warmup) and 0 <= self.warmup < 1, f"warmup: expected 0 <= share < 1, got {self.warmup!r}")
        check(
            _is_number(self.task_weight) and 0 < self.task_weight <= 1,
            f"task_weight: expected 0 < weight <= 1, got {self.task_weight!r}",
        )
        for name in ("epochs", "batch_size", "micro_batch_size"):
            check(_is_count(getattr(self, name)), f"{name}: expected a whole number >= 1, got {getattr(self, name)!r}")
        for name in ("packing", "regroup", "stochastic_rounding"):
            value = getattr(self, name)
            check(isinstance(value, bool), f"{name}: expected True or False, got {value!r}")
        for name in ("steps", "max_length", "replay_batch_size", "save_every"):
            value = getattr(self, name)
            check(value is None or _is_count(value), f"{name}: expected None or a whole number >= 1, got {value!r}")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool) and self.seed >= 0
        check(whole, f"seed: expected a whole number >= 0, got {self.seed!r}")
        parse_bytes(self.prefix_cache, "prefix_cache")
        check(
            self.prefix_cache is None or self.regroup is False or not self.packing,
            "prefix_cache: expected regroup=False beside packing, since packed rows are found again as a whole only",
        )
        for name, known_values in (("schedule", SCHEDULES), ("kv", KV)):
            value = getattr(self, name)
            check(value in known_values, f"{name}: expected one of {', '.join(known_values)}, got {value!r}")

    @classmethod
    def preset(cls, name: str) -> TuneSettings:
        """``"default"``, for small data; or ``"paper"``.

        The paper: lr 2e-5, batch 128, 2 epochs, gradients times heads of the model / chosen heads. What it does not
        publish is set as is usual for such runs: cosine after 3 % of warm-up, no decay, no clipping (which would undo
        the factor).

        References: Zhang et al. 2024, arXiv:2409.01659, sec. 5.
        """
        check(name in PRESETS, f"settings: expected TuneSettings or one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def of(cls, settings: TuneSettings | str, changes: dict[str, Any]) -> TuneSettings:
        """A preset by its name or settings as they are, with changes.

        Raises:
            InputError: an unknown preset or setting, or a value out of its range.
        """
        base = settings if isinstance(settings, TuneSettings) else cls.preset(settings)
        names = [one.name for one in fields(cls)]
        unknown = [name for name in changes if name not in names]
        if unknown:
            raise InputError(f"settings: expected some of {', '.join(names)}, got {', '.join(unknown)}")
        return replace(base, **changes)

    def record(self) -> dict[str, Any]:
        """All values by name."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be the same one: all but how often checkpoints are written."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        **{"lr": 2e-5, "batch_size": 128, "epochs": 2, "grad_scale": BY_HEADS},
        **{"warmup": 0.03, "max_grad_norm": None},
    },
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
