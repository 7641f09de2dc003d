"""Deltas in a model: loaded, taken out, switched and merged, bit for bit; models that they are not made for."""

from __future__ import annotations

import copy
import hashlib
import re
from typing import Any

import pytest
import tiny_models
import torch
from deltas import HEADS, MLPS, base, logits, same, shift, state, tuned

import pyarith as pa
from pyarith.errors import InputError
from pyarith.models.fingerprint import model_fingerprint
from pyarith.tuning import delta as delta_module
from pyarith.tuning import delta_load, read_delta
from pyarith.tuning.delta import slice_hash

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_loaded_and_taken_out_bit_for_bit(name, dtype, tmp_path):
    model, other = base(name, dtype), base(name, dtype)
    before, kept = state(other), set(vars(other))
    trained = tuned(model, tmp_path)
    assert not same(other, trained)
    loaded = pa.load_delta(other, tmp_path)
    assert same(other, trained) and loaded.loaded and other.pyarith_delta is loaded
    assert torch.equal(logits(other), logits(model))
    assert (loaded.delta.heads, loaded.delta.mlps, loaded.delta.kv) == (tuple(HEADS), tuple(MLPS), "group")
    assert loaded.delta.settings == {"lr": 1e-3, "seed": 0}
    loaded.unload()
    assert same(other, before) and not loaded.loaded and "unloaded" in repr(loaded) and set(vars(other)) == kept
    loaded.unload()
    with pytest.raises(KeyboardInterrupt), pa.load_delta(other, tmp_path):
        assert same(other, trained)
        raise KeyboardInterrupt
    assert same(other, before)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in tiny_models.NAMES]
    + [(name, torch.bfloat16) for name in ("llama-gqa4", "gemma2", "gpt2")],
)
def test_merged_saved_and_loaded_gives_the_same_logits(name, dtype, tmp_path):
    """Llama-gqa4 and GPT-2 tie the unembedding to the embedding; GPT-2 has Conv1D."""
    from transformers import AutoModelForCausalLM

    def load(folder: Any) -> Any:  # as users do: rotary tables in fp32, which a cast to bf16 would round
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager").eval()

    base(name, dtype).save_pretrained(tmp_path / "base")
    model, other = load("base"), load("base")
    trained = tuned(model, tmp_path / "delta", kv="none")
    merged = pa.merge_delta(other, tmp_path / "delta")
    assert same(other, trained) and not hasattr(other, "pyarith_delta")
    assert merged.n_parameters == sum(value.numel() for value in merged.values.values())
    other.save_pretrained(tmp_path / "merged")
    again = load("merged")
    assert same(again, trained) and again.dtype == dtype
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(load("base")))


@pytest.mark.parametrize("name", ["llama-gqa2", "gpt2"])
def test_switching_between_overlapping_deltas_restores_the_base(name, tmp_path):
    chosen = {"a": ([(1, 0), (1, 3)], []), "b": ([(1, 3), (2, 2)], [2]), "c": ([], [2])}
    states: dict[Any, Any] = {}
    for seed, (key, (heads, mlps)) in enumerate(chosen.items()):
        states[key] = tuned(base(name), tmp_path / key, heads, mlps, seed)
    model = base(name)
    states[None] = state(model)
    with pa.DeltaBank(model) as bank:
        for key in chosen:
            bank.load(key, tmp_path / key)
            assert same(model, states[None]) and bank.active is None
        for key in ("a", "b", None, "b", "a", "a", "c", "b", None, None, "c", "a"):
            bank.use(key)
            assert bank.active == key and same(model, states[key]), key
        assert bank.names == ("a", "b", "c") and repr(bank) == "DeltaBank: a, b, c; in the model: a"
        model.pyarith_delta.unload()  # by another hand
        assert bank.active is None
        bank.use("b")
        assert same(model, states["b"])
        bank.load("a again", tmp_path / "a")  # while b is in
        assert bank.active == "b" and same(model, states["b"])
    assert same(model, states[None])


