"""Races for the smallest k means: the stated confidence holds where it should, and the rules are right."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as reference

from pyarith.errors import InputError
from pyarith.stats import sequences
from pyarith.stats.race import Race, check_tolerance, rounds
from pyarith.stats.sequences import first_look, multiplier, sequence, student

CONFIDENCE = 0.95
SENDERS, K, CLUSTERS = 24, 4, 150
MEANS = np.concatenate([[-3.0, -2.0, -1.5, -1.0], np.zeros(12), np.linspace(0, 1, SENDERS - 16)])

Shape = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
SHAPES: dict[str, Shape] = {  # mean 0, variance 1
    "normal": lambda rng, size: rng.normal(size=size),
    "exponential": lambda rng, size: 1 - rng.exponential(size=size),
    "two clumps": lambda rng, size: ((rng.random(size) < 0.2) - 0.2) / 0.4,
}


def simulate(rng: np.random.Generator, shape: Shape, sizes: tuple[int, int] = (1, 5)) -> tuple[np.ndarray, np.ndarray]:
    """Effects [sender, prompt] and codes of clusters of 1 to 4 prompts: most of the variance lies between clusters,
    and differs from sender to sender by a factor of up to 100."""
    codes = np.repeat(np.arange(CLUSTERS), rng.integers(*sizes, CLUSTERS))
    sd = 10 ** rng.uniform(-0.5, 0.5, (SENDERS, 1))
    between = shape(rng, (SENDERS, CLUSTERS))
    within = shape(rng, (SENDERS, len(codes)))
    return MEANS[:, None] + sd * (0.95 * between[:, codes] + 0.31 * within), codes


def run(effects: np.ndarray, codes: np.ndarray, seed: int, tolerance: float = 0.0, k: int = K) -> tuple[Race, bool]:
    """The race to its end, and whether every interval of every look held its mean."""
    race, held = Race(SENDERS, k, CONFIDENCE), True
    size = int(codes.max()) + 1
    sums, counts = np.zeros((SENDERS, size)), np.zeros(size)
    for step in rounds(codes, SENDERS, CONFIDENCE, seed):
        running = race.running
        if not len(running):
            break
        np.add.at(counts, codes[step.prompts], 1)
        np.add.at(sums.T, codes[step.prompts], effects[:, step.prompts].T)
        values = sums[running][:, step.clusters] / counts[step.clusters]
        race.look(values, step.alpha, step.first, tolerance)
        held &= bool((race.low[running] <= MEANS[running]).all() and (MEANS[running] <= race.high[running]).all())
        assert (race.status == 1).sum() <= k and (race.status == -1).sum() <= SENDERS - k
    return race, held


def coverage(shape: str, races: int, seed: int = 0) -> tuple[float, float]:
    """Shares of races in which all intervals held, and in which no head was decided wrongly."""
    rng = np.random.default_rng(seed)
    held = right = 0
    for number in range(races):
        race, whole = run(*simulate(rng, SHAPES[shape]), seed=number)
        best = np.sort(MEANS)[K - 1]
        wrong = (race.status == 1) & (MEANS > best) | (race.status == -1) & (MEANS <= best)
        held, right = held + whole, right + (not wrong.any())
    return held / races, right / races


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage(shape: str) -> None:
    held, right = coverage(shape, 200)
    assert held >= CONFIDENCE
    assert right >= held


def test_ties_are_within_the_tolerance() -> None:
    """k among twelve equal means: without a tolerance the race goes to its end, with one it holds what it says."""
    rng, k, tolerance = np.random.default_rng(0), 10, 0.3
    right = ended = 0
    for number in range(40):
        effects, codes = simulate(rng, SHAPES["exponential"])
        effects = MEANS[:, None] + (effects - MEANS[:, None]) / 10
        race, _ = run(effects, codes, number, tolerance, k)
        strict, _ = run(effects, codes, number, 0.0, k)
        assert len(strict.running) > 0 and (strict.n_clusters >= race.n_clusters).all()
        ended += not len(race.running)
        right += bool(MEANS[race.status == 1].max() <= MEANS[race.status == -1].min() + tolerance)
        assert not strict.tied.any()
        if not len(race.running):  # the certificate, interval by interval
            assert race.tied[race.status == 1].sum() == 6
            assert race.high[race.status == 1].max() <= race.low[race.status == -1].min() + tolerance + 1e-12
    assert right >= 38 and ended >= 38


def test_too_narrow_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation tells an interval of one look and one sender from a sequence for all looks and senders."""
    monkeypatch.setattr(sequences, "multiplier", lambda t, alpha, first: 1.96)
    assert coverage("normal", 40)[0] < 0.5


