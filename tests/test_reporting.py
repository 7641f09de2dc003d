"""discover, the run directory and its hashes."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers_for_tests import byte_level

import pyarith as pa
from pyarith.discovery.discover import discover
from pyarith.errors import InputError, InputTypeError
from pyarith.plots import effects_figure
from pyarith.reporting import RunDirectory, data_hash, model_fingerprint
from pyarith.reporting.files import plain
from pyarith.reporting.tables import head_rows, mlp_rows


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_models.make("llama", torch.float32, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return pa.tasks.arithmetic(tokenizer, n=12)


@pytest.fixture(scope="module")
def found(model, pairs):
    return discover(model, pairs, verify=0, progress=False)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def choices(model, pairs, tokenizer):
    """The model's first choice after each clean and each corrupted prompt, one at a time, through the whole model."""
    with torch.no_grad():
        return [
            np.array(
                [int(model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].argmax()) for text in texts]
            )
            for texts in (pairs.prompts, pairs.corrupted_prompts)
        ]


# discover


def test_discover_gives_what_fast_patch_gives(model, pairs, found):
    direct = pa.fast_patch(model, **pairs.inputs(), verify=0, progress=False)
    np.testing.assert_array_equal(found.result.head_logits, direct.head_logits)
    assert found.pairs is pairs and found.n_left_out == 0


def with_known_answers(pairs, choices, right):
    """The pairs with answers set to the model's own first choice where ``right``, and to another token elsewhere."""
    return dataclasses.replace(pairs, answers=np.where(right, choices, (choices + 1) % 500))


def test_answers_are_those_of_the_whole_model(model, pairs, choices):
    clean, corrupted = choices
    known = dataclasses.replace(pairs, answers=clean)
    again = discover(model, known, verify=0, progress=False)
    assert again.correct.all() and again.n_wrong == 0
    np.testing.assert_array_equal(again.still_correct, clean == corrupted)
    assert 0 < again.still_correct.sum() < 12


def test_answers_do_not_depend_on_the_size_of_blocks(model, pairs, choices, monkeypatch):
    known = dataclasses.replace(pairs, answers=choices[1])
    whole = discover(model, known, senders="mlps", verify=0, progress=False)
    for tokens in (1, 30):
        monkeypatch.setattr(sys.modules[discover.__module__], "_TOKENS", tokens)
        again = discover(model, known, senders="mlps", verify=0, progress=False)
        np.testing.assert_array_equal(again.correct, whole.correct)
        assert again.still_correct.all()


def test_wrongly_answered_prompts_are_left_out_only_when_asked(model, pairs, choices):
    right = np.arange(len(pairs)) % 3 == 0
    known = with_known_answers(pairs, choices[0], right)
    kept = discover(model, known, verify=0, progress=False)
    np.testing.assert_array_equal(kept.correct, right)
    assert (len(kept.pairs), kept.n_wrong, kept.n_left_out) == (12, 8, 0)
    assert kept.result.head_logits.shape[-1] == 12
    fewer = discover(model, known, only_correct=True, verify=0, progress=False)
    assert (len(fewer.pairs), fewer.n_wrong, fewer.n_left_out) == (4, 8, 8)
    assert fewer.pairs.prompts == tuple(np.array(known.prompts)[right])
    np.testing.assert_allclose(fewer.result.head_logits, kept.result.head_logits[..., right], atol=1e-5)
    assert fewer.summary()["accuracy"] == 1.0 and kept.summary()["accuracy"] == pytest.approx(4 / 12)


def test_nothing_answered_correctly_is_an_error(model, pairs, choices):
    none = with_known_answers(pairs, choices[0], np.zeros(len(pairs), bool))
    with pytest.raises(InputError, match=r"only_correct: .* got none of 12"):
        discover(model, none, only_correct=True)


def test_pairs_of_another_type_are_refused(model):
    with pytest.raises(InputTypeError, match="pairs: expected PromptPairs, got list"):
        discover(model, [[1, 2]])


def test_summary_holds_the_numbers_of_the_result(found):
    summary, result = found.summary(), found.result
    assert summary["strength"] == pytest.approx(result.corruption_strength.mean())
    assert summary["p_clean"] - summary["p_corrupted"] == pytest.approx(summary["strength"], abs=1e-6)
    assert summary["noise_floor"] == result.noise_floor.max()
    assert summary["ratio_excluded"] == (result.clean_logits <= 0).sum()
    assert summary["key_heads"] == [str(head) for head in result.key_heads()]
    json.dumps(summary, allow_nan=False)


