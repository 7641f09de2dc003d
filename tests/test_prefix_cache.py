"""Training with a ``PrefixCache`` is training without it: bit by bit for the same batches, else up to rounding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from prefix_runs import batch, fixed, reshuffled, rows, same, tiny, train, tuner
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, SDPA

import pyarith as pa
from pyarith.errors import InputError
from pyarith.models.sites import resolve
from pyarith.tuning import PrefixCache
from pyarith.tuning.loss import label_loss

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [(name, "sdpa" if name in SDPA else "eager", torch.float32) for name in NAMES] + [
    ("llama", "eager", torch.float32),
    ("gpt2", "eager", torch.float32),
    ("gemma2", "eager", torch.bfloat16),
    ("qwen3", "sdpa", torch.bfloat16),
    ("neox", "sdpa", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "attn", "dtype"), KINDS)
def test_the_same_batches_give_the_same_bits(name: str, attn: str, dtype: torch.dtype) -> None:
    plain = train(tiny(name, dtype, attn=attn), lambda _: fixed())
    cached = train(tiny(name, dtype, attn=attn), lambda _: fixed(), PrefixCache)
    assert same(plain, cached)
    assert len(set(plain[0])) == 9  # it does train
    stats = cached[2].stats()
    assert (stats["computed"], stats["served"], stats["assembled"], stats["bit_identical"]) == (3, 6, 0, True)


@pytest.mark.parametrize("name", NAMES)
def test_reshuffled_batches_stay_within_the_noise_floor(name: str) -> None:
    # not AdamW: it divides by the size of gradients, and that of a key bias is nothing but rounding
    sgd = partial(torch.optim.SGD, lr=0.1)
    plain = train(tiny(name, torch.float64, attn="eager"), reshuffled, optimizer=sgd)
    cached = train(tiny(name, torch.float64, attn="eager"), reshuffled, PrefixCache, optimizer=sgd)
    stats = cached[2].stats()
    assert (stats["computed"], stats["assembled"], stats["bit_identical"]) == (3, 6, False)
    assert max(abs(a - b) for a, b in zip(plain[0], cached[0], strict=True)) <= 1e-12
    assert max((plain[1][k] - cached[1][k]).abs().max().item() for k in plain[1]) <= 1e-12


def test_exact_serves_whole_batches_only() -> None:
    plain = train(tiny(), reshuffled)
    cached = train(tiny(), reshuffled, lambda one: PrefixCache(one, exact=True))
    assert same(plain, cached)
    assert (cached[2].stats()["computed"], cached[2].stats()["served"]) == (9, 0)


def test_deeper_prefixes() -> None:
    plain = train(tiny(), lambda _: fixed(), first=2)
    assert same(plain, train(tiny(), lambda _: fixed(), PrefixCache, first=2))


def test_lower_blocks_do_not_run() -> None:
    model = tiny()
    with tuner(model, 2) as trained, PrefixCache(trained) as cache:
        model(**fixed()[2])
        ran = []
        own = type(model.model.layers[0].mlp).forward
        type(model.model.layers[0].mlp).forward = lambda self, x: ran.append(self) or own(self, x)
        try:
            model(**fixed()[2])
        finally:
            type(model.model.layers[0].mlp).forward = own
        assert ran == [model.model.layers[2].mlp]
        assert cache.stats()["seconds_saved"] is not None


def test_a_call_of_the_cache_is_a_call_of_the_model() -> None:
    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        one = fixed()[1]
        expected = model(**one)
        for _ in range(2):
            with unchanged(model):
                found = cache(**one)
            assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        assert cache.stats()["served"] == 1
        with cache:  # inside a block a call changes nothing
            cache(**one)
            model(**one)
        assert cache.stats()["served"] == 3


def test_the_decoder_alone_is_served_too() -> None:
    """Whoever calls it, with whatever loss."""
    model, one = tiny(), fixed()[2]
    inputs = {name: one[name] for name in ("input_ids", "attention_mask", "position_ids")}
    with tuner(model) as trained, PrefixCache(trained) as cache:
        sites = resolve(model)
        expected = model(**one).loss
        for _ in range(2):
            torch.testing.assert_close(label_loss(sites, one["labels"], **inputs), expected)
        assert cache.stats()["served"] == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa2", "gpt2", "neox"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    def model() -> Any:
        made = tiny(name)
        # transformers renamed it
        enable = getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        if reentrant:  # else nothing below asks for a gradient, and reentrant checkpoints give none
            made.enable_input_require_grads()
        return made

    plain = train(model(), lambda _: fixed())
    cached = train(model(), lambda _: fixed(), PrefixCache)
    assert same(plain, cached) and cached[2].stats()["served"] == 6
    assert any(not torch.equal(plain[1][k], v) for k, v in model().state_dict().items())


def test_autocast_has_states_of_its_own() -> None:
    model, one = tiny(), fixed()[2]
    with tuner(model) as trained, PrefixCache(trained) as cache:

        def run() -> torch.Tensor:
            return model(**one).logits

        def run_in_bf16() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**one).logits

        first, first_bf16 = run(), run_in_bf16()
        assert cache.stats()["computed"] == 2
        assert torch.equal(run_in_bf16(), first_bf16) and torch.equal(run(), first)
        assert cache.stats()["served"] == 2


def test_states_from_inference_mode_serve_training() -> None:
    model, one = tiny(), fixed()[0]
    with tuner(model) as trained, PrefixCache(trained) as cache:
        with torch.inference_mode():
            model(**one)
        model(**one).loss.backward()
        assert cache.stats()["served"] == 1
        assert all(value.grad is not None for value in trained.parameters())


def test_kept_states_are_never_handed_out_themselves() -> None:
    """A block that writes into its input changes its own copy."""
    model, one = tiny(), fixed()[0]
    with tuner(model) as trained, PrefixCache(trained) as cache, torch.no_grad():
        handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].mul_(2.0), *args[1:]))
        first = model(**one).logits
        assert all(torch.equal(model(**one).logits, first) for _ in range(2))
        handle.remove()
        assert cache.stats()["served"] == 2


def test_rows_padded_on_the_left_are_known_by_their_padding() -> None:
    """The last place of the padding predicts the first token: with another width its states are others."""
    every = rows((5, 8, 4))
    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        cache(**batch(every, "left"))
        turned = batch([every[2], every[1], every[0]], "left")
        torch.testing.assert_close(cache(**turned).loss, model(**turned).loss)
        assert cache.stats()["assembled"] == 1
        narrower = batch([every[2], every[0]], "left")
        assert torch.equal(cache(**narrower).loss, model(**narrower, use_cache=False).loss)
        assert (cache.stats()["assembled"], cache.stats()["computed"]) == (1, 2)


def test_rows_padded_on_both_sides_are_known_as_they_are() -> None:
    """What a place of padding before the tokens attends to is all of the row."""
    ids = torch.tensor(rows((9, 9)))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0, 0]])
    one = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    narrower = {name: value.flip(0)[:, :8] for name, value in one.items()}
    model = tiny("llama", attn="eager")
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        for given in (one, narrower):
            assert torch.equal(cache(**given).loss, model(**given, use_cache=False).loss)
        assert cache.stats()["computed"] == 2


def test_rows_are_told_apart_by_their_masks() -> None:
    ids = torch.tensor([rows((6,))[0]] * 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    masks = [None, [[1] * 6] * 2, [[0] + [1] * 5] * 2, [[0] * 2 + [1] * 4, [0] + [1] * 5]]
    model = tiny("llama", attn="eager")
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        for number, mask in enumerate(masks):
            given = {"input_ids": ids, "position_ids": positions, "labels": ids}
            given.update({} if mask is None else {"attention_mask": torch.tensor(mask)})
            assert torch.equal(cache(**given).logits, model(**given, use_cache=False).logits)
            assert cache.stats()["computed"] == number + 1


def test_batches_with_labels_on_padding_are_computed() -> None:
    every = rows((5, 8, 4))
    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        cache(**batch(every))
        turned = batch([every[1], every[2]])
        turned["labels"] = turned["input_ids"].clone()
        assert torch.equal(cache(**turned).loss, model(**turned, use_cache=False).loss)
        assert cache.stats()["assembled"] == 0
        again = batch([every[2], every[1]])
        real = again["attention_mask"].bool()
        torch.testing.assert_close(cache(**again).logits[real], model(**again).logits[real])
        assert cache.stats()["assembled"] == 1


def test_packed_rows() -> None:
    """Several examples in a row, told apart by their positions; a row is known as a whole."""
    ids = torch.tensor(rows((9, 9)))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 0, 1, 2]])
    packed = {"input_ids": ids, "position_ids": positions, "labels": ids}
    model = tiny(attn="sdpa")
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        expected = model(**packed, use_cache=False).logits
        assert torch.equal(cache(**packed).logits, expected) and torch.equal(cache(**packed).logits, expected)
        turned = {name: value.flip(0) for name, value in packed.items()}
        torch.testing.assert_close(cache(**turned).logits, expected.flip(0))
        plain = {**packed, "position_ids": torch.arange(9).expand(2, -1)}
        assert not torch.allclose(cache(**plain).logits, expected)
        stats = cache.stats()
        assert (stats["computed"], stats["served"], stats["assembled"]) == (2, 1, 1)


@pytest.mark.parametrize("change", ["ids", "mask", "positions", "no mask", "types", "shape"])
def test_any_other_input_is_another_batch(change: str) -> None:
    model = tiny("gpt2")
    one = batch(rows((6, 6)), "right")
    other = {name: value.clone() for name, value in one.items()}
    if change == "ids":
        other["input_ids"][1, 2] += 1
    elif change == "mask":
        other["attention_mask"][0, 5] = 0
    elif change == "positions":
        other["position_ids"] += 1
    elif change == "no mask":
        del other["attention_mask"]
    elif change == "shape":
        one = {"input_ids": torch.tensor(rows((6, 6)))}
        other = {"input_ids": one["input_ids"].view(3, 4)}
    else:
        other["token_type_ids"] = torch.ones_like(one["input_ids"])
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        cache(**one)
        assert torch.equal(cache(**other).logits, model(**other, use_cache=False).logits)
        assert cache.stats()["computed"] == 2


def test_what_came_first_stays_where_memory_is_small() -> None:
    states = 3 * 6 * 32 * 4  # the first batch of ``fixed`` in fp32
    plain = train(tiny(), lambda _: fixed())
    cached = train(tiny(), lambda _: fixed(), lambda one: PrefixCache(one, states + 8))
    assert same(plain, cached)
    stats = cached[2].stats()
    assert (stats["computed"], stats["served"], stats["not_kept"]) == (7, 2, 6)
    assert (stats["batches"], stats["memory_bytes"]) == (1, states)
    assert repr(cached[2]).startswith(
        "PrefixCache: layers 0-0 of 3; 2 batches served, 0 assembled, 7 computed (6 not kept); 0.0 MiB in memory"
    )


def test_a_budget_too_small_for_anything_changes_nothing() -> None:
    plain = train(tiny(), lambda _: fixed())
    cached = train(tiny(), lambda _: fixed(), lambda one: PrefixCache(one, 1))
    assert same(plain, cached)
    stats = cached[2].stats()
    assert (stats["computed"], stats["memory_bytes"], stats["seconds_saved"]) == (9, 0, None)


def test_interventions_above_are_seen() -> None:
    model, one = tiny(), fixed()[0]
    with tuner(model) as trained, PrefixCache(trained) as cache, torch.no_grad():
        intact = model(**one).logits
        with pa.ablated(model, [(1, 0)]):
            ablated = model(**one).logits
        assert not torch.equal(ablated, intact) and torch.equal(model(**one).logits, intact)
        assert cache.stats()["served"] == 2


class Stop(BaseException):
    pass


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("served", [False, True])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(layer: int, served: bool) -> None:
    model, one = tiny(), fixed()[1]
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        if served:
            cache(**one)
        place = model.model.embed_tokens if layer == 0 else model.model.layers[layer].mlp
        own = type(place).forward

        def stop(*_: Any) -> None:
            raise Stop

        with unchanged(model):
            type(place).forward = stop
            try:
                with pytest.raises(Stop):
                    cache(**one)
            finally:
                type(place).forward = own
        assert torch.equal(cache(**one).logits, model(**one).logits)
        with unchanged(model), pytest.raises(InputError, match="use_cache"):
            cache(**one, use_cache=True)
