"""What tells two batches, or two examples in them, apart: digests of everything that reaches the lower layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyarith.errors import InputTypeError, check

_DIGITS = 32  # of digests: 128 bits
_IGNORED = -100  # labels that do not count, as in transformers

# Arguments that change nothing below the first trained layer.
_LATE = {"use_cache", "return_dict", "labels", "shift_labels", "logits_to_keep", "num_items_in_batch"}
_REFUSED = {
    "past_key_values": "a key/value cache would miss the layers that did not run",
    "use_cache": "a key/value cache would miss the layers that did not run",
    "inputs_embeds": "give input_ids, by which states are found again",
    "output_hidden_states": "the states of the layers below are not computed again",
    "output_attentions": "the attention of the layers below is not computed again",
}


class Row(NamedTuple):
    """An example in a batch.

    Attributes:
        digest: of its tokens and their positions.
        stop: the columns before it have states that are those of these tokens wherever they come again.
    """

    digest: str
    stop: int


def refuse_arguments(given: Mapping[str, Any], config: Any) -> None:
    """Raise InputError for arguments of the decoder, or settings of its config, that the kept states cannot serve."""
    for name, reason in _REFUSED.items():
        value = given.get(name)
        if name.startswith("output_") and value is None:
            value = getattr(config, name, False)
        wanted = value is not None and value is not False
        check(
            not wanted,
            f"{name}: not possible while a PrefixCache serves the model, because {reason}; leave it out, or call the "
            "model outside the cache's with block",
        )
    ids = given.get("input_ids")
    check(
        isinstance(ids, Tensor) and ids.ndim == 2,
        f"input_ids: expected a tensor [batch, pos], got {list(ids.shape) if isinstance(ids, Tensor) else type(ids)}",
    )


def batch_digest(given: Mapping[str, Any], context: str) -> str:
    """Digest of all arguments that reach the lower layers, bit by bit, and of ``context``.

    Raises:
        InputTypeError: an argument whose equality cannot be told from its content.
    """
    digest = hashlib.sha256(context.encode())
    for name in sorted(_early(given)):
        _add(digest, name, given[name])
    return digest.hexdigest()[:_DIGITS]


def example_rows(given: Mapping[str, Any], context: str, labels: Any) -> tuple[Row, ...] | None:
    """One ``Row`` per example; None where the batch cannot be taken apart.

    That needs ids and at most a 2-D attention mask, whose real tokens are one run in each row, and 2-D positions.
    Padding behind the tokens is left out, so that the width of the batch does not count, but not where a label is
    predicted from it. Padding before them stays in: its last place predicts the first token.
    """
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert isinstance(ids, Tensor)
    batch, length = ids.shape
    plain = mask is None or _has_shape(mask, (batch, length))
    counted = positions is None or _has_shape(positions, (batch, length), (1, length))
    if _early(given) - {"input_ids", "attention_mask", "position_ids"} or not (plain and counted):
        return None
    tokens = ids.numpy(force=True).astype(np.int64)
    columns = np.arange(length) if positions is None else positions.numpy(force=True).astype(np.int64)
    places = np.broadcast_to(columns, (batch, length))
    real = np.ones((batch, length), bool) if mask is None else mask.numpy(force=True) != 0
    # transformers looks for several examples in one row only where no mask is given
    head = f"{context} {mask is None}".encode()
    rows = []
    for row in range(batch):
        found = np.flatnonzero(real[row])
        if len(found) == 0 or found[-1] - found[0] + 1 != len(found):
            return None
        before, stop = int(found[0]), length if found[0] else len(found)
        digest = hashlib.sha256(head + f"{before} {found[-1]};".encode())
        digest.update(tokens[row, :stop].tobytes())
        digest.update(places[row, :stop].tobytes())
        rows.append(Row(digest.hexdigest()[:_DIGITS], stop))
    return None if _predicts_from_padding(labels, rows, ids.shape) else tuple(rows)


def _predicts_from_padding(labels: Any, rows: Sequence[Row], shape: torch.Size) -> bool:
    if not isinstance(labels, Tensor) or labels.shape != shape or all(row.stop == shape[1] for row in rows):
        return False
    labelled = labels.numpy(force=True) != _IGNORED
    return any(
        labelled[number, row.stop + 1 :].any() for number, row in enumerate(rows)
    )  # place p predicts label p + 1


def _early(given: Mapping[str, Any]) -> set[str]:
    """Names of what reaches the lower layers; None is what is left out."""
    return {k for k, v in given.items() if v is not None and k not in _LATE and not k.startswith("output_")}


def _has_shape(value: Any, *shapes: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) in shapes


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{name} {value!r};".encode())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(digest, f"{name}.{key}", value[key])
    else:
        raise InputTypeError(
            f"{name}: expected a tensor, a number, a text, a dict of those, or None while a PrefixCache serves the "
            f"model, got {type(value).__name__}"
        )
