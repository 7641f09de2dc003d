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


def stored(parts: Store, key: tuple[Any, ...], fits: Callable[[tuple[int, ...]], bool]) -> History:
    """The plans of an interrupted run; none where there was none, or where its first one does not fit any more."""
    found = parts.get(*key)
    plans: History = [(int(start), tuple(sizes)) for start, sizes in found.record["plans"]] if found else []
    return plans if plans and fits(plans[0][1]) else []


class Plans(Generic[AnyPlan]):
    """The plan of each place of the order of prompts.

    Args:
        parts, key: where they are kept.
        kind: class of the plans.
        found: from ``stored``.
        new: makes the first plan where nothing was found.
    """

    def __init__(
        self,
        parts: Store,
        key: tuple[Any, ...],
        kind: Callable[..., AnyPlan],
        found: History,
        new: Callable[[], AnyPlan],
    ) -> None:
        self._parts, self._key = parts, key
        self._all = [(start, kind(*sizes)) for start, sizes in found]
        if not found:
            self.change(0, new())

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
        """Another plan from ``done`` on."""
        self._all = [*(one for one in self._all if one[0] < done), (done, plan)]
        self._parts.put(self._key, {}, {"plans": self.history()})

    def history(self) -> History:
        """Every plan, in the form of ``stored``."""
        return [(start, astuple(plan)) for start, plan in self._all]  # type: ignore[call-overload]
