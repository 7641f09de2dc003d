"""precise_sft: what it trains and what it leaves, settings, cache, packing, resuming, results, refusals."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import differences, of_model, of_torch
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.errors import InputError, MemoryBudgetError, NonFiniteError, UnsupportedModelError
from pyarith.evaluation import accuracy
from pyarith.models.fingerprint import model_fingerprint
from pyarith.tuning import Examples, TuneSettings, load_examples, precise_sft, sft, task_examples
from pyarith.tuning.batches import Batches
from pyarith.tuning.loop import COLUMNS

HEADS = [(2, 7), (3, 7), (2, 2), (3, 3), (2, 3), (4, 2)]  # of the demo model, those that carry arithmetic
QUICK = {"lr": 2e-3, "steps": 4, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return pa.load_demo()[1]


@pytest.fixture
def demo():
    return pa.load_demo()[0]


def examples_of(lengths=(5, 9, 3, 7, 2, 6, 4, 8, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(0, tiny_models.VOCAB, length) for length in lengths)
    trained = tuple(np.arange(length) >= max(1, length // 2) for length in lengths)
    return Examples(ids, trained, np.arange(1, len(ids) + 1))


def tuned(model, data=None, heads=((1, 0), (2, 3)), mlps=(), **options):
    """precise_sft on a tiny model, which needs no tokenizer for Examples."""
    quick = {"lr": 1e-2, "steps": 5, "batch_size": 4, "micro_batch_size": 2, "progress": False}
    return precise_sft(model, None, data or examples_of(), heads, mlps, **{**quick, **options})


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def same(one, other):
    return changed(values(one), other) == set()


# what it does


def test_division_gets_better_and_the_rest_keeps_its_bits(demo, tokenizer):
    """Thirty steps on the weak operator: loss down, accuracy on other prompts up, nothing else touched."""
    problems = pa.tasks.draw_problems("/", n=240)
    pairs, seen = pa.tasks.arithmetic(tokenizer, "/", n=160, seed=5), {one.prompt for one in problems}
    fresh = pairs.subset([i for i, text in enumerate(pairs.prompts) if text not in seen])
    before, state, worse = accuracy(demo, fresh).value, values(demo), of_model(demo)
    base = model_fingerprint(demo)
    result = precise_sft(demo, tokenizer, problems, HEADS, **{**QUICK, "steps": 30})
    print(result, before, accuracy(demo, fresh).value)
    assert result.losses[-4:].mean() < 0.85 * result.losses[:4].mean() and len(fresh) > 120
    assert accuracy(demo, fresh).value > before + 0.05
    parts = {"q_proj": (0, [7, 2, 3]), "k_proj": (0, [7, 2, 3]), "v_proj": (0, [7, 2, 3]), "o_proj": (1, [7, 2, 3])}
    names = {f"model.layers.{layer}.self_attn.{part}.weight" for layer in (2, 3, 4) for part in parts}
    assert changed(state, demo) == names
    for part, (axis, heads) in parts.items():  # in layer 2 the three heads and nothing beside them
        name = f"model.layers.2.self_attn.{part}.weight"
        moved = (demo.state_dict()[name] != state[name]).any(1 - axis).view(8, 16).any(1)
        assert moved.nonzero().flatten().tolist() == sorted(heads)
    left = [name for name in differences(worse, of_model(demo)) if not name.endswith((": value", ": parameter"))]
    assert left == [], "an ordinary model again"
    assert result.base == base != model_fingerprint(demo)
    assert result.n_parameters == 6 * 4 * 16 * 128 and result.data["task"]["examples"] == 240


def test_it_is_the_plain_loop_over_the_model_and_its_optimizer():
    """Against SelectiveTuner, model(labels=) and torch's AdamW, written out; in fp64 but for the factor of clipping."""
    settings = TuneSettings(
        lr=1e-2, lr_scale=0.5, weight_decay=0.1, steps=4, batch_size=4, warmup=0.0, schedule="linear"
    )
    one, other = tiny_models.make("llama-gqa2"), tiny_models.make("llama-gqa2")
    with true_fp64():
        result = tuned(one, mlps=[1], settings=settings, steps=4, lr=1e-2, max_grad_norm=0.1, grad_scale=2.0)
        batches = Batches(examples_of(), 4, 4)
        losses = []
        with pa.SelectiveTuner(other, [(1, 0), (2, 3)], [1]) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1.0, weight_decay=0.1)
            for step in range(4):
                optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 4)
                (micro,) = batches.at(step)
                loss = other(**micro.inputs(), labels=micro.labels).loss
                losses.append(loss.item())
                (2.0 * loss).backward()
                torch.nn.utils.clip_grad_norm_(tuner.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    assert result.losses == pytest.approx(losses, rel=1e-7)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-6, atol=1e-8, msg=name)