def test_skewness_and_student_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The asymptotic sequence alone, at so early a first look, misses the mean of skewed effects too often."""
    monkeypatch.setattr(sequences, "student", lambda u, freedom: u)
    monkeypatch.setattr(sequences, "_TAIL", 0.0)
    assert coverage("two clumps", 200)[0] < CONFIDENCE


def test_prompts_are_not_independent() -> None:
    """Prompts of one cluster taken for clusters of their own: intervals too narrow by the square root of its size."""
    rng = np.random.default_rng(0)
    held = {"clusters": 0, "prompts": 0}
    for _ in range(20):
        effects, _ = simulate(rng, SHAPES["normal"], sizes=(40, 41))
        means = effects.reshape(SENDERS, CLUSTERS, 40).mean(2)
        for name, values in (("clusters", means), ("prompts", effects)):
            _, low, high = sequence(values, (1 - CONFIDENCE) / SENDERS, 40)
            held[name] += bool((low <= MEANS).all() and (high >= MEANS).all())
    assert held["clusters"] >= 19 and held["prompts"] <= 5


def test_rounds_take_every_prompt_once() -> None:
    codes = np.repeat(np.arange(60), np.arange(60) % 7 + 1)
    taken = list(rounds(codes, 8, CONFIDENCE, 3))
    assert sorted(np.concatenate([step.prompts for step in taken])) == list(range(len(codes)))
    one_each = [step for step in taken if step.alpha == taken[0].alpha]
    first = np.concatenate([step.prompts for step in one_each])
    assert len(first) == 60 == len(set(codes[first]))
    for step in one_each:
        assert set(step.clusters) == set(codes[first[: len(step.clusters)]])
    assert len(taken[0].clusters) == first_look(taken[0].alpha / 8)
    assert (taken[0].clusters != np.arange(len(taken[0].clusters))).any()
    assert all(len(step.clusters) == 60 for step in taken[len(one_each) :])
    # 7 prompts: passes to 1, 2, 4 and 7 prompts of a cluster; their shares of the error add up to all of it
    alphas = [taken[0].alpha, *(step.alpha for step in taken[len(one_each) :])]
    assert len(alphas) == 4 and math.isclose(sum(alphas), 1 - CONFIDENCE)
    again, other = (np.concatenate([step.prompts for step in rounds(codes, 8, CONFIDENCE, seed)]) for seed in (3, 4))
    assert (again == np.concatenate([step.prompts for step in taken])).all() and (again != other).any()


def test_one_prompt_a_cluster_is_one_pass() -> None:
    steps = list(rounds(np.arange(100), 8, CONFIDENCE, 0))
    assert {step.alpha for step in steps} == {1 - CONFIDENCE}
    assert sum(len(step.prompts) for step in steps) == 100


def test_few_clusters_are_one_look() -> None:
    (step,) = rounds(np.arange(6), 8, CONFIDENCE, 0)
    assert len(step.clusters) == step.first == 6


def intervals(race: Race, low: list[float], high: list[float], tolerance: float = 0.0) -> None:
    """Let the race look at given intervals."""
    race.low, race.high = np.array(low, float), np.array(high, float)
    race.mean = (race.low + race.high) / 2
    race._decide(tolerance)


def test_the_error_is_shared_by_all_senders() -> None:
    values = np.random.default_rng(0).normal(MEANS[:, None], 1.0, (SENDERS, 60))
    race = Race(SENDERS, K, CONFIDENCE)
    race.look(values, 0.04, 50, 0.0)
    _, low, high = sequence(values, 0.04 / SENDERS, 50)
    np.testing.assert_array_equal(race.low, low)
    np.testing.assert_array_equal(race.high, high)
    running = race.running
    assert 0 < len(running) < SENDERS  # the next look has fewer senders, but the error is still shared by all
    more = np.concatenate([values[running], values[running][:, ::-1]], 1)
    race.look(more, 0.04, 50, 0.0)
    _, again, _ = sequence(more, 0.04 / SENDERS, 50)
    np.testing.assert_array_equal(race.low[running], np.maximum(low[running], again))


def test_rules() -> None:
    race = Race(5, 2, CONFIDENCE)
    intervals(race, [-9, -5, -5, 0, 1], [-8, -3, -3, 1, 2])
    assert race.status.tolist() == [1, 0, 0, -1, -1]  # 0 is in; of 1 and 2 one is; 3 and 4 are out
    assert race.running.tolist() == [1, 2] and race.places == 1 and race.chosen.tolist() == [0, 1]
    race = Race(5, 2, CONFIDENCE)
    intervals(race, [-9, -5, -5, 0, 1], [-8, -3, -3, 1, 2], tolerance=2.0)
    assert race.status.tolist() == [1, 1, -1, -1, -1]
    assert race.tied.tolist() == [False, True, True, False, False]
    race = Race(4, 2, CONFIDENCE)  # without any spread: ties are settled by order, and called ties
    intervals(race, [0, 0, 0, -1], [0, 0, 0, -1])
    assert race.status.tolist() == [1, -1, -1, 1] and race.tied.tolist() == [True, True, True, False]


def test_sequence_on_paper() -> None:
    """Formulas in the module's own words, written out for four values."""
    values, t, alpha, first = np.array([[1.0, 2.0, 3.0, 10.0]]), 4, 0.01, 4
    a = -2 * math.log(alpha)
    r = (a + math.log(a + 1)) / 12
    u = math.sqrt(2 * (t * r + 1) / (t * r) * math.log(math.sqrt(t * r + 1) / alpha))
    assert multiplier(t, alpha, first) == pytest.approx(u, rel=1e-12)
    mean, low, high = sequence(values, alpha, first)
    q, sd, skewness = student(u, 3), values.std(ddof=1), reference.skew(values[0])
    assert mean[0] == 4.0
    assert low[0] == pytest.approx(4 - q * sd / 2, rel=1e-12)
    assert high[0] == pytest.approx(4 + (q / 2 + skewness * (2 * q * q + 1) / 24) * sd, rel=1e-12)
    flipped = sequence(-values, alpha, first)
    assert flipped[1][0] == pytest.approx(-high[0]) and flipped[2][0] == pytest.approx(-low[0])


@pytest.mark.parametrize("freedom", [19, 40, 200])
@pytest.mark.parametrize("u", [2.0, 4.0, 5.5])
def test_student(u: float, freedom: int) -> None:
    tail = reference.norm.sf(u)
    assert reference.t.sf(student(u, freedom), freedom) == pytest.approx(tail, rel=0.06)


def test_no_spread_is_a_point() -> None:
    for value in (0.0, -3.7e4, 0.1):
        mean, low, high = sequence(np.full((1, 50), value), 1e-4, 50)
        assert mean[0] == pytest.approx(value) and high[0] - low[0] <= 1e-12 * abs(value)


@pytest.mark.parametrize("k", [0, 5, 1.5, True])
def test_bad_k(k: object) -> None:
    with pytest.raises(InputError, match="top_k"):
        Race(5, k, CONFIDENCE)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf, "0.1", True])
def test_bad_tolerance(tolerance: object) -> None:
    with pytest.raises(InputError, match="tolerance"):
        check_tolerance(tolerance)
