"""Training examples: boundaries of prompt and completion, bad rows, chat."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from single_thread import one_thread  # noqa: F401
from tokenizers_for_tests import SlowWords, byte_level, metaspace

import pyarith as pa
from pyarith.errors import InputError, InputTypeError
from pyarith.tuning import Examples, load_examples, task_examples

SUMS = [("3 + 4 =", "7"), ("12 plus 4 equals to", "16"), ("9 - 2 =", "7")]


@pytest.fixture(scope="module")
def demo():
    return pa.load_demo()


def told(examples, tokenizer):
    """(tokens, those in the loss) of each example."""
    rows = zip(examples.ids, examples.trained, strict=True)
    return [(tokenizer.convert_ids_to_tokens(i), tokenizer.convert_ids_to_tokens(i[t])) for i, t in rows]


# prompt and completion


@pytest.mark.parametrize(
    ("tokenizer", "side", "loss"),
    [
        (byte_level(), "answer", [["Ġ7"], ["Ġ16"], ["Ġ7"]]),
        (byte_level(True), "answer", [["Ġ", "7"], ["Ġ", "1", "6"], ["Ġ", "7"]]),
        (metaspace(), "answer", [["▁", "7"], ["▁", "1", "6"], ["▁", "7"]]),
    ],
    ids=["whole numbers", "digits", "metaspace"],
)
def test_loss_is_on_the_completion_and_the_whole_is_what_the_tokenizer_makes(tokenizer, side, loss):
    for rows in (SUMS, [(p + " ", " " + c) for p, c in SUMS], [{"prompt": p, "completion": c} for p, c in SUMS]):
        examples = load_examples(rows, tokenizer)
        assert examples.settings["space"] == side
        assert [trained for _, trained in told(examples, tokenizer)] == loss
        for ids, (prompt, completion) in zip(examples.ids, SUMS, strict=True):
            assert ids.tolist() == tokenizer(f"{prompt} {completion}")["input_ids"]


def test_the_space_goes_to_the_side_that_keeps_the_prompts_tokens():
    """Tokenizers that take "4 = " with its space as one token; of the second no side keeps what "4 =" was."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(*pieces):
        words = {piece: number for number, piece in enumerate(("<unk>", *pieces))}
        core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces)), "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

    examples = load_examples([("4 =", "7")], tokenizer("4 = ", "4 =", "7"))
    assert (examples.settings["space"], examples.ids[0].tolist()) == ("prompt", [1, 3])
    with pytest.raises(InputError, match="joins the end of the prompt with the beginning of the completion in 1"):
        load_examples([("4 =", "7")], tokenizer("4 = 7", "4 = ", "4 =", "7"))


def test_other_white_space_stays_and_none_joins_as_it_is():
    tokenizer = byte_level()
    lines = load_examples([("3 + 4 =\n", "7"), ("3 + 4 =", "\n7")], tokenizer, space="none")
    auto = load_examples([("3 + 4 =\n", "7"), ("3 + 4 =", "\n7")], tokenizer)
    for one, other in zip(lines.ids, auto.ids, strict=True):
        assert one.tolist() == other.tolist() == tokenizer("3 + 4 =\n7")["input_ids"]
    assert load_examples([("3 +", "4")], tokenizer, space="none").ids[0].tolist() == tokenizer("3 +4")["input_ids"]


def test_end_of_text_is_added_once_and_only_where_there_is_one(demo):
    _, tokenizer = demo
    made = load_examples([("3 + 4 =", "7")], tokenizer)
    assert made.settings["eos"] is True and told(made, tokenizer)[0][1] == ["7", "</s>"]
    assert told(load_examples([("3 + 4 =", "7")], tokenizer, eos=False), tokenizer)[0][1] == ["7"]
    assert told(load_examples([("3 + 4 =", "7</s>")], tokenizer), tokenizer)[0][1] == ["7", "</s>"]
    assert load_examples(SUMS, byte_level()).settings["eos"] is False
    with pytest.raises(InputError, match="eos: expected a tokenizer with an end-of-text token"):
        load_examples(SUMS, byte_level(), eos=True)


def test_a_tokenizer_that_ends_every_text_by_itself(demo):
    from copy import deepcopy

    from tokenizers import processors

    _, plain = demo
    tokenizer = deepcopy(plain)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for eos in (True, False):
        one, other = (load_examples(SUMS, t, eos=eos) for t in (tokenizer, plain))
        assert [ids.tolist() for ids in one.ids] == [ids.tolist() for ids in other.ids]


def test_slow_tokenizers_and_prompt_pairs(demo):
    slow = SlowWords("3 4 + = 7".split())
    assert load_examples([("3 + 4 =", "7")], slow).ids[0].tolist() == [1, 3, 2, 4, 5]
    _, tokenizer = demo
    pairs = pa.tasks.arithmetic(tokenizer, "/", n=6)
    examples = load_examples(pairs, tokenizer)
    for row, ids in enumerate(examples.ids):
        assert ids[:-1].tolist() == pairs.clean[row, : pairs.lengths[row]].tolist() and ids[-1] == pairs.answers[row]
        assert examples.trained[row].nonzero()[0].tolist() == [len(ids) - 1]
    with pytest.raises(InputError, match="eos: expected None or False for PromptPairs"):
        load_examples(pairs, tokenizer, eos=True)


