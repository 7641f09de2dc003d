"""SelectiveTuner: which entries are trained, with which gradients, and how the model is given back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny_models
import torch
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.models.sites import SLICES
from pyarith.tuning import loss as tuning_loss
from pyarith.tuning.slices import joined

HEADS = [(1, 0), (1, 3), (2, 2)]
LAST = [(2, 1)]


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(tiny_models.VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def trained_places(model: Any, heads: list[tuple[int, int]], kv: str, mlps: tuple[int, ...] = ()) -> dict[str, Any]:
    """Parameter name -> bool tensor, worked out from the config alone."""
    config, kind = model.config, model.config.model_type
    n_heads = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_heads
    if kind == "falcon":
        n_kv = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    d = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    names = {
        "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp."),
        "gpt_neox": (
            "gpt_neox.layers.{}.attention.query_key_value",
            "gpt_neox.layers.{}.attention.dense",
            "gpt_neox.layers.{}.mlp.",
        ),
        "phi3": ("model.layers.{}.self_attn.qkv_proj", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp."),
        "phi": ("model.layers.{}.self_attn.", "model.layers.{}.self_attn.dense", "model.layers.{}.mlp."),
        "gptj": ("transformer.h.{}.attn.", "transformer.h.{}.attn.out_proj", "transformer.h.{}.mlp."),
        "falcon": (
            "transformer.h.{}.self_attention.query_key_value",
            "transformer.h.{}.self_attention.dense",
            "transformer.h.{}.mlp.",
        ),
    }.get(kind, ("model.layers.{}.self_attn.", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp."))
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}

    def mark(module: str, outputs: bool, places: range) -> None:
        weight = found[f"{module}.weight"]
        (weight.T if outputs == (kind == "gpt2") else weight)[places] = True  # Conv1D keeps [in, out]
        if outputs and f"{module}.bias" in found:
            found[f"{module}.bias"][places] = True

    for layer, head in heads:
        kv_head = head // (n_heads // n_kv)
        for part in "qkv" if kv == "group" else "q":
            own = head if part == "q" else kv_head
            module = names[0].format(layer)
            if kind == "gpt_neox":
                first = 3 * d * own + "qkv".index(part) * d
            elif kind == "falcon" and config.new_decoder_architecture:  # 2 q, k, v of each kv head
                place = {"q": 4 * kv_head + head % 2, "k": 4 * kv_head + 2, "v": 4 * kv_head + 3}[part]
                first = place * d
            elif kind == "falcon" and not config.multi_query:
                first = (3 * own + "qkv".index(part)) * d
            elif kind in ("gpt2", "phi3", "falcon"):
                first = {"q": 0, "k": n_heads, "v": n_heads + n_kv}[part] * d + own * d
            else:
                module, first = f"{module}{part}_proj", own * d
            mark(module, True, range(first, first + d))
        mark(names[1].format(layer), False, range(head * d, head * d + d))
    for layer in mlps:
        for name, places in found.items():
            if name.startswith(names[2].format(layer)):
                places.fill_(True)
    return found


def compact(one: Any, full: torch.Tensor) -> torch.Tensor:
    return torch.cat([full.narrow(one.dim, start, stop - start) for start, stop in one.ranges], one.dim)


@pytest.mark.parametrize("kv", ["group", "none"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_gradients_are_those_of_the_whole_model_at_the_chosen_entries(name, kv):
    model, other = tiny_models.make(name), tiny_models.make(name)
    mlps = () if name in tiny_models.MOE else (1,)
    data, expected = batch(), trained_places(other, HEADS, kv, mlps)
    want = other(**data)
    want.loss.backward()
    with pa.SelectiveTuner(model, HEADS, mlps=mlps, kv=kv) as tuner:
        found = model(**data)
        assert torch.equal(found.logits, want.logits) and torch.equal(found.loss, want.loss)
        found.loss.backward()
        reference = dict(other.named_parameters())
        seen = {parameter: torch.zeros_like(places) for parameter, places in expected.items()}
        for one, value in zip(tuner.slices, tuner.parameters(), strict=True):
            grad = compact(one, reference[one.name].grad)
            torch.testing.assert_close(value.grad, grad, rtol=1e-9, atol=1e-12)
            assert torch.equal(value, compact(one, reference[one.name]))
            for start, stop in one.ranges:
                seen[one.name].narrow(one.dim, start, stop - start).fill_(True)
        assert {n: p.tolist() for n, p in seen.items()} == {n: p.tolist() for n, p in expected.items()}
        assert [p.grad for n, p in model.named_parameters() if not n.startswith(SLICES)] == [None] * len(reference)
        assert tuner.n_parameters == sum(int(places.sum()) for places in expected.values())


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_tuners_loss_is_the_models_own(name, monkeypatch):
    monkeypatch.setattr(tuning_loss, "_CHUNK_BYTES", 7 * 8 * tiny_models.VOCAB)  # several blocks, the last ragged
    monkeypatch.setattr(tuning_loss, "max", lambda _, rows: rows, raising=False)
    model, data = tiny_models.make(name), batch()
    with pa.SelectiveTuner(model, HEADS, mlps=[2]) as tuner, true_fp64():
        logits = model(input_ids=data["input_ids"]).logits[:, :-1].flatten(0, 1)
        want = torch.nn.functional.cross_entropy(logits, data["labels"][:, 1:].flatten())
        want.backward()
        grads = [value.grad for value in tuner.parameters()]
        for value in tuner.parameters():
            value.grad = None
        found = tuner.loss(**data)
        (3 * found).backward()
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
        for value, grad in zip(tuner.parameters(), grads, strict=True):
            torch.testing.assert_close(value.grad, 3 * grad, rtol=1e-9, atol=1e-13)
        with torch.no_grad():
            torch.testing.assert_close(tuner.loss(**data), want, rtol=1e-12, atol=0)
        with pytest.raises(pa.errors.InputError, match="labels: expected at least one"):
            tuner.loss(torch.full((1, 5), -100), input_ids=data["input_ids"][:1, :5])
    with pytest.raises(pa.errors.InputError, match="detached"):
        tuner.loss(**data)
    with pytest.raises(pa.errors.UnsupportedModelError, match="frozen unembedding"):
        tuning_loss.label_loss(tuner._sites, **data)


def test_nothing_is_recorded_below_the_first_trained_layer():
    model, needs = tiny_models.make("llama"), {}
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _m, _a, out, layer=layer: needs.update({layer: out.requires_grad}))
    with pa.SelectiveTuner(model, LAST) as tuner:
        assert tuner.first_layer == 2
        model(**batch()).loss.backward()
    assert needs == {0: False, 1: False, 2: True}


def test_columns_keep_their_own_features_only():
    """What the backward pass of W_O's columns holds is of the size of the chosen heads."""
    model, kept = tiny_models.make("llama"), []
    with (
        pa.SelectiveTuner(model, LAST),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append((tuple(x.shape), x)) or x, lambda x: x),
    ):
        model(**batch())
    o_proj = model.model.layers[2].self_attn.o_proj.weight
    at = next(i for i, (_, tensor) in enumerate(kept) if tensor is o_proj)
    assert kept[at + 1][0] == (3, 9, 8)  # batch, pos, d_head of one head


