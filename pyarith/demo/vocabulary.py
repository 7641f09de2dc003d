"""The demo model's tokenizer: whole words and the numbers 0 to 99, with letters and digits to fall back on."""

from __future__ import annotations

import random
import re
import string
from typing import TYPE_CHECKING

from pyarith.demo.data import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_PIECE = r"\n|[0-9]+|[A-Za-z]+|[^\sA-Za-z0-9]"


def corpus_words(seed: int = 0, draws: int = 4000) -> list[str]:
    """Every word and sign that the tasks produce, sorted."""
    rng = random.Random(seed)
    words: set[str] = set()
    for draw in TASKS.values():
        for _ in range(draws):
            words.update(re.findall(_PIECE, " ".join(draw(rng))))
    return sorted(word for word in words if not word.isdigit())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer: `<s>` in front, newline a token of its own, other white space only separates.

    Numbers 0 to 99 and every word of the corpus are one token each; any other text is spelled with word
    pieces (`1732` is `17 ##32`), and characters outside ASCII become `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, "\n", *map(str, range(100)), *corpus_words()]
    pieces += [*string.ascii_letters, *string.punctuation]
    pieces += [f"##{n:02d}" for n in range(100)] + [f"##{c}" for c in string.digits + string.ascii_letters]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
        ]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