def test_problems_of_the_operators_are_those_of_arithmetic(demo):
    _, tokenizer = demo
    problems = pa.tasks.draw_problems("/", n=20, seed=3)
    pairs = pa.tasks.arithmetic(tokenizer, "/", n=20, seed=3)
    assert [(p.prompt, p.answer) for p in problems] == list(zip(pairs.prompts, pairs.answer_texts, strict=True))
    assert len(pa.tasks.draw_problems("+", n=36 * 81)) == 36 * 81
    with pytest.raises(InputError, match="asked for 2917 problems of '\\+'"):
        pa.tasks.draw_problems("+", n=36 * 81 + 1)
    made = task_examples(tokenizer, "/", 20, 3, eos=False)
    assert made.hash == load_examples(problems, tokenizer, eos=False).hash
    assert (made.settings["source"], made.settings["n"], made.settings["seed"]) == ("/", 20, 3)


# files


def write(path, rows):
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("row", "prompt", "completion", "layout"),
    [
        ({"prompt": "3 + 4 =", "completion": "7"}, "3 + 4 =", "7", "completion"),
        ({"prompt": "3 + 4 =", "answer": "7"}, "3 + 4 =", "7", "generic"),
        ({"question": "What is 3 plus 4?", "answer": "3 + 4 = 7 #### 7"}, "Q: What is 3 plus 4?\nA:", None, "gsm8k"),
        ({"Body": "3 plus 4.", "Question": "What?", "Answer": "7"}, "Q: 3 plus 4. What?\nA:", "7", "svamp"),
    ],
)
def test_files_with_known_columns(tmp_path, demo, suffix, row, prompt, completion, layout):
    _, tokenizer = demo
    examples = load_examples(write(tmp_path / f"rows{suffix}", [row, row]), tokenizer, eos=False)
    text = f"{prompt} {completion or row['answer']}"  # of a worked solution all of it
    assert examples.settings["layout"] == layout and examples.rows.tolist() == [1, 2]
    assert examples.ids[1].tolist() == tokenizer(text)["input_ids"]


def test_columns_templates_and_limits(tmp_path, demo):
    _, tokenizer = demo
    path = write(tmp_path / "rows.jsonl", [{"a": "3", "b": "4", "c": 7}, {"a": "9", "b": "1", "c": 10}])
    made = load_examples(path, tokenizer, prompt="{a} + {b} =", completion="c", limit=1, eos=False)
    assert len(made) == 1 and made.ids[0].tolist() == tokenizer("3 + 4 = 7")["input_ids"]
    with pytest.raises(InputError, match=r"expected columns \['d'\]"):
        load_examples(path, tokenizer, prompt="a", completion="d")
    with pytest.raises(InputError, match=r"completion: prompt, completion.*got \['a', 'b', 'c'\].*completion='"):
        load_examples(path, tokenizer)
    for name, value in (("limit", 0), ("max_length", 1.5)):
        with pytest.raises(InputError, match=f"{name}: expected None or a whole number"):
            load_examples(path, tokenizer, **{name: value})


BAD = [
    {"prompt": "3 + 4 =", "completion": "7"},
    {"prompt": "", "completion": "7"},
    {"prompt": "3 + 4 =", "completion": " "},
    {"prompt": "3 + 4 =", "completion": None},
    {"prompt": ["3"], "completion": "7"},
    {"prompt": "3 + 4 ="},
    [3, 4],
    {"prompt": "3 + 4 =", "completion": "é"},
    {"prompt": "3 + 4 + 5 + 6 + 7 + 8 =", "completion": "33"},
]
REASONS = {
    "empty_prompt": [2],
    "empty_completion": [3, 4],
    "not_text": [5],
    "missing_column": [6],
    "not_a_row": [7],
    "unknown": [8],
    "too_long": [9],
}


def test_every_kind_of_bad_row_is_named_in_one_error(tmp_path, demo):
    _, tokenizer = demo
    path = write(tmp_path / "rows.jsonl", BAD)
    with pytest.raises(InputError) as caught:
        load_examples(path, tokenizer, max_length=10)
    for words in (
        "in each of 9 rows",
        "the prompt is empty in 1 (row 2)",
        "the completion is empty in 2 (row 3, 4)",
        "not text in 1 (row 5)",
        "a column is missing in 1 (row 6)",
        "no object and no (prompt, completion) in 1 (row 7)",
        "does not know in 1 (row 8)",
        "more than 10 tokens in 1 (row 9)",
        "correct them or pass on_bad='drop'",
    ):
        assert words in str(caught.value)


