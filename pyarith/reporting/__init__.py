"""What a run leaves on disk: a run directory with its record, tables, tensors and pictures."""

from pyarith.reporting.fingerprint import data_hash, model_fingerprint
from pyarith.reporting.rundir import RunDirectory, versions

__all__ = ["RunDirectory", "data_hash", "model_fingerprint", "versions"]
