"""Precise SFT: only chosen heads and MLPs are trained; everything else keeps its bits."""

from pyarith.tuning.data import Examples, load_examples, task_examples
from pyarith.tuning.prefix import PrefixCache
from pyarith.tuning.selective import SelectiveTuner
from pyarith.tuning.settings import TuneSettings
from pyarith.tuning.sft import precise_sft
from pyarith.tuning.sft_result import TuneResult

__all__ = [
    "Examples",
    "SelectiveTuner",
    "TuneResult",
    "TuneSettings",
    "load_examples",
    "precise_sft",
    "task_examples",
]