def test_dropped_rows_are_warned_of_counted_and_never_cut(tmp_path, demo):
    _, tokenizer = demo
    path = write(tmp_path / "rows.jsonl", BAD)
    with pytest.warns(UserWarning, match=r"left out 8 of 9 rows: .*2 with the completion is empty"):
        examples = load_examples(path, tokenizer, max_length=10, on_bad="drop")
    assert examples.rows.tolist() == [1] and examples.settings["dropped_rows"] == REASONS
    assert sum(examples.settings["dropped"].values()) == 8 and examples.record()["examples"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = load_examples(path, tokenizer, limit=1, max_length=10, on_bad="drop")
    assert longer.settings["dropped"] == {}
    assert load_examples([("3 + 4 =", "7")], tokenizer, max_length=7).lengths.tolist() == [7], "just as long is allowed"
    with pytest.raises(InputError, match="none is left"):
        load_examples([("", "7")], tokenizer, on_bad="drop")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], InputError, "expected at least one row, got none"),
        (7, InputTypeError, "data: expected a path, rows"),
        ({"prompt": "a"}, InputTypeError, "got dict"),
        (["text"], InputError, "no object and no \\(prompt, completion\\) in 1"),
        ("missing.jsonl", InputError, "which does not exist"),
    ],
)
def test_no_data_at_all(demo, data, error, words):
    with pytest.raises(error, match=words):
        load_examples(data, demo[1])


def test_not_utf8_and_not_json(tmp_path, demo):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "3", "completion": "4"}\n{"prompt"')
    (tmp_path / "c.csv").write_text("")
    for name, words in (("a.jsonl", "expected text in UTF-8"), ("b.jsonl", "line 2: expected JSON"), ("c.csv", "none")):
        with pytest.raises(InputError, match=words):
            load_examples(tmp_path / name, demo[1])
    with pytest.raises(InputError, match="on_bad: expected one of"):
        load_examples(SUMS, demo[1], on_bad="ignore")
    with pytest.raises(InputError, match="space: expected one of"):
        load_examples(SUMS, demo[1], space="left")
    with pytest.raises(InputTypeError, match="tokenizer: expected a Hugging Face tokenizer"):
        load_examples(SUMS, None)


def test_examples_refuse_what_cannot_be_predicted():
    ids, flags = np.arange(3), np.array([False, True, True])
    for trained in (np.array([True, True, True]), np.zeros(3, bool), flags[:2]):
        with pytest.raises(InputError, match=r"trained: .* in rows \[4\]"):
            Examples((ids, ids), (flags, trained), np.array([3, 4]))
    one = Examples((ids,), (flags,), np.array([1]))
    assert one.hash != Examples((ids,), (np.array([False, False, True]),), np.array([1])).hash
    assert one.hash == Examples((ids.copy(),), (flags,), np.array([9]), {"source": "else"}).hash


# chat


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is 3 plus 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "What is 9 minus 1?"},
    {"role": "assistant", "content": "8"},
]


def chatty(demo, template=TEMPLATE):
    from copy import deepcopy

    tokenizer = deepcopy(demo[1])
    tokenizer.chat_template = template
    return tokenizer


def test_loss_is_on_the_assistants_messages(tmp_path, demo):
    tokenizer = chatty(demo)
    path = write(tmp_path / "chat.jsonl", [{"messages": TALK, "id": 1}, {"messages": TALK[:2], "id": 2}])
    examples = load_examples(path, tokenizer)
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert examples.ids[0].tolist() == whole and examples.settings["layout"] == "messages"
    assert told(examples, tokenizer)[0][1] == ["7", "</s>", "\n", "8", "</s>", "\n"]
    assert told(examples, tokenizer)[1][1] == ["7", "</s>", "\n"]


def test_bad_conversations_are_named_by_kind(demo):
    def reply(content="7", role="assistant"):
        return [TALK[0], {"role": role, "content": content}]

    rows = [
        *({"messages": one} for one in (TALK, reply(role="user"), reply(""), reply([1]), "text", [TALK[1]])),
        {"other": 1},
        {"messages": [*reply(role="tool"), TALK[1]]},
    ]
    tokenizer = chatty(
        demo,
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
        + TEMPLATE,
    )
    with pytest.raises(InputError) as caught:
        load_examples(rows, tokenizer)
    for words in (
        "no message of the assistant in 1 (row 2)",
        "the completion is empty in 1 (row 3)",
        "not text in 2 (row 4, 5)",
        "the prompt is empty in 1 (row 6)",
        "a column is missing in 1 (row 7)",
        "refuses the messages (first: no tools) in 1 (row 8)",
    ):
        assert words in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(demo):
    late = "{% for m in messages %}{{ m['content'] if loop.last else 'earlier' }}\n{% endfor %}"
    with pytest.raises(InputError, match="writes earlier messages differently when later ones follow in 1"):
        load_examples([{"messages": TALK}], chatty(demo, late))
    with pytest.raises(InputError, match="tokenizer: expected one with a chat template"):
        load_examples([{"messages": TALK}], byte_level())
