"""Logit lens at END: what the residual stream says before and after each MLP, and what each MLP promotes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyarith.analysis.inputs import TOKENS, Array, read_prompts, read_tokens
from pyarith.analysis.states import end_states, frame
from pyarith.engine import guard
from pyarith.engine.readout import split
from pyarith.errors import check
from pyarith.models.sites import ModelSites, resolve

STAGES = ("before", "after")
_LOGITS = 2**24  # logits held at a time (64 MiB in fp32)


@dataclass(frozen=True, repr=False)
class LogitLens:
    """What final norm and unembedding make of the residual stream at END, before and after each MLP.

    The stream "after" MLP l is the block's output; "before" is that without the MLP's write, so in a serial block what
    the MLP reads, in a parallel one the block's input plus the attention's write. The last "after" are the model's own
    logits. Axis stage: 0 before, 1 after. Probabilities are over the whole vocabulary, after the final softcap.

    Attributes:
        tokens: int64 [n_layers, stage, batch, k] ids of the k largest logits, largest first.
        probabilities: [n_layers, stage, batch, k] theirs; fp32, fp64 for fp64 models.
        promoted: int64 [n_layers, batch, k] ids whose logit rises most from before to after, most first.
        promoted_by: [n_layers, batch, k] by how much (can be negative where all logits fall).
        answer_ranks: int64 [n_layers, stage, batch] number of tokens with a larger logit than the answer's, or None
            where no answers were given.
        answer_probabilities: [n_layers, stage, batch], or None.
        settings: model, number of prompts, k.
    """

    tokens: Array
    probabilities: Array
    promoted: Array
    promoted_by: Array
    answer_ranks: Array | None = None
    answer_probabilities: Array | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self, tokenizer: Any = None) -> Iterator[dict[str, Any]]:
        """The table of ``to_dataframe`` as dictionaries."""
        for layer, stage, prompt, rank in np.ndindex(*self.tokens.shape):
            row: dict[str, Any] = {"layer": layer, "stage": STAGES[stage], "prompt": prompt, "rank": rank}
            row["token"] = int(self.tokens[layer, stage, prompt, rank])
            if tokenizer is not None:
                row["text"] = tokenizer.decode([row["token"]])
            yield row | {"probability": float(self.probabilities[layer, stage, prompt, rank])}

    def to_dataframe(self, tokenizer: Any = None) -> Any:
        """One row per layer, stage, prompt and rank: token, its text where a tokenizer is given, probability."""
        return frame(self.rows(tokenizer))

    def table(self, prompt: int = 0, tokenizer: Any = None) -> str:
        """The lens of one prompt as text: per layer the top tokens before and after the MLP, and what it promotes.

        Raises:
            InputError: there is no such prompt.
        """
        batch = self.tokens.shape[2]
        check(0 <= prompt < batch, f"prompt: expected 0 to {batch - 1}, got {prompt}")

        def shown(ids: Array, values: Array, form: str) -> str:
            texts = [repr(tokenizer.decode([int(i)])) if tokenizer is not None else str(i) for i in ids]
            return "  ".join(f"{text} {value:{form}}" for text, value in zip(texts, values, strict=True))

        lines = []
        for layer in range(len(self.tokens)):
            for stage, name in enumerate(STAGES):
                top = self.tokens[layer, stage, prompt], self.probabilities[layer, stage, prompt]
                lines.append(f"{layer:>4} {name:<9} {shown(*top, '.3f')}")
            up = self.promoted[layer, prompt], self.promoted_by[layer, prompt]
            lines.append(f"{layer:>4} promoted  {shown(*up, '+.2f')}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        layers, _, batch, k = self.tokens.shape
        lines = [f"LogitLens: {batch} prompts, {layers} layers, top {k}; .table(prompt, tokenizer) shows one prompt"]
        if self.answer_ranks is not None and self.answer_probabilities is not None:
            lines.append("  layer   P(answer) before, after   median rank before, after")
            for layer in range(layers):
                p = self.answer_probabilities[layer].mean(-1)
                rank = np.median(self.answer_ranks[layer], -1)
                lines.append(f"{layer:>7}         {p[0]:>8.4f} {p[1]:>8.4f}           {rank[0]:>8g} {rank[1]:>8g}")
        return "\n".join(lines)


def logit_lens(
    model: Any,
    prompts: Any,
    *,
    attention_mask: Any = None,
    answers: Any = None,
    k: int = 10,
    tokens_per_pass: int = TOKENS,
) -> LogitLens:
    """Top tokens of the residual stream at END before and after each MLP.

    logits = softcap(scale * unembed(final_norm(stream))), by the model's own final norm and unembedding.

    Args:
        model: a supported Hugging Face causal LM; never changed.
        prompts: ``PromptPairs`` (the clean prompts and their answers are used), or int64 [batch, pos].
        attention_mask: [batch, pos] for ids that are not ``PromptPairs``; padding at either side.
        answers: int64 [batch] for ids that are not ``PromptPairs``; None leaves ranks and probabilities out.
        k: how many tokens to keep per layer, stage and prompt.
        tokens_per_pass: about how many tokens go through the model at a time.
    Returns:
        ``LogitLens``.
    Raises:
        InputError, InputTypeError: ``k`` is larger than the vocabulary, bad ids, mask or answers.
        UnsupportedModelError: not a supported model.
    Notes: at most 2**24 logits are held at a time. Equal logits are ordered by torch.topk.
    References: nostalgebraist 2020, "interpreting GPT: the logit lens"; Zhang et al. 2024, arXiv:2409.01659, sec. 3.
    """
    sites, tokens = resolve(model), read_tokens(tokens_per_pass)
    whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
    check(whole and 1 <= k <= sites.d_vocab, f"k: expected 1 to {sites.d_vocab}, the size of the vocabulary, got {k!r}")
    given = read_prompts(sites, prompts, attention_mask, answers)
    wide = torch.float64 if sites.row_dtype == torch.float64 else torch.float32
    layers, n = sites.n_layers, len(given)
    ids = torch.zeros(layers, 2, n, k, dtype=torch.int64)
    probabilities = torch.zeros(layers, 2, n, k, dtype=wide)
    promoted, promoted_by = torch.zeros(layers, n, k, dtype=torch.int64), torch.zeros(layers, n, k, dtype=wide)
    ranks, answer_probabilities = torch.zeros(layers, 2, n, dtype=torch.int64), torch.zeros(layers, 2, n, dtype=wide)
    with guard.untouched(sites.model):
        for indices, states in end_states(sites, given, _WANT[sites.parallel], tokens):
            before = states["pre"] + states["attn_write"] if sites.parallel else states["mlp_in"]
            streams = torch.stack([before, states["post"]], 1)  # [n_layers, stage, block, d_model]
            for layer in range(layers):
                for low, high in split(len(indices), max(1, _LOGITS // (2 * sites.d_vocab))):
                    rows = indices[low:high]
                    logits = _logits(sites, streams[layer, :, low:high])
                    total = logits.logsumexp(-1, keepdim=True)
                    top = logits.topk(k)
                    ids[layer, :, rows] = top.indices.cpu()
                    probabilities[layer, :, rows] = (top.values - total).exp().cpu()
                    up = (logits[1] - logits[0]).topk(k)
                    promoted[layer, rows], promoted_by[layer, rows] = up.indices.cpu(), up.values.cpu()
                    if given.answers is not None:
                        own = given.answers[rows].to(logits.device).expand(2, -1)[..., None]
                        answer = logits.gather(-1, own)
                        ranks[layer, :, rows] = (logits > answer).sum(-1).cpu()
                        answer_probabilities[layer, :, rows] = (answer - total).exp()[..., 0].cpu()
    known = given.answers is not None
    return LogitLens(
        tokens=ids.numpy(),
        probabilities=probabilities.numpy(),
        promoted=promoted.numpy(),
        promoted_by=promoted_by.numpy(),
        answer_ranks=ranks.numpy() if known else None,
        answer_probabilities=answer_probabilities.numpy() if known else None,
        settings={"model": sites.spec.name, "prompts": n, "k": int(k)},
    )


_WANT = {False: ("mlp_in", "post"), True: ("pre", "attn_write", "post")}


def _logits(sites: ModelSites, streams: Tensor) -> Tensor:
    """The model's logits of residual streams in its own dtype: [..., d_model] -> [..., d_vocab] in row dtype."""
    return sites.logits_of(sites.unembed(sites.final_norm(streams)).to(sites.row_dtype))
