"""The experiments E1 ... as data: how each is run on a model, kept as a record, and shown on a page.

To add one: a module with an ``EXPERIMENT`` in it, and a line in ``EXPERIMENTS``.
"""

from pyarith.reporting.experiments import (
    e01_heads,
    e02_models,
    e03_overlap,
    e04_mlps,
    e05_knockout,
    e06_attention,
    e07_new_operator,
    e08_formats,
    e09_dataset,
    e10_controls,
    e11_cosines,
    e12_lens,
    e13_precise_sft,
    e14_sizes,
)
from pyarith.reporting.experiments.page import DEMO, render
from pyarith.reporting.experiments.records import read, read_all
from pyarith.reporting.experiments.registry import Experiment
from pyarith.reporting.experiments.running import Plan, draw_missing
from pyarith.reporting.experiments.subject import Subject

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        e01_heads.EXPERIMENT,
        e02_models.EXPERIMENT,
        e03_overlap.EXPERIMENT,
        e04_mlps.EXPERIMENT,
        e05_knockout.EXPERIMENT,
        e06_attention.EXPERIMENT,
        e07_new_operator.EXPERIMENT,
        e08_formats.EXPERIMENT,
        e09_dataset.EXPERIMENT,
        e10_controls.EXPERIMENT,
        e11_cosines.EXPERIMENT,
        e12_lens.EXPERIMENT,
        e13_precise_sft.EXPERIMENT,
        e14_sizes.HEADS,
        e14_sizes.MLPS,
    )
}

__all__ = ["DEMO", "EXPERIMENTS", "Experiment", "Plan", "Subject", "draw_missing", "read", "read_all", "render"]
