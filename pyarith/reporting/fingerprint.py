"""Hashes that tell whether two runs had the same model and the same prompts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pyarith.models.fingerprint import model_fingerprint
from pyarith.prompts import PromptPairs

__all__ = ["data_hash", "model_fingerprint"]


def data_hash(pairs: PromptPairs) -> str:
    """``sha256:...`` of the token ids of clean and corrupted prompts and of the answers, row by row without padding."""
    digest = hashlib.sha256()
    rows = zip(pairs.clean, pairs.corrupted, pairs.lengths, pairs.answers, strict=True)
    for clean, corrupted, length, answer in rows:
        row: list[Any] = [clean[:length].tolist(), corrupted[:length].tolist(), int(answer)]
        digest.update(json.dumps(row).encode())
    return f"sha256:{digest.hexdigest()}"
