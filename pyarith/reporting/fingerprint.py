"""Hashes that tell whether two runs had the same model and the same prompts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from pyarith.prompts import PromptPairs

_SAMPLES = 64  # values looked at per tensor: enough to notice training, cheap on any size
# config keys that may differ for the same model; a model that was never saved has no "architectures"
_NOT_THE_MODEL = ("architectures", "transformers_version", "dtype", "torch_dtype")


def model_fingerprint(model: torch.nn.Module) -> str:
    """``sha256:...`` of config, names, shapes and dtypes of all tensors, and of 64 values spread over each.

    Where the model lies (folder, device) does not count. Not a proof of equality: a change of single values between
    the sampled ones goes unseen.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    kept = {key: value for key, value in config.items() if key[:1] != "_" and key not in _NOT_THE_MODEL}
    digest.update(type(model).__name__.encode())
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            places = torch.linspace(0, tensor.numel() - 1, min(_SAMPLES, tensor.numel()), dtype=torch.float64).long()
            values = tensor.detach().reshape(-1)[places.to(tensor.device)].cpu()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def data_hash(pairs: PromptPairs) -> str:
    """``sha256:...`` of the token ids of clean and corrupted prompts and of the answers, row by row without padding."""
    digest = hashlib.sha256()
    rows = zip(pairs.clean, pairs.corrupted, pairs.lengths, pairs.answers, strict=True)
    for clean, corrupted, length, answer in rows:
        row: list[Any] = [clean[:length].tolist(), corrupted[:length].tolist(), int(answer)]
        digest.update(json.dumps(row).encode())
    return f"sha256:{digest.hexdigest()}"
