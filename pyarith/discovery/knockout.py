"""``knockout_curve``: what is left of a behaviour when the top k heads are ablated, beside honest controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyarith.ablation_result import Ablation, AblationSweep
from pyarith.engine.baselines import Baseline, MeanAblation
from pyarith.engine.sweep import ablation_sweep
from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import resolve
from pyarith.prompts import PromptPairs
from pyarith.result import PatchResult
from pyarith.stats import CircuitAreas, circuit_areas, faithfulness, random_heads, same_layer_heads
from pyarith.types import Head

Array = NDArray[Any]

CONTROLS = ("random", "same_layer", "bottom")
_OF_AN_ARM = ("accuracy", "logit", "correct")
_KS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50)


@dataclass(frozen=True)
class Arm:
    """One way of choosing k heads: the key heads, or a control.

    Attributes:
        name: "key", "random", "same_layer", "bottom" or "kept" (all heads but the top k are ablated).
        heads: [draw][k] the ablated sets.
        accuracy: [draw, k] share of prompts whose most probable next token is the answer.
        logit: [draw, k] mean logit of the answer.
        correct: bool [draw, k, batch].
    """

    name: str
    heads: tuple[tuple[Ablation, ...], ...]
    accuracy: Array
    logit: Array
    correct: Array


@dataclass(frozen=True, repr=False)
class KnockoutCurve:
    """Accuracy and answer logit against the number of ablated heads, on prompts that the intact model gets right.

    Attributes:
        ks: int [k], rising.
        ranking: all heads, most negative effect first.
        arms: by name; controls with several draws each.
        n_prompts: prompts of the curve; n_wrong: prompts left out because the intact model answers them wrongly.
        clean_logit: mean logit of the answer in the intact model.
        all_ablated: accuracy and mean logit with every head ablated.
        semantics: which quantity this is; settings: the baseline, draws, seed, and the record of the sweep.
    """

    ks: Array
    ranking: tuple[Head, ...]
    arms: dict[str, Arm]
    n_prompts: int
    n_wrong: int
    clean_logit: float
    all_ablated: tuple[float, float]
    semantics: str
    settings: dict[str, Any] = field(default_factory=dict)

    def relative_drop(self, arm: str = "key") -> Array:
        """[k] (accuracy - 1) of the mean draw: the intact model is right on every prompt of the curve."""
        return np.asarray(self.arms[arm].accuracy.mean(0) - 1.0)

    def faithfulness(self) -> Array:
        """[k] share of the answer's logit that the top k heads keep when all others are ablated (1 = intact)."""
        return faithfulness(self.arms["kept"].logit[0], self.all_ablated[1], self.clean_logit)

    def areas(self) -> CircuitAreas:
        """CPR and CMD over heads, from nothing kept (0) to everything kept (1); not comparable with edge circuits."""
        fractions = np.concatenate([[0.0], self.ks / len(self.ranking), [1.0]])
        curve = np.concatenate([[0.0], self.faithfulness(), [1.0]])
        inside = np.concatenate([[True], np.diff(fractions) > 0])
        return circuit_areas(fractions[inside], curve[inside])

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per arm and k: mean, min, max, standard deviation over draws, mean logit."""
        return [
            {
                "arm": name,
                "k": int(k),
                "draws": len(arm.accuracy),
                "accuracy": float(arm.accuracy[:, i].mean()),
                "accuracy_min": float(arm.accuracy[:, i].min()),
                "accuracy_max": float(arm.accuracy[:, i].max()),
                "accuracy_sd": float(arm.accuracy[:, i].std(ddof=1)) if len(arm.accuracy) > 1 else 0.0,
                "logit": float(arm.logit[:, i].mean()),
            }
            for name, arm in self.arms.items()
            for i, k in enumerate(self.ks)
        ]

    def packed(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Arrays, and the rest in JSON's types, for ``unpacked``."""
        record = {name: value for name, value in vars(self).items() if name not in ("ks", "arms")}
        record["arms"] = {name: arm.heads for name, arm in self.arms.items()}
        arrays = {f"{name} {what}": getattr(arm, what) for name, arm in self.arms.items() for what in _OF_AN_ARM}
        return {"ks": self.ks, **arrays}, record

    @classmethod
    def unpacked(cls, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> KnockoutCurve:
        """The curve that was packed; lists in ``record`` may have been tuples."""
        arms = {
            name: Arm(
                name,
                tuple(tuple(Ablation(_heads(heads), tuple(mlps)) for heads, mlps in draw) for draw in sets),
                **{what: arrays[f"{name} {what}"] for what in _OF_AN_ARM},
            )
            for name, sets in record["arms"].items()
        }
        changed = {"ks": arrays["ks"], "arms": arms, "ranking": _heads(record["ranking"])}
        return cls(**{**record, **changed, "all_ablated": tuple(record["all_ablated"])})

    def __repr__(self) -> str:
        left = f", {self.n_wrong} answered wrongly left out" if self.n_wrong else ""
        lines = [f"KnockoutCurve: {self.n_prompts} prompts{left}; {self.semantics}", f"  {'k':>10} " + _cells(self.ks)]
        for name, arm in self.arms.items():
            lines.append(f"  {name:>10} " + "".join(f"{value:8.1%}" for value in arm.accuracy.mean(0)))
        return "\n".join(lines)


def _heads(pairs: Sequence[Sequence[int]]) -> tuple[Head, ...]:
    return tuple(Head(*pair) for pair in pairs)


def _cells(values: Array) -> str:
    return "".join(f"{value:8d}" for value in values)


def knockout_curve(
    model: Any,
    pairs: PromptPairs,
    ranking: PatchResult | Sequence[Any],
    *,
    ks: Sequence[int] | None = None,
    baseline: Baseline | None = None,
    controls: Sequence[str] = CONTROLS,
    draws: int = 10,
    keep: bool = True,
    seed: int = 0,
    **options: Any,
) -> KnockoutCurve:
    """Ablate the top k heads of a ranking for rising k, and heads chosen by controls, on initially correct prompts.

    accuracy(k) = share of prompts whose most probable token after END is the answer while z of the k heads is the
    baseline at all positions, everything downstream recomputed. Controls: ``random`` heads of the whole model;
    ``same_layer``, for each key head another head of its layer (key heads only where a layer has no others left);
    ``bottom``, the heads at the other end of the ranking. ``keep=True`` adds the reverse (denoising): all heads but the
    top k ablated.

    Args:
        model: a supported Hugging Face causal LM; never changed.
        pairs: prompts with answers; those that the intact model answers wrongly are left out and counted. Use other
            prompts than the ranking's (``pa.stats.select_report``), or the curve flatters the key heads.
        ranking: a ``PatchResult`` (its heads by effect, most negative first), or all heads in order.
        ks: rising numbers of heads; default 1 2 3 5 8 10 ... up to the number of heads.
        baseline: default: the mean over all positions of these prompts.
        controls: some of "random", "same_layer", "bottom"; the first two with ``draws`` draws each.
        draws: per control and k.
        keep: also the curve of what is kept.
        seed: of the draws.
        options: for ``ablation_sweep`` (``memory_budget``, ``backend``, ``verify``, ``progress``, ``resume``).
    Returns:
        A ``KnockoutCurve``.
    Raises:
        InputTypeError, InputError: an argument is wrong; k larger than the number of heads; no prompt that the model
            answers rightly.
        Whatever ``ablation_sweep`` raises.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 4; Wang et al. 2022, arXiv:2211.00593, sec. 2; the areas:
        Mueller et al. 2025, arXiv:2504.13151.
    """
    given = isinstance(pairs, PromptPairs)
    check(given, f"pairs: expected PromptPairs, got {type(pairs).__name__}; see pa.tasks.arithmetic", InputTypeError)
    sites = resolve(model)
    order = _order(ranking, sites.n_layers, sites.n_heads)
    numbers = _numbers(ks, len(order))
    unknown = [name for name in controls if name not in CONTROLS]
    check(not unknown, f"controls: expected some of {CONTROLS}, got {unknown}")
    whole = isinstance(draws, int) and draws >= 1
    check(whole, f"draws: expected a whole number >= 1, got {draws!r}")
    right = _right(model, pairs, order, options)
    n_wrong = int((~right).sum())
    if not right.any():
        raise InputError(
            f"pairs: expected prompts that the model answers correctly, got none of {len(pairs)}: there is no "
            "behaviour to knock out"
        )
    used = pairs if right.all() else pairs.subset(right)
    inputs = used.inputs()
    if baseline is None:
        baseline = MeanAblation.from_inputs(model, inputs["clean"], inputs.get("attention_mask"))
    chosen = _sets(order, numbers, controls, draws, keep, np.random.default_rng(seed))
    everything = Ablation.parse(list(order))
    wanted = [s for some in chosen.values() for draw in some for s in draw if any(s)]
    flat = list(dict.fromkeys([*wanted, everything]))
    sweep = ablation_sweep(model, used, sets=flat, baseline=baseline, predictions=True, **options)
    answers = np.asarray(used.answers)
    arms = {name: _arm(name, sets, sweep, answers) for name, sets in chosen.items()}
    last = sweep.of(everything)
    assert sweep.predictions is not None
    return KnockoutCurve(
        ks=numbers,
        ranking=order,
        arms=arms,
        n_prompts=len(used),
        n_wrong=n_wrong,
        clean_logit=float(sweep.clean_logits.mean(dtype=np.float64)),
        all_ablated=(float((sweep.predictions[last] == answers).mean()), float(sweep.logits[last].mean())),
        semantics=f"knock-out, {baseline.name}; {sweep.semantics}",
        settings={"draws": draws, "seed": seed, "baseline": baseline.name, "sweep": sweep.settings},
    )


def _order(ranking: Any, n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """All heads of the model, the most negative effect first."""
    if isinstance(ranking, PatchResult):
        effects = ranking.head_effects
        check(effects is not None, "ranking: expected a result with heads as senders, got one without")
        assert effects is not None
        fits = effects.shape == (n_layers, n_heads)
        check(fits, f"ranking: expected effects of {n_layers} x {n_heads} heads, got {effects.shape}: another model?")
        # heads without a relative effect (NaN) come where a head without any effect stands
        flat = np.nan_to_num(effects, nan=0.0).ravel().argsort(kind="stable")
        return tuple(Head(int(i) // n_heads, int(i) % n_heads) for i in flat)
    heads = Ablation.parse(list(ranking)).heads
    order = tuple(Head(int(h[0]), int(h[1])) for h in ranking)
    full = len(order) == len(heads) == n_layers * n_heads
    check(
        full,
        f"ranking: expected all {n_layers * n_heads} heads, each once, in order, got {len(order)} ({len(heads)} "
        "different ones); a PatchResult gives them",
    )
    absent = [str(h) for h in heads if h.layer >= n_layers or h.head >= n_heads or min(h) < 0]
    check(not absent, f"ranking: expected heads of {n_layers} layers of {n_heads}, got {', '.join(absent)}")
    return order


def _numbers(ks: Sequence[int] | None, n_heads: int) -> Array:
    numbers = np.asarray([k for k in _KS if k <= n_heads] if ks is None else list(ks))
    whole = numbers.ndim == 1 and numbers.size > 0 and numbers.dtype.kind in "iu" and bool((np.diff(numbers) > 0).all())
    check(whole and numbers[0] >= 1, f"ks: expected rising whole numbers >= 1, got {ks!r}")
    check(int(numbers[-1]) <= n_heads, f"ks: expected at most the {n_heads} heads of the model, got {int(numbers[-1])}")
    return numbers


def _right(model: Any, pairs: PromptPairs, order: tuple[Head, ...], options: dict[str, Any]) -> Array:
    """bool [batch]: the intact model's most probable token is the answer."""
    quiet = {**options, "verify": 0, "progress": False}
    sweep = ablation_sweep(model, pairs, sets=[order[:1]], predictions=True, **quiet)
    assert sweep.clean_predictions is not None
    return np.asarray(sweep.clean_predictions == np.asarray(pairs.answers))


Sets = tuple[tuple[Ablation, ...], ...]  # [draw][k]


def _sets(
    order: tuple[Head, ...],
    ks: Array,
    controls: Sequence[str],
    draws: int,
    keep: bool,
    random: np.random.Generator,
) -> dict[str, Sets]:
    """The sets of every arm. A draw is one order of heads, so that its sets grow with k."""
    orders: dict[str, list[Sequence[Head]]] = {"key": [order]}
    if "random" in controls:
        orders["random"] = [random_heads(len(order), order, random) for _ in range(draws)]
    if "bottom" in controls:
        orders["bottom"] = [order[::-1]]
    sets: dict[str, Sets] = {
        name: tuple(tuple(Ablation.parse(list(one[:k])) for k in ks) for one in some) for name, some in orders.items()
    }
    if "same_layer" in controls:
        sets["same_layer"] = tuple(
            tuple(Ablation.parse(same_layer_heads(order[:k], order, random)) for k in ks) for _ in range(draws)
        )
    if keep:
        # with all heads kept nothing is ablated; that point is the intact model and needs no run
        sets["kept"] = (tuple(Ablation.parse(list(order[k:])) if k < len(order) else Ablation() for k in ks),)
    return sets


def _arm(name: str, sets: Sets, sweep: AblationSweep, answers: Array) -> Arm:
    assert sweep.predictions is not None and sweep.clean_predictions is not None

    def at(one: Ablation, swept: Array, clean: Array) -> Array:
        return swept[sweep.of(one)] if any(one) else clean

    correct = np.array([[at(s, sweep.predictions, sweep.clean_predictions) == answers for s in draw] for draw in sets])
    logits = np.array([[at(s, sweep.logits, sweep.clean_logits) for s in draw] for draw in sets], dtype=np.float64)
    return Arm(name, sets, correct.mean(-1), logits.mean(-1), correct)
