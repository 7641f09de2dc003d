"""Mixtures of experts: what every family goes through, in one case each, and what only they can do."""

from __future__ import annotations

import pytest
import sweep_oracle
import test_families
from family_cases import CASES, check_sweep
from single_thread import one_thread  # noqa: F401
from tiny_models import MOE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MOE)
def test_as_every_family(name: str, case: str) -> None:
    test, settings = CASES[case]
    test(name, *settings)


@pytest.mark.parametrize("where", sweep_oracle.POSITIONS)
@pytest.mark.parametrize("name", MOE)
def test_sweep(name: str, where: str) -> None:
    check_sweep(name, where)


def test_frozen_mlps() -> None:
    test_families.test_exact("gpt-oss", "frozen", "none")