# tables


def test_head_table_is_ranked_by_effect(found):
    rows = head_rows(found.result)
    assert [(row["layer"], row["head"]) for row in rows[:5]] == [tuple(row.head) for row in found.result.top(5)]
    assert [row["rank"] for row in rows] == list(range(1, 13))
    keys = {(row["layer"], row["head"]) for row in rows if row["key"]}
    assert keys == {tuple(head) for head in found.result.key_heads()} and 0 < len(keys) < 12


def test_mlp_table_is_ranked_by_size():
    patched = 2.0 * np.array([[0.9], [1.3], [0.8]], np.float32)
    one, zeros = np.array([2.0], np.float32), np.zeros(1, np.float32)
    result = pa.PatchResult(
        one, one, zeros, zeros, np.zeros(3), mlp_logits=patched, mlp_identity_logits=2 + 0 * patched
    )
    rows = mlp_rows(result)
    assert [(row["rank"], row["layer"]) for row in rows] == [(1, 1), (2, 2), (3, 0)]
    assert [row["effect"] for row in rows] == pytest.approx([0.3, -0.2, -0.1])
    assert [row["logit_change"] for row in rows] == pytest.approx([0.6, -0.4, -0.2])
    assert head_rows(result) == []


# run directory


@pytest.fixture
def written(tmp_path, model, found):
    run = RunDirectory(tmp_path / "run")
    run.add_discovery("+", found)
    run.add_figure("heatmap.png", effects_figure(found.result.head_effects, found.result.mlp_effects))
    record = run.finish("test", model, name="tiny", settings={"n": 12}, seeds={"prompts": 0}, seconds={"all": 1.5})
    return tmp_path / "run", json.loads(record.read_text())


def test_run_directory_holds_what_its_record_lists(written):
    path, record = written
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert files == sorted(record["files"])
    assert set(files) >= {"run.json", "heads.csv", "mlps.csv", "prompts.csv", "heatmap.png", "result/result.json"}
    assert (path / "heatmap.png").read_bytes()[:4] == b"\x89PNG"


def test_record_says_how_the_run_was_made(written, model, pairs, found):
    _, record = written
    assert record["tool"] == "pyarith" and record["command"] == "test" and record["command_line"]
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["pyarith"] == pa.__version__
    assert record["model"]["fingerprint"] == model_fingerprint(model)
    assert record["model"]["family"] == "llama" and record["model"]["dtype"] == "float32"
    assert record["seeds"] == {"prompts": 0} and record["settings"] == {"n": 12}
    assert set(record["backends"]) >= {"add_norm", "gated_act", "answer_logits", "head_write_rows"}
    run = record["runs"]["+"]
    assert run["data"]["hash"] == data_hash(pairs) and run["data"]["operator"] == "+"
    assert run["quantity"] == found.result.semantics and run["summary"]["prompts"] == 12
    assert set(run["seconds"]) == {"answers", "patching"} and run["patching"]["plan"]


def test_result_and_tables_can_be_read_back(written, found):
    path, _ = written
    loaded = pa.PatchResult.load(path / "result")
    np.testing.assert_array_equal(loaded.head_logits, found.result.head_logits)
    rows = read(path / "heads.csv")
    assert len(rows) == 12
    for row in rows:
        place = int(row["layer"]), int(row["head"])
        assert float(row["effect"]) == found.result.head_effects[place]
    prompts = read(path / "prompts.csv")
    assert [row["prompt"] for row in prompts] == list(found.pairs.prompts)
    assert [row["answer"] for row in prompts] == list(found.pairs.answer_texts)
    assert {row["style"] for row in prompts} <= {"equation", "statement", "question"}


def test_an_earlier_run_is_replaced_and_other_files_stay(written, model, found):
    path, _ = written
    (path / "notes.txt").write_text("mine")
    run = RunDirectory(path)
    assert (path / "heads.csv").exists(), "nothing may go before there is something new"
    run.add_discovery("+", found, folder="add")
    run.finish("test", model, name="tiny", settings={}, seeds={}, seconds={})
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "add" / "heads.csv").exists()
    assert not (path / "heads.csv").exists() and not (path / "heatmap.png").exists() and not (path / "result").exists()