def test_the_model_is_given_back_as_it_was():
    model, data = tiny_models.make("llama-gqa2"), batch()
    parameters = dict(model.named_parameters())
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    before = {name: (set(vars(module)), list(module._modules)) for name, module in model.named_modules()}
    keys, logits = list(model.state_dict()), model(**data).logits
    with pytest.raises(KeyboardInterrupt), pa.SelectiveTuner(model, HEADS) as tuner:
        assert list(model.state_dict()) == keys
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"{SLICES}.{one.name.replace('.', '/')}" for one in tuner.slices
        }
        raise KeyboardInterrupt
    assert not tuner.attached and "detached" in repr(tuner)
    assert {name: (set(vars(module)), list(module._modules)) for name, module in model.named_modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(**data).logits, logits)
    for call in (tuner.sync, lambda: tuner.load_state_dict({})):
        with pytest.raises(pa.errors.InputError, match="detached"):
            call()
    tuner.detach()


def test_weights_follow_slices_set_by_hand_and_slices_follow_loaded_weights():
    model, data = tiny_models.make("gpt2"), batch()
    with pa.SelectiveTuner(model, HEADS) as tuner:
        value, one = next(tuner.parameters()), tuner.slices[0]
        with torch.no_grad():
            value.add_(1.0)
        assert not torch.equal(compact(one, one.weight), value)
        model(**data)
        assert torch.equal(compact(one, one.weight), value)
        state = {name: tensor + 0.5 for name, tensor in model.state_dict().items()}
        assert model.load_state_dict(state) == ([], [])
        for one, value in zip(tuner.slices, tuner.parameters(), strict=True):
            assert torch.equal(value, compact(one, state[one.name]))
        new = {one.name: torch.full(one.shape, 2.0, dtype=torch.float64) for one in tuner.slices}
        tuner.load_state_dict(new)
        assert all(bool((compact(one, one.weight) == 2).all()) for one in tuner.slices)
        first = next(iter(new))
        with pytest.raises(pa.errors.InputError, match=rf"slices of this tuner; {first}: expected .* got None"):
            tuner.load_state_dict({name: value for name, value in new.items() if name != first})


