"""Precise SFT: only chosen heads and MLPs are trained; everything else keeps its bits."""

from pyarith.tuning.data import Examples, load_examples, task_examples
from pyarith.tuning.delta import Delta
from pyarith.tuning.delta_file import read_delta
from pyarith.tuning.delta_load import DeltaBank, LoadedDelta, load_delta, merge_delta
from pyarith.tuning.prefix import PrefixCache
from pyarith.tuning.selective import SelectiveTuner
from pyarith.tuning.settings import TuneSettings
from pyarith.tuning.sft import precise_sft
from pyarith.tuning.sft_result import TuneResult

__all__ = [
    "Delta",
    "DeltaBank",
    "Examples",
    "LoadedDelta",
    "PrefixCache",
    "SelectiveTuner",
    "TuneResult",
    "TuneSettings",
    "load_delta",
    "load_examples",
    "merge_delta",
    "precise_sft",
    "read_delta",
    "task_examples",
]
