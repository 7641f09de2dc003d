"""``discover``: patching on prompt pairs, together with what is needed to judge the numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyarith.discovery.adaptive import TopHeads, find_top
from pyarith.discovery.patching import fast_patch
from pyarith.engine import guard
from pyarith.engine.ranks import common, team
from pyarith.engine.store import Part, Store, circumstances, digest
from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import ModelSites, resolve
from pyarith.models.streaming import opened
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
        n_wrong: prompts answered wrongly among those that were given (with ``top_k`` and without ``only_correct``:
            among those that were needed).
        n_left_out: of these, the ones left out (all with ``only_correct``, else none).
        seconds: wall-clock time of each step.
        top: with ``top_k``, the top heads and how sure they are; then ``pairs`` are the prompts that were needed.
    """

    pairs: PromptPairs
    result: PatchResult
    correct: np.ndarray
    still_correct: np.ndarray
    n_wrong: int
    n_left_out: int
    seconds: dict[str, float] = field(default_factory=dict)
    top: TopHeads | None = None

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


@team()
def discover(
    model: Any,
    pairs: PromptPairs,
    *,
    only_correct: bool = False,
    top_k: int | None = None,
    confidence: float = 0.95,
    tolerance: float | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    **options: Any,
) -> Discovery:
    """Path patching of every head and MLP on ``pairs``, with the model's accuracy on them.

    With ``top_k`` the heads are raced for the k most negative mean changes of the answer's logit (patched minus
    identity row, sign kept; mean over operand pairs, or items, of their mean over prompts). Prompts come in rounds, in
    a random order of the operand pairs; after each round the heads that are surely in or surely out are run no more.
    It ends when all are decided or the prompts are spent. All decisions are right together with the stated confidence,
    asymptotically in the number of operand pairs (confidence sequences, corrected over heads: ``pyarith.stats.race``);
    a head that acts on fewer than about a tenth of the pairs may be judged by the others. MLPs are not run.

    Args:
        model: a supported Hugging Face causal LM, never changed, or the folder of its checkpoint
            (``stream_checkpoint``).
        pairs: from ``pa.tasks.arithmetic`` or ``PromptPairs.from_text``.
        only_correct: leave out the prompts that the model answers wrongly, and count them.
        top_k: number of heads to find; None runs all heads and MLPs on all prompts.
        confidence, tolerance, seed: only with ``top_k``: of all decisions together; heads whose mean changes differ by
            no more logits than the tolerance count as ties (None: the noise floor of the run); of the order.
        resume: a folder in which finished blocks of prompts are kept, as in ``fast_patch``.
        options: keyword arguments of ``fast_patch`` (``senders``, ``mlps``, ``memory_budget``, ``verify``, ...).
    Under torchrun every rank makes the same call, and all return the whole result; see ``fast_patch``.

    Returns:
        A ``Discovery``.
    Raises:
        InputTypeError: ``pairs`` is something else.
        InputError: ``only_correct`` and every prompt is answered wrongly; ``top_k`` with prompts that have no operand
            pairs or items, or fewer than 5; a wrong ``top_k``, ``confidence`` or ``tolerance``.
        Whatever ``fast_patch`` raises.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3; Waudby-Smith et al. 2021, arXiv:2103.06476.
    """
    given = isinstance(pairs, PromptPairs)
    check(given, f"pairs: expected PromptPairs, got {type(pairs).__name__}; see pa.tasks.arithmetic", InputTypeError)
    check(len(pairs) > 0, "pairs: expected at least one, got none")
    model = opened(model)
    sites = resolve(model, spread=True)
    check(top_k is not None or tolerance is None, f"tolerance: expected None without top_k, got {tolerance!r}")
    parts = Store(resume).under(lambda: ["answers", circumstances(sites)])
    start = time.perf_counter()
    at_once = only_correct or top_k is None  # else only the prompts that the race needed are looked at, after it
    correct, still = _answered(sites, pairs, parts) if at_once else np.ones((2, len(pairs)), bool)
    middle = time.perf_counter()
    kept = correct if only_correct else np.ones_like(correct)
    if not kept.any():
        raise InputError(
            f"only_correct: expected prompts that the model answers correctly, got none of {len(pairs)}; run without "
            f"it, or look at what the model answers to {pairs.prompts[0]!r}"
        )
    used = pairs if kept.all() else pairs.subset(kept)
    n_wrong, n_left_out = int((~correct).sum()), len(pairs) - len(used)
    correct, still, top = correct[kept], still[kept], None
    if top_k is None:
        result = fast_patch(model, used, resume=resume, **options)
    else:
        shape = sites.n_layers, sites.n_heads
        race: dict[str, Any] = {"confidence": confidence, "tolerance": tolerance, "seed": seed}
        top, result, order = find_top(model, used, shape, top_k, **race, resume=resume, **options)
        used, correct, still = used.subset(order), correct[order], still[order]
    patched = time.perf_counter()
    if not at_once:
        correct, still = _answered(sites, used, parts)
        n_wrong = int((~correct).sum())
    return Discovery(
        pairs=used,
        result=result,
        correct=correct,
        still_correct=still,
        n_wrong=n_wrong,
        n_left_out=n_left_out,
        seconds={"answers": middle - start + time.perf_counter() - patched, "patching": patched - middle},
        top=top,
    )


def _blocks(pairs: PromptPairs) -> Iterator[np.ndarray]:
    """Indices of prompts of equal length, so without padding, at most about ``_TOKENS`` tokens at a time."""
    for length in np.unique(pairs.lengths):
        rows = np.flatnonzero(pairs.lengths == length)
        blocks = -(-2 * len(rows) * int(length) // _TOKENS)
        yield from np.array_split(rows, min(len(rows), blocks))


def _answered(sites: ModelSites, pairs: PromptPairs, parts: Store) -> np.ndarray:
    """bool [2, batch], clean and corrupted: is the answer the first choice at END? (A softcap changes no order.)"""
    blocks = list(_blocks(pairs))

    def compute(number: int) -> Part:
        rows = blocks[number]
        both = np.concatenate([pairs.clean[rows], pairs.corrupted[rows]])[:, : pairs.lengths[rows[0]]]
        found = parts.get(both)
        if found is None:
            ids = torch.tensor(both, device=sites.device)
            end = sites.decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[:, -1]
            found = Part({"choices": sites.unembed(end).argmax(-1).cpu().numpy().reshape(2, -1)}, {})
            parts.put((both,), found.arrays)
        return found

    right = np.zeros((2, len(pairs)), bool)
    with team() as ranks, guard.untouched(sites.model):
        data = pairs.clean, pairs.corrupted, pairs.lengths, pairs.answers
        ranks.same(lambda: {**common(sites), "data": digest([np.asarray(one) for one in data])[:12]})
        for number, part in ranks.share(len(blocks), compute):
            right[:, blocks[number]] = part.arrays["choices"] == pairs.answers[blocks[number]]
    return right