def test_masters_of_16_bit_weights_keep_what_rounding_would_lose():
    model = tiny_models.make("llama", torch.bfloat16)
    with pa.SelectiveTuner(model, HEADS) as tuner:
        one, value = tuner.slices[0], next(tuner.parameters())
        assert value.dtype == torch.float32
        start = value.detach().clone()
        for _ in range(64):
            with torch.no_grad():
                value.add_(start.abs() * 2**-12)  # an eighth of a bf16 step
            tuner.sync()
        torch.testing.assert_close(value.detach(), start + start.abs() * 2**-6, rtol=1e-3, atol=0)
        assert torch.equal(compact(one, one.weight), value.bfloat16())
        low = value.detach().clone()
        model.load_state_dict(model.state_dict())  # the same weights: the masters keep their low bits
        assert torch.equal(value, low)
        model(**batch()).loss.backward()
        assert value.grad.dtype == torch.float32
        with pa.ablated(model, LAST):  # works beside a tuner
            model(**batch())


def test_what_is_said_of_shared_keys_and_of_sizes():
    model = tiny_models.make("llama-gqa2")
    with pa.SelectiveTuner(model, [(1, 0), (2, 2), (2, 3)]) as tuner:
        assert tuner.shared_heads == ((1, 1),)
        sizes = tuner.state_bytes
        assert sizes["gradients"] == sizes["slices"] == tuner.n_parameters * 8 and sizes["adamw"] == 2 * sizes["slices"]
        assert "3 heads, 0 MLPs in layers 1-2" in repr(tuner) and "shared with heads that were not chosen: 1.1" in repr(
            tuner
        )
    with pa.SelectiveTuner(model, [(1, 0)], kv="none") as tuner:
        assert tuner.shared_heads == () and {one.name.split(".")[-2] for one in tuner.slices} == {"q_proj", "o_proj"}
    assert joined([(4, 6), (0, 2), (2, 4), (8, 9)]) == ((0, 6), (8, 9))


@pytest.mark.parametrize(
    ("heads", "options", "error", "message"),
    [
        ([], {}, pa.errors.InputError, "at least one head or MLP"),
        ([(0, 4), (3, 0)], {}, pa.errors.InputError, r"got 0\.4, 3\.0"),
        ([(0, 1), (0, 1)], {}, pa.errors.InputError, "got twice 0.1"),
        ([(0, 1)], {"mlps": [7]}, pa.errors.InputError, "layers 0 to 2, got 7"),
        ([(0, 1)], {"kv": "all"}, pa.errors.InputError, "kv: expected one of group, none, got 'all'"),
        (["0.1"], {}, pa.errors.InputTypeError, r"\(layer, head\) tuples"),
    ],
)
def test_bad_choices_are_refused_and_change_nothing(heads, options, error, message):
    model = tiny_models.make("llama")
    with pytest.raises(error, match=message):
        pa.SelectiveTuner(model, heads, **options)
    assert not hasattr(model, SLICES) and all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_tuned_are_refused():
    model = tiny_models.make("llama")
    with pa.SelectiveTuner(model, LAST):
        with pytest.raises(pa.errors.InputError, match="attached already"):
            pa.SelectiveTuner(model, HEADS)
        with pytest.raises(pa.errors.InputError, match="without an attached SelectiveTuner to copy"):
            copy.deepcopy(model)
        pairs = tiny_models.inputs(tiny_models.prompts(), [1, 2, 3], "left")
        with pytest.raises(pa.errors.UnsupportedModelError, match="detach the SelectiveTuner"):
            pa.fast_patch(model, **pairs, progress=False)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(pa.errors.UnsupportedModelError, match="share weights"):
        pa.SelectiveTuner(model, [], mlps=[1, 2])
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(torch.nn.Linear(32, 32, dtype=torch.float64))
    with pytest.raises(pa.errors.UnsupportedModelError, match=r"layers\.1\.self_attn\.q_proj to be a plain"):
        pa.SelectiveTuner(model, HEADS)
    model.model.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(pa.errors.UnsupportedModelError, match=r"outside plain linear projections.*extra"):
        pa.SelectiveTuner(model, [], mlps=[1])
    assert all(p.requires_grad for p in model.parameters())


def test_compiled_and_checkpointed_models_train_alike():
    model, data = tiny_models.make("llama-gqa2"), batch()
    model.config.use_cache = False
    with pa.SelectiveTuner(model, HEADS, mlps=[1]) as tuner:

        def grads(run: Any) -> list[torch.Tensor]:
            run(**data).loss.backward()
            found = [value.grad for value in tuner.parameters()]
            for value in tuner.parameters():
                value.grad = None
            return found

        want = grads(model)
        model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for module in model.modules():
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that no input needs a gradient, for one
            checkpointed = grads(model)
        model.activation_checkpointing_disable()
        model.eval()
        compiled = torch.compile(model, backend="aot_eager")
        by_compiler = grads(compiled)
        for found in (checkpointed, by_compiler):
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        compiled(**data).loss.backward()
        optimizer.step()
        assert torch.equal(compiled(**data).loss, model(**data).loss)
        torch._dynamo.reset()
