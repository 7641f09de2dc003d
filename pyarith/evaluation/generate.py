"""Greedy continuations in batches, by the model's own ``generate``: interventions such as ``ablated`` hold in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyarith.engine.guard import untouched
from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import length_limits, resolve
from pyarith.prompts import Aligner

_TAIL = 16  # tokens at the end of a continuation that are looked at for a stop text
# greedy, whatever the model's own generation settings say
_GREEDY: dict[str, Any] = {
    **{
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "use_cache": True,
        "return_dict_in_generate": False,
    },
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "temperature": None, "top_p": None, "top_k": None},
}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = ("\n",),
    batch_size: int = 16,
) -> list[str]:
    """What the model writes behind each prompt, always taking the most probable token.

    Prompts of like length go together, padded on the left and masked there; positions count from the first real token
    (``generate`` derives them from the mask); keys and values are cached. Equal to running each prompt alone, token by
    token, up to the rounding of batches. A prompt ends at the end-of-text token, at a stop text (which must not come
    first: blank text before the answer does not count), or after ``max_new_tokens``.

    Args:
        model: a supported Hugging Face causal LM; left unchanged. Inside ``pa.ablated(model, ...)`` the ablated model
            writes; baselines per prompt (``ResampleAblation``) do not fit, since the batches are made here.
        tokenizer: its tokenizer.
        prompts: encoded as the tokenizer does by itself, special tokens included.
        max_new_tokens: at most so many.
        stop: texts at which a continuation ends; they are cut off. Empty = none.
        batch_size: prompts at once.
    Returns:
        One text a prompt, in their order, without special tokens, prompt and stop text.
    Raises:
        InputError, InputTypeError: an argument is wrong; a prompt too long for the model is named.
        UnsupportedModelError: the model is not supported.
    Notes: where a tokenizer writes a space behind a decimal point (``0. 7``), a thousands comma or a minus sign when it
        decodes, these are taken out again between digits; text such as ``It is 5. 7 are left`` suffers with it.
    """
    sites = resolve(model)
    texts = list(prompts) if not isinstance(prompts, str) else []
    good = len(texts) > 0 and all(isinstance(text, str) and text for text in texts)
    check(good, f"prompts: expected a list of non-empty texts, got {prompts!r:.80}", InputTypeError)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        check(whole, f"{name}: expected a whole number >= 1, got {value!r}")
    listed = not isinstance(stop, str) and all(isinstance(text, str) and text for text in stop)
    check(listed, f"stop: expected a list of non-empty texts, got {stop!r}", InputTypeError)
    rows = Aligner(tokenizer).encode(texts)
    for what, limit in length_limits(sites):
        long = [number for number, ids in enumerate(rows) if len(ids) + max_new_tokens > limit]
        check(
            not long,
            f"prompts: expected at most {limit} tokens with {what}, {max_new_tokens} new ones included; prompts "
            f"{long[:8]} have more; shorten them or max_new_tokens",
        )
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    repair = _repair(tokenizer)
    written = [""] * len(rows)
    with untouched(model):
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            new = _continue(model, tokenizer, [rows[i] for i in chosen], max_new_tokens, tuple(stop), sites.device)
            for number, ids in zip(chosen, new, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                written[number] = repair(_cut(text, tuple(stop)).strip())
    return written


def _continue(
    model: Any, tokenizer: Any, rows: list[list[int]], limit: int, stop: tuple[str, ...], device: torch.device
) -> list[list[int]]:
    """The new tokens of each row, up to its end-of-text token."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    width = max(map(len, rows))
    ends = _end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)

    class AtText(StoppingCriteria):
        """Ends a row when its new text holds a stop text behind something that is not blank."""

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            tails = [self.seen(row) for row in input_ids[:, width:].tolist()]
            return torch.tensor(tails, dtype=torch.bool, device=input_ids.device)

        def seen(self, new: list[int]) -> bool:
            text = tokenizer.decode(new[-_TAIL:], skip_special_tokens=True)
            return any(mark in text.lstrip() for mark in stop)

    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=real,
            max_new_tokens=limit,
            pad_token_id=padding,
            eos_token_id=ends or None,
            stopping_criteria=StoppingCriteriaList([AtText()]) if stop else None,
            **_GREEDY,
        )
    return [_until(row, ends) for row in out[:, width:].tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The end-of-text tokens of the model's generation settings, else the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return [] if found is None else [int(token) for token in (found if isinstance(found, list | tuple) else [found])]


def _until(ids: list[int], ends: list[int]) -> list[int]:
    stops = [place for place, token in enumerate(ids) if token in ends]
    return ids[: stops[0]] if stops else ids


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop text, blank text at its beginning left aside."""
    text = text.lstrip()
    places = [place for place in (text.find(mark) for mark in stop) if place >= 0]
    return text[: min(places)] if places else text


def _repair(tokenizer: Any) -> Callable[[str], str]:
    """Takes out the spaces that this tokenizer puts into numbers when it decodes, and no others."""

    def spaced(text: str, split: str) -> bool:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == split

    rules = []
    for mark in ".,":
        if spaced(f"0{mark}7", f"0{mark} 7"):
            rules.append((rf"(?<=\d)\{mark} (?=\d)", mark))
        elif spaced(f"0{mark}7", f"0 {mark} 7"):
            rules.append((rf"(?<=\d) \{mark} (?=\d)", mark))
    if spaced("-7", "- 7"):
        rules.append((r"^- (?=\d)", "-"))

    def repair(text: str) -> str:
        for pattern, mark in rules:
            text = re.sub(pattern, mark, text)
        return text

    return repair


def first_choices(model: Any, pairs: Any, *, tokens: int = 2048) -> Tensor:
    """int64 [batch]: the most probable token behind each clean prompt, in batches of equal length without padding.

    Works inside ``pa.ablated`` as ``generate`` does.
    """
    sites = resolve(model)
    lengths = torch.as_tensor(pairs.lengths)
    out = torch.zeros(len(pairs), dtype=torch.int64)
    with untouched(model):
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero().flatten().split(max(1, tokens // length)):
                ids = torch.as_tensor(pairs.clean)[rows, :length].to(sites.device)
                last = sites.decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[:, -1]
                if not bool(last.isfinite().all()):
                    raise InputError(f"model: prompts {rows[:4].tolist()} give values that are not finite")
                out[rows] = sites.unembed(last).argmax(-1).cpu()
    return out
