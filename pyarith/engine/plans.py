"""Block sizes over a run: one plan, and a smaller one from each place where memory ran out.

They are kept with the parts of a run: one that goes on takes the same blocks, whatever memory is free by then, as long
as they fit into it. (Bits depend on the blocks.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any, Generic

from pyarith.engine.memory import AnyPlan
from pyarith.engine.store import Store

History = list[tuple[int, tuple[int, ...]]]  # from which prompt of the order on, and the fields of the plan


def begun(
    parts: Store, key: tuple[Any, ...], fits: Callable[[tuple[int, ...]], bool], new: Callable[[], Any]
) -> History:
    """The plans of an interrupted run; where there was none, or its first does not fit, a new one, which is kept."""
    found = parts.get(*key)
    plans: History = [(int(start), tuple(sizes)) for start, sizes in found.record["plans"]] if found else []
    if not plans or not fits(plans[0][1]):
        plans = [(0, astuple(new()))]
        parts.put(key, {}, {"plans": plans})
    return plans


class Plans(Generic[AnyPlan]):
    """The plan of each place of the order of prompts.

    Args:
        parts, key: where they are kept.
        kind: class of the plans.
        history: from ``begun``.
    """

    def __init__(self, parts: Store, key: tuple[Any, ...], kind: Callable[..., AnyPlan], history: History) -> None:
        self._parts, self._key = parts, key
        self._all = [(start, kind(*sizes)) for start, sizes in history]

    @property
    def first(self) -> AnyPlan:
        """The plan that the run began with."""
        return self._all[0][1]

    @property
    def last(self) -> AnyPlan:
        """The plan after the last out-of-memory."""
        return self._all[-1][1]

    def at(self, done: int) -> AnyPlan:
        """The plan of the block that starts with prompt ``done`` of the order."""
        return next(plan for start, plan in reversed(self._all) if start <= done)

    def change(self, done: int, plan: AnyPlan) -> None:
        """Another plan from ``done`` on; the first one stays in front."""
        self._all = [self._all[0], *(one for one in self._all[1:] if one[0] < done), (done, plan)]
        history = [(start, astuple(one)) for start, one in self._all]  # type: ignore[call-overload]
        self._parts.put(self._key, {}, {"plans": history})
