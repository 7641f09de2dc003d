"""PromptPairs: the alignment rules, on tokenizers with the habits of real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers_for_tests import SlowWords, WithoutOffsets, byte_level, metaspace

from pyarith.errors import AlignmentError, InputError, InputTypeError
from pyarith.prompts import Aligner, PromptPairs

CLEAN = ["3 + 5 =", "The sum of 2 and 6 is", "Q: What is 4 plus 3? A:"]
CORRUPTED = ["3 < 5 =", "The nothing of 2 and 6 is", "Q: What is 4 nothing 3? A:"]
ANSWERS = ["8", "8", "7"]


def pairs(tokenizer, **changes):
    arguments = {"prompts": CLEAN, "corrupted": CORRUPTED, "answers": ANSWERS, **changes}
    return PromptPairs.from_text(tokenizer=tokenizer, **arguments)


TOKENIZERS = {
    "byte_level": (byte_level, "answer"),
    "byte_level_digits": (lambda: byte_level(True), "prompt"),
    "metaspace": (metaspace, "prompt"),
    "no_offsets": (lambda: WithoutOffsets(metaspace()), "prompt"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rules_hold_and_space_goes_to_the_right_side(kind):
    make, side = TOKENIZERS[kind]
    tokenizer = make()
    got = pairs(tokenizer)
    assert got.settings["space_answer"] == side
    lead, tail = (" ", "") if side == "answer" else ("", " ")
    for row in range(len(got)):
        ids = got.clean[row, got.attention_mask[row]].tolist()
        assert got.prompts[row] == CLEAN[row] + tail
        assert tokenizer([got.prompts[row]])["input_ids"][0] == ids
        assert tokenizer([got.prompts[row] + lead + ANSWERS[row]])["input_ids"][0] == [*ids, got.answers[row]]
        assert ids[0] == tokenizer.bos_token_id  # special tokens as the tokenizer adds them
        assert (got.clean[row] != got.corrupted[row]).sum() == 1


def test_arrays_and_padding():
    got = pairs(byte_level(), strata={"kind": ["a", "b", "a"]})
    assert got.clean.dtype == got.corrupted.dtype == got.answers.dtype == np.int64
    assert got.attention_mask.dtype == bool
    assert (got.clean[~got.attention_mask] == 0).all() and (got.corrupted[~got.attention_mask] == 0).all()
    assert (np.diff(got.attention_mask.astype(int), axis=1) <= 0).all()  # padded on the right
    assert got.roles is None and got.strata["kind"].tolist() == ["a", "b", "a"]
    inputs = got.inputs()
    assert set(inputs) == {"clean", "corrupted", "answers", "attention_mask", "corrupted_attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in inputs.values())
    assert torch.equal(inputs["attention_mask"].bool(), torch.from_numpy(got.attention_mask))
    alone = got.subset([1]).inputs()
    assert alone["attention_mask"] is None and alone["corrupted_attention_mask"] is None
    assert "3 pairs" in repr(got) and "3 + 5 =" in repr(got)
    assert "0 pairs" in repr(got.subset([]))


def test_subset_and_buckets_keep_the_rows_together():
    got = pairs(byte_level(), strata={"kind": ["a", "b", "c"]})
    back = got.subset([2, 0])
    assert back.prompts == (CLEAN[2], CLEAN[0]) and back.index.tolist() == [2, 0]
    assert back.strata["kind"].tolist() == ["c", "a"]
    assert got.subset(np.array([False, True, False])).prompts == (CLEAN[1],)
    assert got.subset([-1]).prompts == (CLEAN[2],)
    buckets = got.buckets()
    assert sorted(i for bucket in buckets for i in bucket.index) == [0, 1, 2]
    for bucket in buckets:
        assert bucket.attention_mask.all()
        for row, where in enumerate(bucket.index):
            assert bucket.clean[row].tolist() == got.clean[where, got.attention_mask[where]].tolist()
            assert bucket.answers[row] == got.answers[where]
    with pytest.raises(InputError, match=r"indices: expected -3 to 2, got \[3\]"):
        got.subset([0, 3])
    with pytest.raises(InputError, match="expected 3 bools"):
        got.subset([True, False])


def test_planted_split_answer_is_named_or_dropped():
    planted = [*ANSWERS[:2], "17"]  # two digits: two tokens for a tokenizer that splits them
    with pytest.raises(AlignmentError, match=r"1 of 3 .*4 plus 3\? A: .*answer '17'.*not one token") as caught:
        pairs(metaspace(), answers=planted)
    assert "3 + 5" not in str(caught.value)
    template = ["t0", "t1", "t2"]
    got = pairs(metaspace(), answers=planted, on_misaligned="drop", strata={"template": template})
    assert got.index.tolist() == [0, 1] and got.strata["template"].tolist() == ["t0", "t1"]
    assert got.settings["dropped"] == {"answer_not_one_token": 1}
    assert got.settings["dropped_by_template"] == {"t2": {"answer_not_one_token": 1}}
    assert pairs(byte_level(), answers=planted).answer_texts == tuple(planted)


def test_space_side_is_the_first_that_serves_all_answers():
    words = ["a", "b", "c", "d"]
    got = PromptPairs.from_text(["a b"], ["a c"], [" d"], SlowWords(words))
    assert got.settings["space_answer"] == "answer" and got.answer_texts == ("d",)
    got = PromptPairs.from_text(["a b "], ["a c "], ["d"], SlowWords(words))  # a space at the end changes nothing
    assert got.prompts == ("a b",)
    # " 7" is two tokens here, "7" after a space is one; with a 2-digit answer among them neither serves all
    chosen = Aligner(metaspace()).choose_space(CLEAN, ["8", "17", "7"])
    assert chosen == "prompt"
    with pytest.raises(AlignmentError, match="3 of 3"):
        pairs(metaspace(), space="answer")


def test_planted_unequal_length_and_no_difference():
    planted = ["3 < 5 =", "The nothing of 2 and 6 is nothing", CLEAN[2]]
    with pytest.raises(AlignmentError, match="2 of 3") as caught:
        pairs(byte_level(), corrupted=planted)
    text = str(caught.value)
    assert "different numbers of tokens" in text and "8 and 9 tokens" in text and "are the same" in text
    got = pairs(byte_level(), corrupted=planted, on_misaligned="drop")
    assert got.settings["dropped"] == {"length_differs": 1, "no_difference": 1} and len(got) == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_planted_difference_outside_the_replaced_span(kind):
    tokenizer = TOKENIZERS[kind][0]()
    prompts, corrupted = ["3 + 5 =", "3 + 5 ="], ["3 < 5 =", "3 < 6 ="]
    spans = [[(2, 3)], [(2, 3)]]
    arguments = {"replaced": spans, "on_misaligned": "drop"}
    got = PromptPairs.from_text(prompts, corrupted, ["8", "8"], tokenizer, **arguments)
    assert got.index.tolist() == [0] and got.settings["dropped"] == {"differs_outside_span": 1}
    both = PromptPairs.from_text(prompts, corrupted, ["8", "8"], tokenizer, replaced=[[(2, 3)], [(2, 3), (4, 5)]])
    assert len(both) == 2
    assert len(PromptPairs.from_text(prompts, corrupted, ["8", "8"], tokenizer)) == 2  # spans found from the texts


def test_difference_may_not_ripple_into_neighbours():
    # "ab c" -> "xb c": one character changes, and the tokenizer merges differently after it
    class Merging(SlowWords):
        def _tokenize(self, text):
            return list(text.replace(" ", "")) if text.startswith("a") else [text[0], *text[:0:-1].replace(" ", "")]

    tokenizer = Merging(list("abcdx"))
    with pytest.raises(AlignmentError, match="outside the replaced part"):
        PromptPairs.from_text(["abcc"], ["xbdc"], ["d"], tokenizer, replaced=[[(0, 1)]], space="answer")


def test_same_answer_and_unknown_answer():
    with pytest.raises(AlignmentError, match=r"1 of 3.*has the same answer"):
        pairs(byte_level(), corrupted_answers=["1", "8", "2"])
    assert len(pairs(byte_level(), corrupted_answers=["1", "2", "2"])) == 3
    with pytest.raises(AlignmentError, match="does not know the answer"):
        PromptPairs.from_text(["a b"], ["a c"], ["zebra"], SlowWords(["a", "b", "c"]))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_roles_are_the_tokens_of_the_spans(kind):
    tokenizer = TOKENIZERS[kind][0]()
    spans = [
        {"operand_a": (0, 1), "operator": (2, 3), "operand_b": (4, 5)},
        {"operator": (4, 7), "operand_a": [(11, 12)], "operand_b": (17, 18)},
        {"operand_a": (11, 12), "operator": (13, 17), "operand_b": (18, 19), "mark": [(0, 2), (21, 23)]},
    ]
    got = pairs(tokenizer, roles=spans)
    assert got.role_names[:5] == ("other", "operand_a", "operand_b", "operator", "special")
    assert got.roles.dtype == np.int8
    for row, text in enumerate(CLEAN):
        assert (got.roles[row][~got.attention_mask[row]] == -1).all()
        assert got.roles[row, 0] == got.role_names.index("special")
        for name, given in spans[row].items():
            start, end = given if isinstance(given, tuple) else given[0]
            places = np.flatnonzero(got.roles[row] == got.role_names.index(name))
            texts = [tokenizer.decode([token]).strip() for token in got.clean[row, places]]
            assert "".join(texts).startswith(text[start:end].replace(" ", "")), (name, texts)
            if name != "mark":
                assert len(texts) == 1
    assert len(np.flatnonzero(got.roles[2] == got.role_names.index("mark"))) >= 2


def test_offsets_and_prefix_encoding_agree():
    fast, slow = Aligner(metaspace()), Aligner(WithoutOffsets(metaspace()))
    for text in [*CLEAN, "Let x = 12 times 3. Then x ="]:
        ids = fast.encode([text])[0]
        words = [(i, i + len(word)) for word in text.split(" ") for i in [text.index(word)]]
        for span in words:
            by_offsets, by_prefixes = (
                [place for place in one.places(text, ids, span) if not one.blank(ids[place])] for one in (fast, slow)
            )
            assert by_offsets == by_prefixes and by_offsets


def test_a_token_that_reaches_beyond_its_span_still_has_the_role():
    tokenizer = SlowWords(["is", "5?", "7?", "A:", "12"])  # no offsets; "5?" is one token
    got = PromptPairs.from_text(["is 5? A:"], ["is 7? A:"], ["12"], tokenizer, roles=[{"operand_a": (3, 4)}])
    assert got.roles.tolist() == [[0, 1, 0]]


def test_bad_arguments_name_themselves():
    tokenizer = byte_level()
    with pytest.raises(InputError, match="on_misaligned: expected one of"):
        pairs(tokenizer, on_misaligned="skip")
    with pytest.raises(InputError, match=r"one entry a prompt in each argument, got .*'answers': 2"):
        pairs(tokenizer, answers=["8", "8"])
    with pytest.raises(InputError, match="prompts: expected at least one"):
        PromptPairs.from_text([], [], [], tokenizer)
    with pytest.raises(InputTypeError, match="prompts: expected a sequence of texts"):
        pairs(tokenizer, prompts="3 + 5 =")
    with pytest.raises(InputTypeError, match="answers: expected strings"):
        pairs(tokenizer, answers=[8, 8, 7])
    with pytest.raises(InputError, match=r"answers: expected non-empty texts, got empty ones at \[1\]"):
        pairs(tokenizer, answers=["8", " ", "7"])
    with pytest.raises(InputError, match=r"strata\['kind'\]: expected 3 values"):
        pairs(tokenizer, strata={"kind": ["a"]})
    with pytest.raises(InputTypeError, match="tokenizer: expected a Hugging Face tokenizer, got str"):
        pairs("gpt2")
    with pytest.raises(InputTypeError, match="got Tokenizer; wrap"):
        pairs(tokenizer.backend_tokenizer)
    with pytest.raises(AlignmentError, match="none is left"):
        pairs(tokenizer, corrupted=CLEAN, on_misaligned="drop")
    good = pairs(tokenizer)
    with pytest.raises(InputError, match="corrupted: expected shape"):
        PromptPairs(**{**vars(good), "corrupted": good.corrupted[:, :-1]})