def test_scales_are_separate_settings_and_recorded():
    models = [tiny_models.make("llama", torch.float32) for _ in range(4)]
    plain = tuned(models[0], lr=1e-2)
    scaled = tuned(models[1], lr=5e-3, lr_scale=2.0)
    assert same(models[0], models[1]) and plain.history["lr"].tolist() == scaled.history["lr"].tolist()
    kept = {name: scaled.settings[name] for name in ("lr", "lr_scale", "lr_used", "grad_scale", "grad_scale_used")}
    assert kept == {"lr": 5e-3, "lr_scale": 2.0, "lr_used": 1e-2, "grad_scale": 1.0, "grad_scale_used": 1.0}
    # 3 layers of 4 heads, 2 chosen; under Adam the factor is nearly nothing, before eps and clipping
    paper = tuned(models[2], lr=1e-2, grad_scale="heads", max_grad_norm=None)
    free = tuned(models[3], lr=1e-2, max_grad_norm=None)
    assert paper.settings["grad_scale_used"] == 6.0 and not same(models[2], models[3])
    assert paper.losses == pytest.approx(free.losses, rel=1e-3)
    with pytest.raises(InputError, match="grad_scale: expected a number where no heads are chosen, got 'heads'"):
        tuned(models[3], heads=(), mlps=[1], grad_scale="heads")


def test_an_unembedding_with_a_bias():
    """As Phi and GPT-J have: the loss is that of labels=."""
    model = tiny_models.make("llama", torch.float32)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, tiny_models.VOCAB))
    (micro,) = Batches(examples_of(), 10, 10).at(0)
    own = model(**micro.inputs(), labels=micro.labels).loss
    assert tuned(model, batch_size=10, steps=1).losses[0] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "neox", "gemma2"])
def test_other_families(name):
    """Fused projections, Conv1D, parallel blocks, a final softcap: packed and padded give the same training in fp64."""
    models, states = [tiny_models.make(name) for _ in range(2)], []
    with true_fp64():
        results = [tuned(model, packing=packing) for model, packing in zip(models, (False, True), strict=True)]
        states = [model.state_dict() for model in models]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-9)
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-7, atol=1e-9, msg=key)
    untouched = [key for key in states[0] if torch.equal(states[0][key], tiny_models.make(name).state_dict()[key])]
    assert all(any(part in key for key in untouched) for part in ("norm" if name not in ("gpt2",) else "ln_", "mlp"))


def test_a_model_that_leaks_between_packed_examples_is_refused(monkeypatch):
    model = tiny_models.make("llama", torch.float32)
    before = values(model)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"packing: LlamaForCausalLM .* does not keep the examples"):
        tuned(model, packing=True)
    assert changed(before, model) == set() and not hasattr(model, "pyarith_slices")


def test_a_prefix_cache_keeps_the_bits_where_groups_stay():
    models = [tiny_models.make("llama-gqa2", torch.float32) for _ in range(5)]
    options = {"heads": [(2, 3)], "steps": 12, "regroup": False}
    plain, cached = tuned(models[0], **options), tuned(models[1], **options, prefix_cache="1MiB")
    assert same(models[0], models[1]) and plain.losses.tolist() == cached.losses.tolist()
    stats = cached.prefix_cache
    assert (
        plain.prefix_cache is None and (stats["computed"], stats["bit_identical"]) == (5, True) and stats["served"] > 5
    )
    tuned(models[2], **options, prefix_cache="1MiB", packing=True)
    free = tuned(models[3], **{**options, "regroup": True})
    mixed = tuned(models[4], **{**options, "regroup": True}, prefix_cache="1MiB")
    assert mixed.losses == pytest.approx(free.losses, rel=1e-4) and mixed.prefix_cache["assembled"] > 0
    assert mixed.record()["prefix_cache"] == mixed.prefix_cache


def test_replay_with_weight_one_is_training_without():
    models = [tiny_models.make("llama", torch.float32) for _ in range(3)]
    general = examples_of((4, 8, 6), seed=9)
    plain = tuned(models[0])
    one = tuned(models[1], replay=general, task_weight=1.0)
    assert same(models[0], models[1]) and plain.losses.tolist() == one.losses.tolist()
    half = tuned(models[2], replay=general, task_weight=0.5, replay_batch_size=2)
    weighted = 0.5 * half.history["task_loss"] + 0.5 * half.history["general_loss"]
    assert half.losses == pytest.approx(weighted) and half.data["replay"]["examples"] == 3
    assert half.losses[0] != plain.losses[0] == pytest.approx(half.history["task_loss"][0])
    with pytest.raises(InputError, match=r"replay: expected general data beside task_weight=0\.5"):
        tuned(models[2], task_weight=0.5)


