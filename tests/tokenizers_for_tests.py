"""Tokenizers built in memory, each with one habit that real ones have."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from pyarith.tasks.tables import LEXICON, NULLS, arithmetic_templates, operand_pairs, solve


def corpus() -> list[str]:
    """Arithmetic lines with answers, and lines with the null words."""
    lines = []
    for sign in LEXICON:
        for template in arithmetic_templates(sign):
            for a, b in operand_pairs(sign):
                lines.append(template.render({"A": a, "B": b}).text + f" {solve(sign, a, b)}")
        for nulls in NULLS[sign].values():
            lines += [f"{a} {null} {b} is" for null in nulls[:2] for a in "123456789" for b in "123456789"]
    return lines


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    begin = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


@lru_cache
def byte_level(split_digits: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Whole numbers with their space are one token (GPT-2), or each digit is its own (Qwen)."""
    core = Tokenizer(models.BPE(unk_token=None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if split_digits else level
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    return _wrap(core)


@lru_cache
def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece in Llama 2: spaces are a mark in front of words, digits stand alone, " 7" is two tokens."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first"), pre_tokenizers.Digits(True)]
    )
    core.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>"], show_progress=False)
    core.train_from_iterator(corpus(), trainer)
    return _wrap(core)


class WithoutOffsets:
    """A fast tokenizer that behaves like a slow one: no offset mapping."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": self.inner(texts)["input_ids"]}


class SlowWords(PreTrainedTokenizer):
    """A tokenizer written in Python: words between spaces, no special tokens added."""

    def __init__(self, words: list[str]) -> None:
        self.words = {word: number for number, word in enumerate(["<unk>", *words])}
        super().__init__(unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.words)

    def _tokenize(self, text: str) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.words)[index]
