"""Areas of faithfulness curves: CPR and CMD of the Mechanistic Interpretability Benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith.errors import check
from pyarith.stats.clusters import Array, effects_array


@dataclass(frozen=True)
class CircuitAreas:
    """Areas of a faithfulness curve over the kept fraction.

    Attributes:
        cpr: integral of f, the "integrated circuit performance ratio": higher is better, and it may exceed the span.
        cmd: integral of |1 - f|, the "integrated circuit-model distance": 0 is best.
        span: (first, last) fraction between which was integrated.
    """

    cpr: float
    cmd: float
    span: tuple[float, float]


def faithfulness(score: Any, nothing: float, everything: float) -> Array:
    """f = (m(C) - m(nothing)) / (m(N) - m(nothing)): the share of the model's performance that a circuit keeps.

    Args:
        score: m(C), the metric with only circuit C kept and the rest ablated, any shape.
        nothing: m with everything ablated.
        everything: m of the intact model N.
    Returns:
        fp64, the shape of score: 1 = as the model, 0 = as nothing; it may lie outside 0 .. 1.
    Raises:
        InputError: the two ends are equal, so that there is nothing to keep.
    References: Mueller et al. 2025, arXiv:2504.13151, sec. 3.1.
    """
    values = effects_array(score, "score", least_ndim=0)
    ends = float(everything) - float(nothing)
    check(
        bool(np.isfinite(ends)) and ends != 0, f"everything: expected other than nothing = {nothing}, got {everything}"
    )
    return (values - nothing) / ends


def circuit_areas(fractions: Any, curve: Any) -> CircuitAreas:
    """CPR = integral of f(k) dk and CMD = integral of |1 - f(k)| dk over the kept fraction k, by the trapezoid rule.

    For points (k_i, f_i): CPR = sum (k_(i+1) - k_i) (f_i + f_(i+1)) / 2, CMD the same with |1 - f_i|.

    Args:
        fractions: [point], kept components / all components (k / n), strictly rising in 0 .. 1.
        curve: [point], faithfulness at each.
    Returns:
        ``CircuitAreas``. Only the span that was given counts; the benchmark takes edges at 0.001 0.002 0.005 0.01 0.02
        0.05 0.1 0.2 0.5 1, linear in k, so half of the area lies above 0.5. Areas over other points, or over heads in
        place of edges, are not comparable with its tables.
    Raises:
        InputError: fewer than two points, fractions not rising in 0 .. 1, shapes that differ, or NaN.
    Notes: |1 - f| is taken at the points, so where the curve crosses 1 in between, CMD is a little too high; the
        benchmark does the same.
    References: Mueller et al. 2025, MIB: A Mechanistic Interpretability Benchmark, arXiv:2504.13151, sec. 3.1.
    """
    k, f = effects_array(fractions, "fractions"), effects_array(curve, "curve")
    fits = k.ndim == 1 and k.shape == f.shape and len(k) >= 2
    check(fits, f"fractions, curve: expected two [point] of equal length >= 2, got {k.shape} and {f.shape}")
    whole = not (np.isnan(k).any() or np.isnan(f).any())
    check(whole, "fractions, curve: expected a number at every point, got NaN")
    rising = bool((np.diff(k) > 0).all()) and k[0] >= 0 and k[-1] <= 1
    check(rising, f"fractions: expected strictly rising values in 0 .. 1, got {k.tolist()}")

    def area(values: Array) -> float:
        return float((np.diff(k) * (values[1:] + values[:-1]) / 2).sum())

    return CircuitAreas(area(f), area(np.abs(1 - f)), (float(k[0]), float(k[-1])))
