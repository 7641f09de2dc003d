"""What a run leaves on disk: a run directory with its record, tables, tensors and pictures, and the steps after it."""

from pyarith.reporting.fingerprint import data_hash, model_fingerprint
from pyarith.reporting.judgement import Judgement, judge
from pyarith.reporting.rundir import RunDirectory
from pyarith.reporting.saved import SavedRun
from pyarith.reporting.steps import Step
from pyarith.reporting.versions import versions

__all__ = ["Judgement", "RunDirectory", "SavedRun", "Step", "data_hash", "judge", "model_fingerprint", "versions"]
