"""Statistics of effects and accuracies on crossed prompts. Needs numpy only."""

from pyarith.stats.accuracies import AccuracyDifference, McNemar, accuracy_difference, mcnemar, wilson
from pyarith.stats.advice import (
    Advice,
    Components,
    components,
    prompts_for_rank,
    prompts_for_threshold,
    prompts_needed,
)
from pyarith.stats.bootstrap import Interval, bootstrap_mean
from pyarith.stats.clusters import Clusters
from pyarith.stats.confidence import Confidence, SenderConfidence, confidence
from pyarith.stats.controls import random_heads, same_layer_heads
from pyarith.stats.curves import CircuitAreas, circuit_areas, faithfulness
from pyarith.stats.families import HeadTypes, head_types
from pyarith.stats.overlap import Overlap, expected_jaccard, jaccard, overlap
from pyarith.stats.ranks import (
    AcrossGroups,
    RankCorrelation,
    SplitHalf,
    Spread,
    across_groups,
    rank_correlation,
    spearman,
    split_half,
)
from pyarith.stats.signs import SignFlip, adjust_together, benjamini_hochberg, sign_flip
from pyarith.stats.splits import ChoiceOfK, choose_k, folds, select_report

__all__ = [
    "AccuracyDifference",
    "AcrossGroups",
    "Advice",
    "ChoiceOfK",
    "CircuitAreas",
    "Clusters",
    "Components",
    "Confidence",
    "HeadTypes",
    "Interval",
    "McNemar",
    "Overlap",
    "RankCorrelation",
    "SenderConfidence",
    "SignFlip",
    "SplitHalf",
    "Spread",
    "accuracy_difference",
    "across_groups",
    "adjust_together",
    "benjamini_hochberg",
    "bootstrap_mean",
    "choose_k",
    "circuit_areas",
    "components",
    "confidence",
    "expected_jaccard",
    "faithfulness",
    "folds",
    "head_types",
    "jaccard",
    "mcnemar",
    "overlap",
    "prompts_for_rank",
    "prompts_for_threshold",
    "prompts_needed",
    "random_heads",
    "rank_correlation",
    "same_layer_heads",
    "select_report",
    "sign_flip",
    "spearman",
    "split_half",
    "wilson",
]
