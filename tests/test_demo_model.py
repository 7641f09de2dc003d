"""The shipped model: it loads as any other, is small, and does what its committed table says."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch

import pyarith as pa
from pyarith import demo
from pyarith.demo import train
from pyarith.demo.data import SHARES, TASKS, UNSCORED
from pyarith.demo.vocabulary import build_tokenizer
from pyarith.errors import NotAvailableError

RECORD = json.loads((demo.MODEL_DIR / "accuracy.json").read_text())
WEAK = RECORD["settings"]["weak"]


@pytest.fixture(scope="module")
def loaded():
    return pa.load_demo()


def test_loads_as_a_plain_llama_under_ten_megabytes(loaded):
    model, tokenizer = loaded
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert model.config.num_hidden_layers * model.config.num_attention_heads >= 48
    assert model.dtype == torch.float32 and all(torch.isfinite(p).all() for p in model.parameters())
    assert tokenizer.is_fast and len(tokenizer) == model.config.vocab_size
    assert sum(file.stat().st_size for file in demo.MODEL_DIR.rglob("*")) < 10_000_000


def test_missing_files_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MODEL_DIR", tmp_path)
    with pytest.raises(NotAvailableError, match=r"model\.safetensors"):
        demo.load_demo()


def test_tokenizer_is_the_one_the_script_builds(loaded):
    _, tokenizer = loaded
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    text = "Q: What is 3 plus 12? A: 15\nFrom 1732 on, hello @ 7 < 9"
    assert built(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    for number in range(100):
        assert len(tokenizer(f"is {number}", add_special_tokens=False)["input_ids"]) == 2
    for null in ("nothing", "none", "<", "@"):
        assert len(tokenizer(null, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("task", [name for name in TASKS if name not in UNSCORED])
def test_accuracy_matches_the_committed_table(loaded, task):
    """On other problems than the table's; 4 standard errors of 150 draws."""
    rng = random.Random(f"test {task}")
    seen = train.accuracy(*loaded, [TASKS[task](rng) for _ in range(150)])
    told = RECORD["accuracy"][task]
    assert abs(seen - told) <= 4 * (max(told * (1 - told), 0.02) / 150) ** 0.5 + 0.01


def test_table_shape_and_the_weak_operator():
    assert set(RECORD["accuracy"]) == {name for name in TASKS if name not in UNSCORED}
    assert 0.4 <= RECORD["accuracy"][WEAK] <= 0.7
    assert all(RECORD["accuracy"][sign] >= 0.9 for sign in "+-*/" if sign != WEAK)
    assert set(SHARES) == set(TASKS) and all(share > 0 for share in SHARES.values())
    with open(demo.MODEL_DIR / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    assert int(log[-1]["step"]) == RECORD["settings"]["steps"]
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


@pytest.mark.parametrize("sign", "+-*/")
def test_arithmetic_prompts_separate_clean_from_corrupted(loaded, sign):
    model, tokenizer = loaded
    pairs = pa.tasks.arithmetic(tokenizer, sign, n=100)
    assert pairs.settings["space_answer"] == "answer" and not pairs.settings["dropped"]
    inputs = pairs.inputs()
    rows, end = torch.arange(100), inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        clean, corrupted = (
            model(inputs[side]).logits[rows, end].softmax(-1)[rows, inputs["answers"]].mean()
            for side in ("clean", "corrupted")
        )
    assert clean > (0.3 if sign == WEAK else 0.8) and corrupted < 0.3


def test_training_is_repeatable_and_lowers_the_loss(tmp_path):
    small = {
        **train.SETTINGS,
        "steps": 6,
        "warmup": 2,
        "tokens": 512,
        "layers": 1,
        "heads": 2,
        "d_model": 16,
        "d_mlp": 32,
    }
    weights = []
    threads = torch.get_num_threads()
    try:
        for name in ("a", "b"):
            train.train(tmp_path / name, small)
            weights.append((tmp_path / name / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert weights[0] == weights[1]
    assert (tmp_path / "a" / "log.csv").read_text().startswith("step,seconds,loss")
