"""docs/sizing.md: its tables are what planner and committed records say, its formulas what the planner computes."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
# published numbers of parameters, in billions
PUBLISHED = {"1B": 1.24, "3B": 3.21, "7B": 6.74, "8B": 8.03, "13B": 13.02, "32B": 32.76, "70B": 70.55, "405B": 405.85}


@pytest.fixture
def sizing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import sizing

    return sizing


def test_the_tables_are_made_again(sizing):
    assert sizing.rendered(PAGE) == PAGE, "python bench/sizing.py --write makes them anew"
    for name, billions in PUBLISHED.items():
        assert f"| {name} (" in PAGE and f"| {billions:.2f} B |" in PAGE


def test_measured_figures_are_those_of_the_record_and_marked(sizing):
    from pyarith.reporting.profiles import amount, duration

    rows = sizing.records()
    bold = [line for line in PAGE.split("<!-- streamed")[0].splitlines() if line.startswith("| ") and "**" in line]
    assert [line.split(" | ")[0].removeprefix("| ") for line in bold] == list(sizing.MEASURED)
    for line, case in zip(bold, sizing.MEASURED, strict=True):
        row = rows[case, "fast_patch"]
        assert not row["quick"] and not row["dirty"]
        assert f"**{duration(row['seconds']['median'])}**" in line
        assert f"**{amount(row['peak_private_bytes'])}**" in line


def test_the_streamed_search_stayed_below_the_weights(sizing):
    """A quarter of the model was the limit; the record is of a clean tree and a whole run."""
    rows = [row for (case, _), row in sizing.records(sizing.STREAMED).items() if case == "streaming llama2_7b"]
    assert rows
    for row in rows:
        extra = row["extra"]
        assert not row["quick"] and not row["dirty"] and row["check"]["error"] <= row["check"]["bound"]
        assert row["peak_private_bytes"] <= extra["private_limit_bytes"] <= extra["weight_bytes"] / 4


def test_the_formulas_of_the_page_are_the_planners(sizing):
    import torch

    from pyarith.engine.sizing import JobShape, size_of_job

    config = sizing.config_of("7B (Llama-2)")
    layers, heads, d, d_mlp, n, t = 32, 32, 4096, 11008, 64, 20
    size = size_of_job(config, JobShape(n, t), torch.bfloat16, rate=1.0, memory_budget=2**40, device="cuda")
    mlp = 3 * d * d_mlp
    block = 4 * d * d + mlp + 2 * d
    tokens = n * (t // 2 + 2 * (t - t // 2))
    assert size.forecast.capture_flop == 2.0 * (block * layers - mlp) * tokens
    rows = sum((heads + 1) * (j + 1) + j for j in range(layers))
    assert size.forecast.replay_flop == 2.0 * mlp * n * rows
    assert size.literal_flop == 2.0 * block * layers * t * n * layers * (heads + 1)
    captured = n * d * 4 * (layers * (3 + 1) + 1) + n * 2 * 2 * d
    alive = n * layers * (heads + 2) * d * (4 + 2)
    starts = n * 2 * (heads + 1) * d * 4
    scratch = 16384 * (2 * (d + 2 * d_mlp) + 4 * d)
    assert size.forecast.bytes == pytest.approx(captured + alive + starts + scratch, rel=0.002)
    assert (heads + 2) * layers / 2 * mlp / block == pytest.approx(360, rel=0.02)
    assert size.forecast.replay_flop == pytest.approx((heads + 2) * layers / 2 * 2 * mlp * layers * n, rel=0.05)
