"""Which model this is: config, names, shapes and dtypes of all tensors, and samples of their values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from pyarith.models.adapters import adapter_state
from pyarith.models.placement import offloaded_tensors
from pyarith.models.quantised import stored_tensors
from pyarith.models.sites import STREAM

_SAMPLES = 64  # values looked at per tensor: enough to notice training, cheap on any size
# config keys that may differ for the same model: a model that was never saved has no "architectures"; trainers switch
# the key/value cache off and set special tokens; what else is returned beside the logits is a matter of the call
_NOT_THE_MODEL = (
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states", "return_dict"),
)
_SHORT = 8  # hex digits of a tensor's own digest


@dataclass(frozen=True)
class Identity:
    """What tells a model from others.

    Where the model lies (folder, device) does not count, nor does an attached ``SelectiveTuner``. Not a proof of
    equality: a change of single values between the sampled ones goes unseen.

    Attributes:
        kind: class of the model.
        config: its settings, without those that leave the model what it is, as JSON holds them.
        tensors: name -> digest of name, shape, dtype and 64 values spread over the tensor, in order of names.
        fingerprint: ``sha256:...`` of all that.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, str]
    fingerprint: str


def identify(model: torch.nn.Module) -> Identity:
    """The ``Identity`` of a model with a config."""
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    kept = {key: value for key, value in config.items() if key[:1] != "_" and key not in _NOT_THE_MODEL}
    text = json.dumps(kept, sort_keys=True, default=str)
    adapters = adapter_state(model)  # which of them are active stands in no tensor
    described = type(model).__name__ + text + (repr(adapters) if adapters else "")
    whole = hashlib.sha256(described.encode())
    stream: Any = getattr(model, STREAM, None)  # of weights that stay in their files, and are cast on their way
    held: dict[str, torch.Tensor] = stored_tensors(model) | (
        offloaded_tensors(model) if stream is None else stream.sources
    )
    tensors = {}
    for name, tensor in sorted(held.items()):
        dtype = tensor.dtype if stream is None or not tensor.is_floating_point() else stream.dtype
        seen = f"{name} {tuple(tensor.shape)} {dtype}".encode()
        if tensor.numel():
            places = torch.linspace(0, tensor.numel() - 1, min(_SAMPLES, tensor.numel()), dtype=torch.float64).long()
            values = tensor.detach().reshape(-1)[places.to(tensor.device)].cpu().to(dtype)
            seen += values.view(torch.uint8).numpy().tobytes()
        whole.update(seen)
        tensors[name] = hashlib.sha256(seen).hexdigest()[:_SHORT]
    return Identity(type(model).__name__, json.loads(text), tensors, f"sha256:{whole.hexdigest()}")


def model_fingerprint(model: torch.nn.Module) -> str:
    """``sha256:...`` of ``identify``: the same for the same model."""
    return identify(model).fingerprint
