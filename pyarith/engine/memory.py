"""Out of memory: what counts as such, and the smaller plan that a run goes on with."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from pyarith.errors import MemoryBudgetError
from pyarith.models.sites import ModelSites


class Halvable(Protocol):
    """A plan of blocks."""

    def halved(self: AnyPlan) -> AnyPlan | None:
        """Half of everything, or None when nothing is left to halve."""


AnyPlan = TypeVar("AnyPlan", bound=Halvable)


def is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def smaller(plan: AnyPlan, sites: ModelSites, error: BaseException) -> AnyPlan:
    """Half the plan.

    Raises:
        MemoryBudgetError: nothing is left to halve.
    """
    half = plan.halved()
    if half is None:
        raise MemoryBudgetError(
            f"memory_budget: out of memory on {sites.device} with one prompt and one row at a time ({error}); free "
            "memory there or load the model in a smaller dtype"
        ) from error
    return half
