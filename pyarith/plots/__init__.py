"""Pictures. matplotlib is imported inside the functions; pyplot and its global state are never touched."""

from pyarith.plots.analyses import attention_figure, cosines_figure
from pyarith.plots.effects import effects_figure, effects_panels
from pyarith.plots.frontiers import frontier_figure
from pyarith.plots.knockouts import knockout_figure
from pyarith.plots.training import loss_figure
from pyarith.plots.transfers import transfer_figure

__all__ = [
    "attention_figure",
    "cosines_figure",
    "effects_figure",
    "effects_panels",
    "frontier_figure",
    "knockout_figure",
    "loss_figure",
    "transfer_figure",
]
