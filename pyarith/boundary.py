"""Where a prompt ends and its completion begins, in tokens."""

from __future__ import annotations

from collections.abc import Mapping

from pyarith.prompts import SPACES, Aligner

EncodedPair = tuple[list[int], list[int]]  # ids of the prompt, and of the whole


def encode_pairs(
    texts: Mapping[int, tuple[str, str]], aligner: Aligner, space: str | None = None
) -> tuple[str, dict[int, EncodedPair]]:
    """Encode prompts and what they are together with their completions.

    The completion has tokens of its own where the prompt's ids are how the whole begins; the caller checks that.

    Args:
        texts: any number -> (prompt, completion).
        aligner: with the tokenizer; end-of-text tokens that it puts behind every text by itself are taken off.
        space: the side of the space where they meet, a key of ``SPACES``, or "none" to join them just as they are;
            None = the first side that lets the prompt's tokens stay what they are in all pairs, or in most.
    Returns:
        (side of the space, number -> ids of the prompt and of the whole).
    """
    best: tuple[int, str, dict[int, EncodedPair]] = (-1, "", {})
    tail = _appended(aligner)
    for side in tuple(SPACES) if space is None else (space,):
        joined = {number: _joined(*pair, side) for number, pair in texts.items()}
        short, full = (
            [ids[: len(ids) - tail] for ids in aligner.encode([pair[part] for pair in joined.values()])]
            for part in (0, 1)
        )
        rows = dict(zip(joined, zip(short, full, strict=True), strict=True))
        fitting = sum(b[: len(a)] == a for a, b in rows.values())
        if fitting > best[0]:
            best = (fitting, side, rows)
        if fitting == len(texts):
            break
    return best[1], best[2]


def _joined(prompt: str, completion: str, side: str) -> tuple[str, str]:
    """(prompt, whole text) with one space where they meet, unless there is other white space."""
    if side == "none":
        return prompt, prompt + completion
    prompt, completion = prompt.rstrip(" "), completion.lstrip(" ")
    if prompt[-1:].isspace() or completion[:1].isspace():
        return prompt, prompt + completion
    tail, lead = SPACES[side]
    return prompt + tail, prompt + tail + lead + completion


def _appended(aligner: Aligner) -> int:
    """How many end-of-text tokens the tokenizer puts behind every text by itself."""
    end = aligner.tokenizer.eos_token_id
    return int(end is not None and aligner.encode(["a"])[0][-1:] == [end])
