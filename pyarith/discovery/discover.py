"""``discover``: patching on prompt pairs, together with what is needed to judge the numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pyarith.discovery.patching import fast_patch
from pyarith.engine import guard
from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import ModelSites, resolve
from pyarith.prompts import PromptPairs
from pyarith.result import PatchResult

_TOKENS = 2048  # tokens per forward pass when the model's answers are looked at


@dataclass(frozen=True)
class Discovery:
    """A patching result with its prompts and how well the model did on them.

    Attributes:
        pairs: the prompts that were patched.
        result: effects of all heads and MLPs on these prompts.
        correct: bool [batch], the answer is the intact model's first choice after the clean prompt.
        still_correct: bool [batch], it is so after the corrupted prompt too: there the corruption removes nothing.
        n_wrong: prompts answered wrongly among those that were given.
        n_left_out: of these, the ones left out (all with ``only_correct``, else none).
        seconds: wall-clock time of each step.
    """

    pairs: PromptPairs
    result: PatchResult
    correct: np.ndarray
    still_correct: np.ndarray
    n_wrong: int
    n_left_out: int
    seconds: dict[str, float] = field(default_factory=dict)

    def summary(self, threshold: float = -0.05) -> dict[str, Any]:
        """The numbers to print beside any ranking, ready for JSON.

        Probabilities and logits are means over the prompts; strength = P_clean(answer) - P_corrupted(answer).
        """
        result = self.result
        heads = result.head_effects
        return {
            "prompts": len(self.pairs),
            "wrong": self.n_wrong,
            "wrong_left_out": self.n_left_out,
            "misaligned_left_out": dict(self.pairs.settings.get("dropped", {})),
            "accuracy": float(self.correct.mean()),
            "corrupted_still_correct": float(self.still_correct.mean()),
            "p_clean": float(np.exp(result.clean_log_probs).mean()),
            "p_corrupted": float(np.exp(result.corrupted_log_probs).mean()),
            "strength": float(result.corruption_strength.mean()),
            "clean_logit": float(result.clean_logits.mean()),
            "corrupted_logit": float(result.corrupted_logits.mean()),
            "ratio_excluded": result.n_ratio_excluded,
            "noise_floor": float(result.noise_floor.max()),
            "verification_error": result.verification_error,
            "threshold": threshold,
            "heads": 0 if heads is None else int(heads.size),
            "key_heads": [str(head) for head in result.key_heads(threshold)] if heads is not None else [],
        }


def discover(model: Any, pairs: PromptPairs, *, only_correct: bool = False, **options: Any) -> Discovery:
    """Path patching of every head and MLP on ``pairs``, with the model's accuracy on them.

    Args:
        model: a supported Hugging Face causal LM; never changed.
        pairs: from ``pa.tasks.arithmetic`` or ``PromptPairs.from_text``.
        only_correct: leave out the prompts that the model answers wrongly, and count them.
        options: keyword arguments of ``fast_patch`` (``senders``, ``mlps``, ``memory_budget``, ``verify``, ...).
    Returns:
        A ``Discovery``.
    Raises:
        InputTypeError: ``pairs`` is something else.
        InputError: ``only_correct`` and every prompt is answered wrongly.
        Whatever ``fast_patch`` raises.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3.
    """
    given = isinstance(pairs, PromptPairs)
    check(given, f"pairs: expected PromptPairs, got {type(pairs).__name__}; see pa.tasks.arithmetic", InputTypeError)
    check(len(pairs) > 0, "pairs: expected at least one, got none")
    sites = resolve(model)
    start = time.perf_counter()
    correct, still = _answered(sites, pairs)
    middle = time.perf_counter()
    n_wrong = int((~correct).sum())
    kept = correct if only_correct else np.ones_like(correct)
    if not kept.any():
        raise InputError(
            f"only_correct: expected prompts that the model answers correctly, got none of {len(pairs)}; run without "
            f"it, or look at what the model answers to {pairs.prompts[0]!r}"
        )
    used = pairs if kept.all() else pairs.subset(kept)
    result = fast_patch(model, used, **options)
    return Discovery(
        pairs=used,
        result=result,
        correct=correct[kept],
        still_correct=still[kept],
        n_wrong=n_wrong,
        n_left_out=len(pairs) - len(used),
        seconds={"answers": middle - start, "patching": time.perf_counter() - middle},
    )


def _blocks(pairs: PromptPairs) -> Iterator[np.ndarray]:
    """Indices of prompts of equal length, so without padding, at most about ``_TOKENS`` tokens at a time."""
    for length in np.unique(pairs.lengths):
        rows = np.flatnonzero(pairs.lengths == length)
        blocks = -(-2 * len(rows) * int(length) // _TOKENS)
        yield from np.array_split(rows, min(len(rows), blocks))


def _answered(sites: ModelSites, pairs: PromptPairs) -> np.ndarray:
    """bool [2, batch], clean and corrupted: is the answer the first choice at END? (A softcap changes no order.)"""
    right = np.zeros((2, len(pairs)), bool)
    with guard.untouched(sites.model):
        for rows in _blocks(pairs):
            both = np.concatenate([pairs.clean[rows], pairs.corrupted[rows]])
            ids = torch.tensor(both[:, : pairs.lengths[rows[0]]], device=sites.device)
            end = sites.decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[:, -1]
            choices = sites.unembed(end).argmax(-1).cpu().numpy().reshape(2, -1)
            right[:, rows] = choices == pairs.answers[rows]
    return right
