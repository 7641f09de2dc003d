"""Conversations as training examples: which tokens of a chat template's text are the assistant's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Refusal:
    """Why a conversation cannot be used: a key of ``data.BAD``, and what the template said."""

    reason: str
    words: str = ""


def chat_example(tokenizer: Any, messages: Any) -> tuple[list[int], np.ndarray] | Refusal:
    """(ids, bool [pos] True on the assistant's tokens) of one conversation.

    The tokens of an assistant's message are what the template adds to the messages before it and its own opening of an
    answer; these must be how the whole begins, which is checked.

    Args:
        tokenizer: one with a chat template.
        messages: a list of ``{"role": text, "content": text}``.
    """
    if not isinstance(messages, list | tuple):
        return Refusal("not_text")
    for one in messages:
        known = isinstance(one, Mapping) and isinstance(one.get("role"), str)
        if not known or not isinstance(one.get("content"), str):
            return Refusal("not_text")
    turns = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    if not turns:
        return Refusal("no_assistant")
    if any(not messages[place]["content"].strip() for place in turns):
        return Refusal("empty_completion")
    if turns[0] == 0:
        return Refusal("empty_prompt")
    try:
        whole = _written(tokenizer, messages, False)
        trained = np.zeros(len(whole), bool)
        for place in turns:
            before = _written(tokenizer, messages[:place], True)
            through = _written(tokenizer, messages[: place + 1], False)
            if through[: len(before)] != before or whole[: len(through)] != through:
                return Refusal("rewritten")
            trained[len(before) : len(through)] = True
    except Exception as error:  # what a template raises is its author's choice
        return Refusal("template", " ".join(str(error).split())[:120] or type(error).__name__)
    return whole, trained


def _written(tokenizer: Any, messages: Any, opening: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=opening, return_dict=False)
    return list(ids)
