"""Adaptive discovery: the k heads with the most negative effect, from as few prompts per head as it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyarith.discovery.patching import patch
from pyarith.engine.progress import Bar, Progress
from pyarith.engine.ranks import team
from pyarith.errors import check
from pyarith.prompts import PromptPairs
from pyarith.result import PatchResult
from pyarith.stats.clusters import Clusters, group_sums
from pyarith.stats.race import Race, check_tolerance, rounds
from pyarith.types import Head

Array = NDArray[Any]

_ARRAYS = ("change", "low", "high", "status", "tied", "n_clusters", "n_prompts")


@dataclass(frozen=True, eq=False, repr=False)
class TopHeads:
    """The ``k`` heads whose patching lowers the answer's logit most, and how sure that is.

    Heads are ranked by their mean change of the answer's logit (patched minus identity row, sign kept, most negative
    first): the mean over clusters (operand pairs, or items) of a cluster's mean. [layer, head] arrays:

    Attributes:
        k: how many were asked for.
        change, low, high: mean change and its interval, when the head was decided or the prompts were spent.
        status: int8, 1 = in the top k, -1 = not in it, 0 = undecided.
        tied: bool, decided within the tolerance only.
        n_clusters: clusters behind the interval; n_prompts: prompts that the head was run on.
        cluster: what a cluster is, such as "pair".
        confidence, tolerance: of the guarantee; tolerance in logits.
        n_given: prompts that there were; n_used: those that some head was run on.
        rows, rows_full: rows of the replay through the MLPs, spent and of a full run of all heads on all prompts.
        seed: of the order of the clusters.
    """

    k: int
    change: Array
    low: Array
    high: Array
    status: Array
    tied: Array
    n_clusters: Array
    n_prompts: Array
    cluster: str
    confidence: float
    tolerance: float
    n_given: int
    n_used: int
    rows: int
    rows_full: int
    seed: int

    @property
    def heads(self) -> list[Head]:
        """The top k, most negative change first; undecided places go to the most negative undecided heads."""
        free = self.k - int((self.status == 1).sum())
        open_heads = sorted(self.undecided, key=lambda head: (self.change[head], head))[:free]
        return sorted([*self._with(1), *open_heads], key=lambda head: (self.change[head], head))

    @property
    def undecided(self) -> list[Head]:
        """Heads of which the prompts do not say whether they are in the top k."""
        return self._with(0)

    def decision(self, head: tuple[int, int]) -> str:
        """``in``, ``out`` or ``undecided``; ``in (tie)`` and ``out (tie)`` where within the tolerance only."""
        word = {1: "in", -1: "out", 0: "undecided"}[int(self.status[head])]
        return f"{word} (tie)" if self.tied[head] else word

    def _with(self, status: int) -> list[Head]:
        return [Head(*map(int, place)) for place in np.argwhere(self.status == status)]

    @property
    def guarantee(self) -> str:
        """What holds, in words."""
        free = self.k - int((self.status == 1).sum())
        tied = int(self.tied.sum())
        open_ = (
            f"undecided when the prompts were spent: {len(self.undecided)} heads for {free} of the {self.k} places, "
            "given to those with the most negative mean"
            if self.undecided
            else "all heads are decided"
        )
        where = " in the templates at hand" if self.cluster == "pair" else ""
        near = f" ({tied} of them as ties, by no more than {self.tolerance:.3g} logits)" if tied else ""
        return (
            f"with confidence {self.confidence:.4g}, every decision is right{near}, over all heads and all looks "
            f"together, for the mean change of the answer's logit over {self.cluster}s like these{where}; asymptotic "
            f"in the number of {self.cluster}s, so that a head that acts on very few of them may be missed; {open_}"
        )

    def record(self) -> dict[str, Any]:
        """Everything in JSON's types, for ``from_record``; with the heads, the undecided ones and the guarantee."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values |= {name: values[name].tolist() for name in _ARRAYS}
        names = {"heads": self.heads, "undecided": self.undecided}
        return {**values, **{name: list(map(str, heads)) for name, heads in names.items()}, "guarantee": self.guarantee}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TopHeads:
        """What ``record`` wrote."""
        kinds = {"status": np.int8, "tied": bool, "n_clusters": np.int64, "n_prompts": np.int64}
        values = {one.name: record[one.name] for one in fields(cls)}
        values |= {name: np.array(values[name], kinds.get(name, np.float64)) for name in _ARRAYS}
        return cls(**values)

    def __repr__(self) -> str:
        lines = [
            f"TopHeads: {self.k} of {self.status.size} heads; {self.n_used} of {self.n_given} prompts, "
            f"{self.rows / self.rows_full:.1%} of the rows of a full run",
            f"  {self.guarantee}",
        ]
        for head in self.heads:
            lines.append(
                f"  {head!s:>7}  {self.change[head]:+.4f} [{self.low[head]:+.4f}, {self.high[head]:+.4f}] logits, "
                f"{self.n_prompts[head]} prompts, {self.decision(head)}"
            )
        return "\n".join(lines)