def test_same_seed_same_bits_and_torchs_own_generator_is_left_alone():
    models = [tiny_models.make("gpt2", torch.float32, resid_pdrop=0.2).train() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(5)  # what was drawn before does not matter
        before = of_torch()
        tuned(model, seed=seed)
        assert model.training and differences(before, of_torch()) == []
    assert same(models[0], models[1]) and not same(models[0], models[2])
    ordered = [tuned(tiny_models.make("gpt2", torch.float32), seed=seed).losses.tolist() for seed in (1, 1, 2)]
    assert ordered[0] == ordered[1] != ordered[2], "the order of examples"


# interrupted


def stop_after(step):
    def told(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    return told


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": "1MiB", "regroup": False, "heads": [(2, 3)]},
        {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3},
        {"name": "gpt2", "replay": examples_of((4, 8, 6), seed=9), "task_weight": 0.5, "packing": True},
    ],
    ids=["plain", "cache", "bf16", "replay"],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, options):
    options = {"steps": 9, "save_every": 2, **options}
    name, dtype = options.pop("name", "llama"), options.pop("dtype", torch.float32)
    models = [tiny_models.make(name, dtype, **({"resid_pdrop": 0.1} if name == "gpt2" else {})) for _ in range(3)]
    for model in models:
        model.train()
    whole = tuned(models[0], **options)
    with pytest.raises(KeyboardInterrupt):
        tuned(models[1], **options, out=tmp_path, progress=stop_after(5))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    again = tuned(models[2], **options, out=tmp_path)
    assert same(models[0], models[2]) and not same(models[0], models[1])
    for column in set(COLUMNS) - {"seconds", "memory"}:
        assert np.array_equal(whole.history[column], again.history[column], equal_nan=True), column
    assert (whole.resumed_at, again.resumed_at) == (None, 4) and not (tmp_path / "checkpoint.safetensors").exists()


def test_the_checkpoint_of_another_run_is_refused_unless_it_may_be_replaced(tmp_path):
    def begin(**options):
        with pytest.raises(KeyboardInterrupt):
            tuned(tiny_models.make("llama", torch.float32), out=tmp_path, progress=stop_after(4), **options)

    begin()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    cases = [
        ({"lr": 0.5}, "settings.lr was 0.01, now 0.5"),
        ({"heads": [(1, 1)]}, 'heads was ["1.0", "2.3"], now ["1.1"]'),
        ({"mlps": [1]}, "mlps was [], now [1]"),
        ({"data": examples_of(seed=4)}, "data.task was"),
        ({"model": tiny_models.make("llama", torch.float32, seed=4)}, "base was"),
    ]
    for options, words in cases:
        model = options.pop("model", None) or tiny_models.make("llama", torch.float32)
        state = values(model)
        with pytest.raises(InputError) as caught:
            tuned(model, out=tmp_path, **options)
        assert words in str(caught.value) and changed(state, model) == set()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    begin(resume=False, lr=0.5, save_every=1)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() != before
    assert tuned(tiny_models.make("llama", torch.float32), out=tmp_path, lr=0.5).resumed_at == 4  # save_every is free


def test_what_is_not_finite_leaves_the_last_good_state(tmp_path):
    model, good = (tiny_models.make("llama", torch.float32) for _ in range(2))
    tuned(good, steps=9, progress=False, schedule="constant", warmup=0.0, lr=1e-2)
    with pytest.raises(NonFiniteError, match=r"step (\d+) of 9: expected finite numbers, got loss") as caught:
        tuned(model, steps=9, lr=1e18, schedule="constant", warmup=0.0, out=tmp_path)
    step = int(str(caught.value).split()[1])
    assert step > 1 and f"the state after step {step - 1} is in the model and in {tmp_path}" in str(caught.value)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert not hasattr(model, "pyarith_slices") and all(value.grad is None for value in model.parameters())
    again = tiny_models.make("llama", torch.float32)
    with pytest.raises(KeyboardInterrupt):
        tuned(again, steps=9, lr=1e18, schedule="constant", warmup=0.0, progress=stop_after(step - 1))
    assert same(model, again)


def test_out_of_memory_names_what_to_lower(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sft, "label_loss", full)
    with pytest.raises(MemoryBudgetError, match="micro_batch_size: out of memory on cpu with 2 rows at once"):
        tuned(tiny_models.make("llama", torch.float32))


