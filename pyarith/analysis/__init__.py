"""What key heads look at and what MLPs write: attention, cosines, logit lens, direct attribution, overlap."""

from pyarith.analysis.attention import AttentionMass, attention_mass
from pyarith.analysis.attribution import LogitAttribution, logit_attribution
from pyarith.analysis.lens import LogitLens, logit_lens
from pyarith.analysis.mlp_cosines import MlpCosines, ThreePoints, mlp_cosines, three_points
from pyarith.analysis.overlap import EffectOverlap, overlap

__all__ = [
    "AttentionMass",
    "EffectOverlap",
    "LogitAttribution",
    "LogitLens",
    "MlpCosines",
    "ThreePoints",
    "attention_mass",
    "logit_attribution",
    "logit_lens",
    "mlp_cosines",
    "overlap",
    "three_points",
]
