"""Precise SFT: only chosen heads and MLPs are trained; everything else keeps its bits."""

from pyarith.tuning.selective import SelectiveTuner

__all__ = ["SelectiveTuner"]