# what is written


def test_files_of_a_run(tmp_path):
    model = tiny_models.make("llama-gqa2", torch.float32)
    result = tuned(model, out=tmp_path / "run", mlps=[1])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"delta", "tune.json", "losses.csv"}
    record = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert record["heads"] == ["1.0", "2.3"] and record["mlps"] == [1] and record["shared_heads"] == ["1.1", "2.2"]
    assert record["settings"]["lr"] == 1e-2 and record["steps"] == 5 and record["steps_per_epoch"] == 3
    assert record["machine"] == {"device": "cpu", "dtype": "float32", "attention": "eager", "threads": 1}
    assert record["data"]["task"]["hash"] == examples_of().hash and record["base"].startswith("sha256:")
    assert record["loss"]["last"] == result.losses[-1] and record["versions"]["torch"] == metadata.version("torch")
    with open(tmp_path / "run" / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == result.losses.tolist() and rows[0]["general_loss"] == ""
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5] and int(rows[0]["tokens"]) == result.history["tokens"][
        0
    ]
    assert result.delta == tmp_path / "run" / "delta" and "5 steps on 10 examples" in repr(result)
    result.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tune.json").read_text() == (tmp_path / "run" / "tune.json").read_text()


def test_a_saved_delta_gives_the_tuned_model_back(tmp_path, demo, tokenizer):
    precise_sft(demo, tokenizer, task_examples(tokenizer, "/", 32), HEADS[:2], out=tmp_path, **QUICK)
    again = pa.load_demo()[0]
    pa.load_delta(again, tmp_path / "delta")
    assert same(demo, again)


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": []}, "heads, mlps: expected at least one"),
        ({"heads": [(9, 9)]}, "9.9"),
        ({"heads": [(2, 7), (2, 7)]}, "2.7"),
        ({"mlps": [6]}, "6"),
        ({"kv": "all"}, "kv: expected one of group, none, got 'all'"),
        ({"settings": "fast"}, "settings: expected TuneSettings or one of default, paper, got 'fast'"),
        ({"rate": 1.0}, "settings: expected some of lr, "),
        ({"data": []}, "data: expected at least one row, got none"),
        ({"data": [("8 / 4 =", ""), ("", "2")]}, "empty in 1 (row 1); the prompt is empty in 1 (row 2)"),
        ({"data": [*[("8 / 4 =", "2")] * 2, ("8 " * 300, "2")]}, "more than 256 tokens in 1 (row 3)"),
        ({"data": [("8 / 4 =", "2"), ("8 / 4 =", "2 2 2 2")], "max_length": 8}, "more than 8 tokens in 1 (row 2)"),
        ({"replay": [("8", " ")], "task_weight": 0.5}, "the completion is empty in 1 (row 1)"),
        ({"prefix_cache": "1MiB", "heads": [(0, 1)]}, "nothing to keep"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_error_and_changes_nothing(demo, tokenizer, tmp_path, options, words):
    options = {
        "data": [("8 / 4 =", "2"), ("6 / 2 =", "3")],
        "heads": HEADS[:1],
        **QUICK,
        "out": tmp_path / "run",
        **options,
    }
    before = of_model(demo)
    with pytest.raises(InputError) as caught:
        precise_sft(demo, tokenizer, options.pop("data"), options.pop("heads"), **options)
    assert words in str(caught.value)
    assert differences(before, of_model(demo)) == [] and not (tmp_path / "run").exists()


def test_examples_that_are_too_long_for_model_or_settings(demo, tokenizer):
    long = load_examples([("8 / 4 =", "2"), ("8 " * 300, "2")], tokenizer)
    with pytest.raises(InputError, match=r"data: expected at most 256 tokens \(the model's max_position_embeddings\)"):
        precise_sft(demo, tokenizer, long, HEADS, **QUICK)
    with pytest.raises(InputError, match=r"at most 6 tokens \(max_length\), got more in 2 of 2 examples \(row 1, 2\)"):
        precise_sft(demo, tokenizer, long, HEADS, max_length=6, **QUICK)


def test_losses_of_a_result_are_told_without_numbers_that_are_not_there():
    result = tuned(tiny_models.make("llama", torch.float32), steps=1)
    row = result.rows()[0]
    assert row["general_loss"] is None and row["step"] == 1 and isinstance(row["tokens"], int)
    assert json.loads(json.dumps(result.record(), allow_nan=False))["steps"] == 1
    assert math.isnan(replace(result).history["general_loss"][0])
