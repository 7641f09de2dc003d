"""pyarith: find, prove and tune the attention heads and MLPs of a language model that carry a behaviour.

The public names are loaded on first use, so that ``import pyarith`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarith import analysis as analysis
    from pyarith import evaluation as evaluation
    from pyarith import stats as stats
    from pyarith import tasks as tasks
    from pyarith.ablation_result import Ablation as Ablation
    from pyarith.ablation_result import AblationSweep as AblationSweep
    from pyarith.demo import load_demo as load_demo
    from pyarith.discovery import fast_patch as fast_patch
    from pyarith.discovery import knockout_curve as knockout_curve
    from pyarith.discovery.discover import discover as discover
    from pyarith.discovery.profile import PatchProfile as PatchProfile
    from pyarith.discovery.profile import profile_patch as profile_patch
    from pyarith.engine.ablation import ablated as ablated
    from pyarith.engine.baselines import MeanAblation as MeanAblation
    from pyarith.engine.baselines import ResampleAblation as ResampleAblation
    from pyarith.engine.baselines import ZeroAblation as ZeroAblation
    from pyarith.engine.boost import boost as boost
    from pyarith.engine.sweep import ablation_sweep as ablation_sweep
    from pyarith.models.streaming import stream_checkpoint as stream_checkpoint
    from pyarith.prompts import PromptPairs as PromptPairs
    from pyarith.result import PatchResult as PatchResult
    from pyarith.tuning import DeltaBank as DeltaBank
    from pyarith.tuning import SelectiveTuner as SelectiveTuner
    from pyarith.tuning import TuneSettings as TuneSettings
    from pyarith.tuning import load_delta as load_delta
    from pyarith.tuning import merge_delta as merge_delta
    from pyarith.tuning import precise_sft as precise_sft
    from pyarith.types import Head as Head

__version__ = "0.1.0"

_PUBLIC = {
    "fast_patch": "pyarith.discovery",
    "discover": "pyarith.discovery",
    "knockout_curve": "pyarith.discovery",
    "profile_patch": "pyarith.discovery.profile",
    "PatchProfile": "pyarith.discovery.profile",
    "PatchResult": "pyarith.result",
    "PromptPairs": "pyarith.prompts",
    "Head": "pyarith.types",
    "ablated": "pyarith.engine.ablation",
    "ablation_sweep": "pyarith.engine.sweep",
    "Ablation": "pyarith.ablation_result",
    "AblationSweep": "pyarith.ablation_result",
    "ZeroAblation": "pyarith.engine.baselines",
    "MeanAblation": "pyarith.engine.baselines",
    "ResampleAblation": "pyarith.engine.baselines",
    "boost": "pyarith.engine.boost",
    "stream_checkpoint": "pyarith.models.streaming",
    "SelectiveTuner": "pyarith.tuning",
    "TuneSettings": "pyarith.tuning",
    "precise_sft": "pyarith.tuning",
    "load_delta": "pyarith.tuning",
    "merge_delta": "pyarith.tuning",
    "DeltaBank": "pyarith.tuning",
    "load_demo": "pyarith.demo",
    "tasks": None,
    "analysis": None,
    "evaluation": None,
    "stats": None,
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyarith' has no attribute {name!r}; it has {sorted(_PUBLIC)}")
    module = _PUBLIC[name]
    value = (
        importlib.import_module(f"pyarith.{name}") if module is None else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