@pytest.mark.parametrize("content", ["file", "json", "other tool", "broken"])
def test_a_foreign_directory_is_refused_and_left_alone(tmp_path, content):
    name, text = {
        "file": ("thesis.tex", "x"),
        "json": ("run.json", "[1]"),
        "other tool": ("run.json", '{"tool": "other", "files": ["run.json"]}'),
        "broken": ("run.json", "{"),
    }[content]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="out: expected a new or empty directory"):
        RunDirectory(tmp_path)
    assert (tmp_path / name).read_text() == text
    with pytest.raises(InputError, match="got the file"):
        RunDirectory(tmp_path / name)


def test_a_record_cannot_name_files_outside(tmp_path, found):
    outside = tmp_path / "precious"
    outside.write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"tool": "pyarith", "files": ["../precious", str(outside)]}))
    RunDirectory(tmp_path / "run").add_discovery("+", found)
    assert outside.exists()


def test_an_interrupted_run_leaves_the_earlier_one_and_can_be_done_again(written, model, found, monkeypatch):
    import os

    path, _ = written
    before = {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    run = RunDirectory(path)
    run.add_discovery("+", found, folder="add")
    assert {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file() and ".partial" not in str(p)} == before
    moved, replace = [], os.replace

    def kill(source, target):
        moved.append(target)
        if len(moved) == 3:  # the first is the staged record, the second the first table
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            run.finish("test", model, name="tiny", settings={}, seeds={}, seconds={})
    assert not (path / "run.json").exists(), "half a run must not look like one"
    again = RunDirectory(path)
    assert not again.done("test", model, {})
    again.add_discovery("+", found)
    again.finish("test", model, name="tiny", settings={}, seeds={}, seconds={})
    assert RunDirectory(path).done("test", model, {}) and not RunDirectory(path).done("test", model, {"n": 1})
    assert not (path / "add").exists() and not (path / ".partial").exists()


def test_an_empty_directory_is_fine_and_nothing_is_made_too_early(tmp_path):
    RunDirectory(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    RunDirectory(tmp_path)


def test_plain_makes_valid_json():
    value = {
        "a": np.float32(0.5),
        1: [np.int64(2), math.nan, math.inf],
        "t": (torch.float32, None, True),
        "x": np.eye(1),
    }
    expected = {"a": 0.5, "1": [2, None, None], "t": ["torch.float32", None, True], "x": [[1.0]]}
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)


# hashes


def test_fingerprint_is_of_the_model_and_not_of_its_place(model, tmp_path):
    from transformers import AutoModelForCausalLM

    first = model_fingerprint(model)
    assert first == model_fingerprint(model) and first.startswith("sha256:")
    model.save_pretrained(tmp_path / "copy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert model_fingerprint(loaded) == first
    assert model_fingerprint(loaded.to(torch.bfloat16)) != first


@pytest.mark.parametrize("change", ["weights", "shape", "config"])
def test_fingerprint_notices(model, tokenizer, change):
    size = {"vocab_size": len(tokenizer)} | ({"num_hidden_layers": 2} if change == "shape" else {})
    other = tiny_models.make("llama", torch.float32, **size)
    assert (model_fingerprint(other) == model_fingerprint(model)) == (change != "shape")
    if change == "weights":
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1e-4)
    if change == "config":
        other.config.rms_norm_eps = 1e-3
    assert model_fingerprint(other) != model_fingerprint(model)


def test_data_hash_is_of_the_tokens(pairs, tokenizer):
    assert data_hash(pairs) == data_hash(pa.tasks.arithmetic(tokenizer, n=12))
    assert data_hash(pairs) != data_hash(pa.tasks.arithmetic(tokenizer, n=12, seed=1))
    assert data_hash(pairs) != data_hash(pairs.subset(range(11)))
    assert data_hash(pairs) != data_hash(pairs.subset(range(11, -1, -1)))
    room = {"clean": 7, "corrupted": 7, "attention_mask": False, "roles": -1}
    wider = {name: np.pad(getattr(pairs, name), ((0, 0), (0, 3)), constant_values=fill) for name, fill in room.items()}
    assert data_hash(dataclasses.replace(pairs, **wider)) == data_hash(pairs)
