"""Clean and corrupted prompts with their one-token answers, checked token by token.

`PromptPairs` is what the analyses run on: ids, roles of tokens and strata of prompts, made by
`PromptPairs.from_text` for any behaviour or by `pyarith.tasks` for the behaviours that come with the package.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pyarith.errors import AlignmentError, InputTypeError, check

Span = tuple[int, int]
ROLES = ("other", "operand_a", "operand_b", "operator", "special")
MISALIGNED = ("raise", "drop")
SPACES = {"answer": ("", " "), "prompt": (" ", "")}  # what is put behind the prompt, and before the answer
REASONS = {
    "answer_not_one_token": "the answer is not one token",
    "answer_unknown": "the tokenizer does not know the answer",
    "same_answer": "the corrupted prompt has the same answer",
    "length_differs": "clean and corrupted have different numbers of tokens",
    "no_difference": "clean and corrupted are the same",
    "differs_outside_span": "clean and corrupted differ outside the replaced part",
}


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """A batch of aligned prompt pairs.

    Args:
        prompts, corrupted_prompts: the texts as they were encoded (with the trailing space, where the answer's
            space went to the prompt).
        answer_texts: the answers without their space.
        clean, corrupted: int64 [batch, pos], right-padded with 0.
        attention_mask: bool [batch, pos], True on real tokens; the same for clean and corrupted.
        answers: int64 [batch].
        roles: int8 [batch, pos], index into `role_names`, -1 on padding; None where no spans were given.
        strata: name -> array [batch], what the prompts may be grouped by.
        settings: how the batch was made, with what was left out by reason.
        role_names: names of the role codes.
        index: int64 [batch], the place of each pair in the batch that this one was taken from.
    """

    prompts: tuple[str, ...]
    corrupted_prompts: tuple[str, ...]
    answer_texts: tuple[str, ...]
    clean: np.ndarray
    corrupted: np.ndarray
    attention_mask: np.ndarray
    answers: np.ndarray
    roles: np.ndarray | None = None
    strata: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    role_names: tuple[str, ...] = ROLES
    index: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # filled in when left out

    def __post_init__(self) -> None:
        batch = len(self.prompts)
        if batch and not self.index.size:
            object.__setattr__(self, "index", np.arange(batch, dtype=np.int64))
        shape = self.clean.shape
        per_token = {"corrupted": self.corrupted, "attention_mask": self.attention_mask, "roles": self.roles}
        for name, array in per_token.items():
            fits = array is None or array.shape == shape
            check(fits, f"{name}: expected shape {shape} like clean, got {_shape(array)}")
        per_pair = {"answers": self.answers, "index": self.index, **self.strata}
        for name, array in per_pair.items():
            check(array.shape[:1] == (batch,), f"{name}: expected {batch} entries, one a prompt, got {_shape(array)}")
        for name, texts in (("corrupted_prompts", self.corrupted_prompts), ("answer_texts", self.answer_texts)):
            check(len(texts) == batch, f"{name}: expected {batch} texts, one a prompt, got {len(texts)}")
        check(shape[0] == batch, f"clean: expected {batch} rows, one a prompt, got {shape[0]}")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int64 [batch]."""
        return self.attention_mask.sum(1)

    def inputs(self, device: Any = None) -> dict[str, Any]:
        """The arguments of `fast_patch(model, **pairs.inputs())`.

        Returns:
            `clean`, `corrupted` int64 [batch, pos], `answers` int64 [batch] and the two attention masks, int64
            [batch, pos] or None where nothing is padded, as torch tensors on `device`.
        """
        import torch

        padding = not self.attention_mask.all()
        mask = torch.tensor(self.attention_mask, dtype=torch.int64, device=device) if padding else None
        return {
            "clean": torch.tensor(self.clean, device=device),
            "corrupted": torch.tensor(self.corrupted, device=device),
            "answers": torch.tensor(self.answers, device=device),
            "attention_mask": mask,
            "corrupted_attention_mask": mask,
        }

    def subset(self, indices: Any) -> PromptPairs:
        """The pairs at `indices` (integers or a bool array), trimmed to their longest prompt.

        Raises:
            InputError: an index is out of range, or a bool array has another length.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            check(chosen.shape == (len(self),), f"indices: expected {len(self)} bools, got {_shape(chosen)}")
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64).reshape(-1)
        inside = (chosen >= -len(self)) & (chosen < len(self))
        check(bool(inside.all()), f"indices: expected -{len(self)} to {len(self) - 1}, got {chosen[~inside].tolist()}")
        width = int(self.lengths[chosen].max(initial=0))
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[i] for i in chosen),
            corrupted_prompts=tuple(self.corrupted_prompts[i] for i in chosen),
            answer_texts=tuple(self.answer_texts[i] for i in chosen),
            clean=self.clean[chosen, :width],
            corrupted=self.corrupted[chosen, :width],
            attention_mask=self.attention_mask[chosen, :width],
            answers=self.answers[chosen],
            roles=None if self.roles is None else self.roles[chosen, :width],
            strata={name: values[chosen] for name, values in self.strata.items()},
            index=self.index[chosen],
        )

    def buckets(self) -> list[PromptPairs]:
        """Batches of equal length without padding, shortest first; `.index` says where each pair was."""
        whole = dataclasses.replace(self, index=np.arange(len(self), dtype=np.int64))
        return [whole.subset(self.lengths == length) for length in np.unique(self.lengths)]

    def __repr__(self) -> str:
        if not len(self):
            return "PromptPairs(0 pairs)"
        known = [f"{key} {self.settings[key]!r}" for key in ("operator", "corruption") if key in self.settings]
        dropped = sum(self.settings.get("dropped", {}).values())
        lines = [
            ", ".join([f"PromptPairs({len(self)} pairs", *known, f"{self.lengths.min()}-{self.lengths.max()} tokens"])
            + f", {dropped} left out)"
        ]
        for row in range(min(3, len(self))):
            lines.append(f"  {self.prompts[row]!r} -> {self.answer_texts[row]!r}   {self.corrupted_prompts[row]!r}")
        return "\n".join(lines + ["  ..."] * (len(self) > 3))

    @classmethod
    def from_text(
        cls,
        prompts: Sequence[str],
        corrupted: Sequence[str],
        answers: Sequence[str],
        tokenizer: Any,
        *,
        on_misaligned: str = "raise",
        corrupted_answers: Sequence[str] | None = None,
        replaced: Sequence[Sequence[Span]] | None = None,
        roles: Sequence[Mapping[str, Any]] | None = None,
        strata: Mapping[str, Sequence[Any]] | None = None,
        space: str | None = None,
    ) -> PromptPairs:
        """Encode and check prompt pairs of any behaviour.

        encode(prompt + answer) == encode(prompt) + [answer], clean and corrupted of equal length and
        different only inside the replaced span.

        Args:
            prompts, corrupted: the texts, without the space before the answer.
            answers: the answers' texts; a space in front is ignored, where it goes is found out.
            tokenizer: any Hugging Face tokenizer; its special tokens are added as it does by default.
            on_misaligned: `"raise"`, or `"drop"` to leave pairs out and count them in `settings`.
            corrupted_answers: where given, each must differ from the answer.
            replaced: per prompt the character spans `(start, end)` in which clean and corrupted may differ;
                None takes the part between their common beginning and their common end.
            roles: per prompt a mapping of role name to one span or several; other tokens are `"other"`, the
                tokenizer's own `"special"`.
            strata: name -> one value per prompt.
            space: `"answer"` or `"prompt"` fixes where the space before the answer goes; None tries both.
        Raises:
            AlignmentError: a pair breaks a rule (with `"raise"`), or none is left; names the prompts.
            InputError: lengths differ, nothing is given, `on_misaligned` is unknown.
            InputTypeError: `tokenizer` is not a Hugging Face tokenizer, or a text is not a string.
        """
        check(on_misaligned in MISALIGNED, f"on_misaligned: expected one of {MISALIGNED}, got {on_misaligned!r}")
        columns = {"prompts": prompts, "corrupted": corrupted, "answers": answers}
        columns |= {} if corrupted_answers is None else {"corrupted_answers": corrupted_answers}
        columns = {name: _texts(name, texts) for name, texts in columns.items()}
        sizes = {name: len(texts) for name, texts in columns.items()}
        sizes |= {name: len(rows) for name, rows in (("replaced", replaced), ("roles", roles)) if rows is not None}
        check(len(set(sizes.values())) == 1, f"expected one entry a prompt in each argument, got {sizes}")
        check(sizes["prompts"] > 0, "prompts: expected at least one, got none")
        check(space is None or space in SPACES, f"space: expected None or one of {tuple(SPACES)}, got {space!r}")
        aligned = Aligner(tokenizer).align(**columns, replaced=replaced, space=space)
        columns_of_strata = {name: _column(name, values, sizes["prompts"]) for name, values in (strata or {}).items()}
        kept = np.array([row for row, reason in enumerate(aligned.reasons) if reason is None], dtype=np.int64)
        _report(aligned, columns, kept, on_misaligned)
        names = tuple(dict.fromkeys([*ROLES, *(name for spans in roles or () for name in spans)]))
        clean = [aligned.clean[row] for row in kept]
        codes = None if roles is None else [aligned.roles(row, roles[row], names) for row in kept]
        return cls(
            prompts=tuple(aligned.prompts[row] for row in kept),
            corrupted_prompts=tuple(aligned.corrupted_prompts[row] for row in kept),
            answer_texts=tuple(columns["answers"][row] for row in kept),
            clean=_padded(clean, 0, np.int64),
            corrupted=_padded([aligned.corrupted[row] for row in kept], 0, np.int64),
            attention_mask=_padded([[1] * len(ids) for ids in clean], 0, bool),
            answers=np.array([aligned.answers[row] for row in kept], dtype=np.int64),
            roles=None if codes is None else _padded(codes, -1, np.int8),
            strata={name: values[kept] for name, values in columns_of_strata.items()},
            settings={
                "space_answer": aligned.space,
                "on_misaligned": on_misaligned,
                **count_dropped(aligned.reasons, columns_of_strata.get("template")),
            },
            role_names=names,
            index=kept,
        )


@dataclass(frozen=True)
class Alignment:
    """What the tokenizer makes of prompt pairs, row by row; `reasons` holds None or the rule that is broken."""

    space: str
    prompts: list[str]
    corrupted_prompts: list[str]
    clean: list[list[int]]
    corrupted: list[list[int]]
    answers: list[int]
    reasons: list[str | None]
    aligner: Aligner

    def roles(self, row: int, spans: Mapping[str, Any], names: tuple[str, ...]) -> list[int]:
        """The role code of each token of a clean prompt."""
        ids = self.clean[row]
        codes = [names.index("special" if token in self.aligner.special else "other") for token in ids]
        for name, given in spans.items():
            for span in _spans(given):
                places = self.aligner.places(self.prompts[row], ids, span)
                while len(places) > 1 and self.aligner.blank(ids[places[0]]):  # the mark of a word's beginning
                    places = places[1:]
                for place in places:
                    codes[place] = names.index(name)
        return codes


class Aligner:
    """Checks prompt pairs against the alignment rules with one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer. Token positions come from its offset mapping; one without (a slow
            tokenizer) is asked to encode the beginnings of the prompt instead.
    Raises:
        InputTypeError: `tokenizer` is something else.
    """

    def __init__(self, tokenizer: Any) -> None:
        known = callable(tokenizer) and all(hasattr(tokenizer, name) for name in ("encode", "all_special_ids"))
        what = f"got {type(tokenizer).__name__}; wrap a tokenizers.Tokenizer in transformers.PreTrainedTokenizerFast"
        check(known, f"tokenizer: expected a Hugging Face tokenizer, {what}", InputTypeError)
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the special tokens, the one for unknown text not among them."""
        return frozenset(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the special tokens that the tokenizer adds by itself."""
        return [list(ids) for ids in self.tokenizer(list(texts))["input_ids"]] if len(texts) else []

    def blank(self, token: int) -> bool:
        """Whether a token stands for nothing but a space."""
        return not self.tokenizer.decode([token]).strip()

    def places(self, text: str, ids: list[int], span: Span) -> range:
        """The positions of the tokens that hold a part of `text[span]`."""
        start, end = span if span[1] > span[0] else (max(span[0] - 1, 0), span[0] + 1)
        if getattr(self.tokenizer, "is_fast", False):
            offsets = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            found = [place for place, (left, right) in enumerate(offsets) if left < end and right > start]
            return range(found[0], found[-1] + 1) if found else range(0)
        before, through = (_common(self.encode([text[:stop]])[0], ids) for stop in (start, end))
        return range(before, min(max(through, before + 1), len(ids)))

    def choose_space(self, prompts: Sequence[str], answers: Sequence[str]) -> str:
        """`"answer"` or `"prompt"`: the first side for the space that makes every answer one token, else the
        one that makes most answers so."""
        right = {}
        for space in SPACES:
            right[space] = sum(answer is not None for answer in self.answer_ids(prompts, answers, space))
            if right[space] == len(prompts):
                return space
        return max(right, key=right.__getitem__)

    def answer_ids(self, prompts: Sequence[str], answers: Sequence[str], space: str) -> list[int | None]:
        """The id that encode(prompt + answer) adds to encode(prompt), None where it is not just one."""
        tail, lead = SPACES[space]
        short = self.encode([prompt + tail for prompt in prompts])
        full = self.encode([prompt + tail + lead + answer for prompt, answer in zip(prompts, answers, strict=True)])
        return [b[-1] if len(b) == len(a) + 1 and b[:-1] == a else None for a, b in zip(short, full, strict=True)]

    def align(
        self,
        prompts: Sequence[str],
        corrupted: Sequence[str],
        answers: Sequence[str],
        corrupted_answers: Sequence[str] | None = None,
        replaced: Sequence[Sequence[Span]] | None = None,
        space: str | None = None,
    ) -> Alignment:
        """Encode the pairs and find the first broken rule of each; the arguments are those of `from_text`."""
        space = space or self.choose_space(prompts, answers)
        ids = self.answer_ids(prompts, answers, space)
        prompts, corrupted = ([text + SPACES[space][0] for text in texts] for texts in (prompts, corrupted))
        clean, changed = self.encode(prompts), self.encode(corrupted)
        reasons: list[str | None] = []
        for row, answer in enumerate(ids):
            if answer is None:
                reasons.append("answer_not_one_token")
            elif answer == self.tokenizer.unk_token_id:
                reasons.append("answer_unknown")
            elif corrupted_answers is not None and corrupted_answers[row] == answers[row]:
                reasons.append("same_answer")
            else:
                spans = None if replaced is None else replaced[row]
                reasons.append(self.difference(prompts[row], corrupted[row], clean[row], changed[row], spans))
        numbers = [-1 if answer is None else answer for answer in ids]
        return Alignment(space, prompts, corrupted, clean, changed, numbers, reasons, self)

    def difference(
        self, prompt: str, corrupted: str, clean: list[int], changed: list[int], spans: Sequence[Span] | None
    ) -> str | None:
        """The rule that a pair's ids break, or None."""
        if len(clean) != len(changed):
            return "length_differs"
        differing = {place for place, (a, b) in enumerate(zip(clean, changed, strict=True)) if a != b}
        if not differing:
            return "no_difference"
        if spans is None:
            start = _common(prompt, corrupted)
            same_end = _common(prompt[start:][::-1], corrupted[start:][::-1])
            spans = [(start, len(prompt) - same_end)]
        for start, end in spans:  # the space before a word often is part of its first token
            wide = (start - 1 if start and prompt[start - 1] == " " else start, end)
            differing -= set(self.places(prompt, clean, wide))
        return "differs_outside_span" if differing else None


def count_dropped(reasons: Sequence[str | None], templates: Iterable[Any] | None = None) -> dict[str, Any]:
    """`dropped` {reason: count}, and `dropped_by_template` {template: {reason: count}} where templates are given."""
    counts: dict[str, Any] = {"dropped": dict(Counter(reason for reason in reasons if reason is not None))}
    if templates is not None:
        by_template: dict[str, Counter[str]] = {}
        for template, reason in zip(templates, reasons, strict=True):
            if reason is not None:
                by_template.setdefault(str(template), Counter())[reason] += 1
        counts["dropped_by_template"] = {template: dict(counter) for template, counter in by_template.items()}
    return counts


def _report(aligned: Alignment, columns: Mapping[str, Sequence[str]], kept: np.ndarray, on_misaligned: str) -> None:
    """Raise for the misaligned pairs, unless they may be dropped and some are left."""
    bad = [row for row, reason in enumerate(aligned.reasons) if reason is not None]
    if not bad or (on_misaligned == "drop" and len(kept)):
        return
    shown = []
    for row in bad[:5]:
        reason = aligned.reasons[row] or ""
        answer, prompt, other = columns["answers"][row], aligned.prompts[row], aligned.corrupted_prompts[row]
        detail = f"answer {answer!r}" if "answer" in reason else f"corrupted {other!r}"
        if reason == "length_differs":
            detail += f", {len(aligned.clean[row])} and {len(aligned.corrupted[row])} tokens"
        shown.append(f"{prompt!r} ({detail}): {REASONS[reason]}")
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    what = "correct them or pass on_misaligned='drop'" if len(kept) else "none is left"
    text = "; ".join(shown)
    raise AlignmentError(f"{len(bad)} of {len(aligned.reasons)} prompt pairs do not line up ({what}): {text}{more}")


def _texts(name: str, texts: Any) -> list[str]:
    """The texts as a list, prompts without the spaces at their end and answers without those around them."""
    check(not isinstance(texts, str), f"{name}: expected a sequence of texts, got one string", InputTypeError)
    wrong = [text for text in texts if not isinstance(text, str)]
    check(not wrong, f"{name}: expected strings, got {wrong[:3]!r}", InputTypeError)
    trimmed = [text.strip(" ") if "answers" in name else text.rstrip(" ") for text in texts]
    empty = [row for row, text in enumerate(trimmed) if not text]
    check(not empty, f"{name}: expected non-empty texts, got empty ones at {empty[:5]}")
    return trimmed


def _spans(spans: Any) -> list[Span]:
    """One span or several, as several."""
    return [tuple(spans)] if len(spans) and isinstance(spans[0], int) else [tuple(span) for span in spans]


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many entries two sequences have in common at the start."""
    number = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        number += 1
    return number


def _padded(rows: Sequence[Sequence[int]], filling: int, dtype: Any) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=0)), filling, dtype=dtype)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


def _column(name: str, values: Sequence[Any], batch: int) -> np.ndarray:
    array = np.asarray(values)
    check(array.shape[:1] == (batch,), f"strata[{name!r}]: expected {batch} values, got {_shape(array)}")
    return array


def _shape(array: Any) -> Any:
    return None if array is None else tuple(array.shape)