def test_a_bank_that_refuses_leaves_what_is_in_the_model(tmp_path):
    model = base()
    trained = tuned(base(), tmp_path / "a")
    tuned(base(), tmp_path / "b", seed=1)
    tuned(base(seed=1), tmp_path / "foreign")
    bank = pa.DeltaBank(model)
    bank.load("a", tmp_path / "a")
    bank.load("b", tmp_path / "b")
    bank.use("a")
    for call, message in [
        (lambda: bank.load("b", tmp_path / "b"), "name: expected a new one, got 'b'"),
        (lambda: bank.use("c"), "name: expected None or one of a, b, got 'c'"),
        (lambda: bank.load("c", tmp_path / "foreign"), "expected the base of the delta"),
        (lambda: bank.load("c", tmp_path / "nowhere"), "without one"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
        assert bank.active == "a" and same(model, trained) and bank.names == ("a", "b")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    now = state(model)
    with pytest.raises(InputError, match=r"other values in lm_head\.weight$"):
        bank.use("b")
    assert bank.active == "a" and same(model, now)


def test_the_fingerprint_is_of_the_base_attached_or_not(tmp_path):
    model = base("gpt2")
    want = model_fingerprint(model)
    with pa.SelectiveTuner(model, HEADS, MLPS) as tuner:
        assert model_fingerprint(model) == tuner.base.fingerprint == want
        shift(tuner, 0)
        tuner.sync()
        assert model_fingerprint(model) != want
        tuner.save_delta(tmp_path)
    assert read_delta(tmp_path).base.fingerprint == want


def test_settings_that_leave_the_model_what_it_is_do_not_count(tmp_path):
    model, other = base(), base()
    model.config.use_cache, model.config.pad_token_id = False, 3
    trained = tuned(model, tmp_path)
    pa.load_delta(other, tmp_path)
    assert same(other, trained)


@pytest.mark.parametrize("name", ["llama-gqa2", "gpt2", "phi3"])
def test_slice_hashes_are_of_the_compact_bytes(name, monkeypatch):
    model = base(name, torch.bfloat16)
    with pa.SelectiveTuner(model, HEADS, MLPS) as tuner:
        assert {one.dim for one in tuner.slices} == {0, 1} and max(len(one.ranges) for one in tuner.slices) > 1
        for size in (1 << 24, 100):
            monkeypatch.setattr(delta_module, "_BLOCK", size)
            for one in tuner.slices:
                held = torch.cat(one.views(), one.dim).contiguous().view(torch.uint8).numpy().tobytes()
                assert slice_hash(one) == hashlib.sha256(held).hexdigest()


def plus_one(model: Any, name: str, place: Any) -> None:
    with torch.no_grad():
        model.get_parameter(name)[place] += 1


def test_every_value_of_the_slices_counts(tmp_path):
    """Single values that the samples of the fingerprint do not reach."""
    tuned(base(), tmp_path)
    fingerprint = read_delta(tmp_path).base.fingerprint
    for name, place in [("model.layers.1.self_attn.q_proj.weight", (25, 1)), ("model.layers.2.mlp.up_proj.weight", 0)]:
        inside = "self_attn" in name
        model = base()
        plus_one(model, name, place)
        if inside:
            assert model_fingerprint(model) == fingerprint  # else this test says nothing
        expected = "expected SHA-256 [0-9a-f]{12} of the slice, got" if inside else "other values in"
        with pytest.raises(InputError, match=expected) as error:
            pa.load_delta(model, tmp_path)
        assert name in str(error.value)


OTHERS = {
    "class": (lambda: base("mistral"), r"class: expected LlamaForCausalLM, got MistralForCausalLM"),
    "dtype": (lambda: base(dtype=torch.bfloat16), r"dtype: expected torch\.float32, got torch\.bfloat16"),
    "shape": (
        lambda: base(hidden_size=48),
        r"config\.hidden_size: expected 32, got 48; .*q_proj\.weight: expected \[32, 32\], got \[48, 48\]",
    ),
    "layers": (
        lambda: base(num_hidden_layers=2),
        r"num_hidden_layers: expected 3, got 2; model\.layers\.2.*: expected \[32, 32\], got no such parameter",
    ),
    "config": (lambda: base(rms_norm_eps=1e-3), r"config\.rms_norm_eps: expected 1e-06, got 0\.001$"),
    "weights": (lambda: base(seed=3), r"layers\.1\.self_attn\.q_proj\.weight: expected SHA-256 .*; and \d+ more$"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_another_model_is_refused_by_name(which, tmp_path):
    make, message = OTHERS[which]
    tuned(base(), tmp_path)
    model = make()
    before = state(model)
    for call in (pa.load_delta, pa.merge_delta):
        with pytest.raises(InputError, match=message):
            call(model, tmp_path)
        assert same(model, before) and not hasattr(model, "pyarith_delta")


def test_a_config_of_another_transformers_may_have_other_keys(tmp_path, monkeypatch):
    tuned(base(), tmp_path)
    model = base()
    model.config.new_setting = 1
    with pytest.raises(InputError, match=r"config\.new_setting: expected None, got 1"):
        pa.load_delta(model, tmp_path)
    record = tmp_path / "delta.json"
    record.write_text(re.sub(r'"transformers":"[^"]+"', '"transformers":"5.0.0"', record.read_text()))
    pa.load_delta(model, tmp_path).unload()
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(InputError, match="rms_norm_eps"):
        pa.load_delta(model, tmp_path)


def test_a_model_that_holds_the_delta_already_is_told_so(tmp_path):
    model = base()
    tuned(model, tmp_path)
    with pytest.raises(InputError, match="holds the values of this delta already"):
        pa.load_delta(model, tmp_path)
    with pytest.raises(InputError) as error:
        pa.load_delta(base(seed=2), tmp_path)
    assert "already" not in str(error.value)


def test_one_delta_or_tuner_at_a_time(tmp_path):
    tuned(base(), tmp_path / "a")
    tuned(base(), tmp_path / "b", [(0, 1)], [])
    model = base()
    with pa.SelectiveTuner(model, HEADS), pytest.raises(InputError, match="without a SelectiveTuner"):
        pa.load_delta(model, tmp_path / "a")
    loaded = pa.load_delta(model, tmp_path / "a")
    now = state(model)
    for call in (pa.load_delta, pa.merge_delta):
        with pytest.raises(InputError, match=r"one with a delta loaded .*pyarith_delta\.unload\(\).*DeltaBank"):
            call(model, tmp_path / "b")
    with pytest.raises(InputError, match="a delta is loaded"):
        pa.SelectiveTuner(model, HEADS)
    assert same(model, now) and loaded.loaded


def test_a_copy_of_a_model_takes_its_delta_out_of_itself(tmp_path):
    trained = tuned(base(), tmp_path)
    model = base()
    before = state(model)
    loaded = pa.load_delta(model, tmp_path)
    twin = copy.deepcopy(model)
    twin.pyarith_delta.unload()
    assert same(twin, before) and same(model, trained) and loaded.loaded and not hasattr(twin, "pyarith_delta")


def test_a_model_cast_meanwhile_is_not_restored_in_part(tmp_path):
    tuned(base(), tmp_path)
    model = base()
    before = state(model)
    loaded = pa.load_delta(model, tmp_path)
    model.bfloat16()
    now = state(model)
    with pytest.raises(InputError, match=r"unload: expected weights in torch\.float32.*got torch\.bfloat16"):
        loaded.unload()
    assert same(model, now) and loaded.loaded
    model.float()
    loaded.unload()
    with pa.SelectiveTuner(model, HEADS, MLPS) as tuner:
        for one in tuner.slices:
            whole = before[one.name]
            places = [whole.narrow(one.dim, start, stop - start) for start, stop in one.ranges]
            assert all(map(torch.equal, one.views(), places))


def test_interrupted_while_values_are_written(tmp_path, monkeypatch):
    tuned(base(), tmp_path)
    model, write = base(), delta_load._write
    before = state(model)

    def stopped(slices: Any, values: Any) -> None:
        monkeypatch.setattr(delta_load, "_write", write)
        write(slices[:2], values[:2])
        assert not same(model, before)
        raise KeyboardInterrupt

    monkeypatch.setattr(delta_load, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        pa.load_delta(model, tmp_path)
    assert same(model, before) and not hasattr(model, "pyarith_delta")