def find_top(
    model: Any,
    pairs: PromptPairs,
    shape: tuple[int, int],
    k: int,
    *,
    confidence: float,
    tolerance: float | None,
    seed: int,
    progress: Progress = None,
    verify: int = 2,
    **options: Any,
) -> tuple[TopHeads, PatchResult, Array]:
    """Race all heads, [n_layers, n_heads] = ``shape``, on ``pairs``; the other arguments are those of ``discover``.

    Returns:
        The top heads; the result on the prompts that were used, NaN where a head was no longer run; int64 which
        prompts these are, in the order of the result.
    """
    race = Race(shape[0] * shape[1], k, confidence)
    if tolerance is not None:
        check_tolerance(tolerance)
    check("senders" not in options, "senders: top_k ranks heads and runs nothing else; leave senders out")
    clusters = Clusters.of(pairs)
    clusters = clusters.only(clusters.names[0])
    clusters.require()
    (codes,), (cluster,), n_heads = clusters.codes, clusters.names, race.status.size
    sums = np.zeros((n_heads, clusters.sizes[cluster]))
    counts = np.zeros(clusters.sizes[cluster])
    n_prompts = np.zeros(n_heads, np.int64)
    parts: list[PatchResult] = []
    used: list[Array] = []
    records: list[dict[str, Any]] = []
    done = 0
    with team() as ranks, Bar(ranks.shown(progress), len(pairs), "prompt", "discover") as bar:
        for step in rounds(codes, n_heads, confidence, seed):
            running = race.running
            if not len(running):
                break
            part = patch(
                model,
                [pairs.subset(step.prompts).inputs()],
                senders=("heads",),
                chosen=_by_layer(running, shape),
                verify=0 if parts else verify,
                progress=bar.after(done),
                **options,
            )
            done += len(step.prompts)
            parts.append(part)
            used.append(step.prompts)
            changes = np.asarray(part.head_changes, np.float64).reshape(n_heads, -1)[running]
            sums[running] += group_sums(changes, codes[step.prompts], len(counts))
            counts += np.bincount(codes[step.prompts], minlength=len(counts))
            n_prompts[running] += len(step.prompts)
            floor = max(float(one.noise_floor.max()) for one in parts)
            values = sums[running][:, step.clusters] / counts[step.clusters]
            race.look(values, step.alpha, step.first, floor if tolerance is None else tolerance)
            records.append(_record(part, len(step.prompts), len(step.clusters), len(running)))
    result = PatchResult.merge(parts)
    rows = sum(record["rows"] for record in records)
    settings = {name: value for name, value in parts[0].settings.items() if name != "seconds"}
    result = replace(result, settings={**settings, "rows": rows, "rounds": records})
    arrays = {name: getattr(race, name) for name in ("low", "high", "status", "tied", "n_clusters")}
    arrays |= {"change": race.mean, "n_prompts": n_prompts}
    top = TopHeads(
        k=k,
        **{name: value.reshape(shape) for name, value in arrays.items()},
        cluster=cluster,
        confidence=confidence,
        tolerance=floor if tolerance is None else float(tolerance),
        n_given=len(pairs),
        n_used=sum(map(len, used)),
        rows=rows,
        rows_full=records[0]["rows"] // len(used[0]) * len(pairs),
        seed=seed,
    )
    return top, result, np.concatenate(used)


def _by_layer(running: Array, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The heads of each layer at flat indices."""
    alive = np.zeros(shape, bool)
    alive.flat[running] = True
    return tuple(tuple(np.flatnonzero(layer).tolist()) for layer in alive)


def _record(part: PatchResult, prompts: int, clusters: int, heads: int) -> dict[str, Any]:
    """What a round was, for the settings of the result."""
    settings = part.settings
    return {
        "prompts": prompts,
        "clusters": clusters,
        "heads": heads,
        "rows": settings["rows"],
        "seconds": settings["seconds"],
    }
