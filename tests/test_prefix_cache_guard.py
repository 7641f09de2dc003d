"""A ``PrefixCache`` never serves states that the model would not compute now: what changes them is an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prefix_runs import batch, fixed, rows, tiny, tuner
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import make
from torch import nn

import pyarith as pa
from pyarith.errors import InputError, InputTypeError, UnsupportedModelError
from pyarith.tuning import PrefixCache

pytestmark = pytest.mark.usefixtures("one_thread")


def lower(model: Any) -> Any:
    return model.model.layers[0]


@torch.no_grad()
def _add(model: Any) -> None:
    lower(model).mlp.up_proj.weight[3] += 1


def _new_parameter(model: Any) -> None:
    lower(model).mlp.up_proj.weight = nn.Parameter(lower(model).mlp.up_proj.weight.detach().clone(), False)


def _new_data(model: Any) -> None:
    lower(model).mlp.up_proj.weight.data = lower(model).mlp.up_proj.weight.data.clone()


@torch.no_grad()
def _embedding(model: Any) -> None:
    model.model.embed_tokens.weight.mul_(2)


def _module(model: Any) -> None:
    lower(model).mlp.act_fn = nn.ReLU()


def _embedding_hook(model: Any) -> None:
    model.model.embed_tokens.register_forward_hook(lambda *args: args[-1] * 2)


def _load(model: Any) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a write": (_add, r"such as model\.layers\.0\.mlp\.up_proj\.weight changed"),
    "another parameter": (_new_parameter, r"such as model\.layers\.0\.mlp\.up_proj\.weight changed"),
    "other data": (_new_data, r"such as model\.layers\.0\.mlp\.up_proj\.weight changed"),
    "the embedding": (_embedding, r"such as model\.embed_tokens\.weight changed"),
    "a module": (_module, "such as a module changed"),
    "a hook on the embedding": (_embedding_hook, "hooks of the embeddings changed"),
    "a checkpoint loaded": (_load, r"such as model\.\S+ changed"),
    "another dtype": (lambda model: model.bfloat16(), r"such as model\.\S+ changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_below_are_seen_at_once(name: str) -> None:
    change, message = CHANGES[name]
    model = tiny("llama")
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        cache(**fixed()[0])
        change(model)
        with unchanged(model), pytest.raises(InputError, match=f"below layer 1 as it was when .* {message}"):
            cache(**fixed()[0])


@pytest.mark.parametrize("which", ["rows of a head", "columns of a head", "all"])
def test_writes_that_torch_does_not_count_are_seen_in_time(which: str) -> None:
    model = tiny(hidden_size=256)
    weight = lower(model).self_attn.q_proj.weight
    part = {"rows of a head": (slice(64, 128),), "columns of a head": (slice(None), slice(64, 128)), "all": ()}[which]
    with tuner(model) as trained, torch.no_grad():
        cache = PrefixCache(trained)
        cache(**fixed()[0])
        weight.data[part] += 1e-3
        with pytest.raises(InputError, match=r"such as model\.layers\.0\.self_attn\.q_proj\.weight changed"):
            for _ in range(18):
                cache(**fixed()[0])
        with pytest.raises(InputError, match="q_proj"), cache:
            pass
        weight.data[part] -= 1e-3


def _hook(model: Any) -> None:
    lower(model).mlp.register_forward_hook(lambda *_: None)


def _pre_hook(model: Any) -> None:
    lower(model).register_forward_pre_hook(lambda *_: None)


def _forward(model: Any) -> None:
    lower(model).mlp.forward = lambda x: x


@pytest.mark.parametrize("change", [_hook, _pre_hook, _forward])
def test_what_would_not_run_is_refused(change: Callable[[Any], None]) -> None:
    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        change(model)
        with pytest.raises(UnsupportedModelError, match=r"layers below layer 1 have a .*; remove it"):
            cache(**fixed()[0])
        with pytest.raises(UnsupportedModelError, match=r"layers below layer 1 have a .*; remove it"):
            PrefixCache(trained)


def test_an_ablation_below_is_refused() -> None:
    model = tiny()
    with tuner(model) as trained, PrefixCache(trained), pytest.warns(UserWarning, match="did not run inside"):
        with pa.ablated(model, [(0, 1)]), pytest.raises(UnsupportedModelError, match="have a hook"):
            model(**fixed()[0])


def test_hooks_of_transformers_itself_do_not_matter() -> None:
    model = tiny(attn="eager")
    model(**fixed()[0], output_attentions=True, output_hidden_states=True)
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        expected = model(**fixed()[0]).logits
        assert all(torch.equal(cache(**fixed()[0]).logits, expected) for _ in range(2))


DROPOUT = [
    ("gpt2", {"embd_pdrop": 0.1}, "transformer.drop "),
    ("gpt2", {"resid_pdrop": 0.1}, "transformer.h.0.attn.resid_dropout "),
    ("llama", {"attention_dropout": 0.1}, r"model.layers.0.self_attn \(attention_dropout=0.1\)"),
    ("neox", {"hidden_dropout": 0.1}, "gpt_neox.layers.0.post_attention_dropout "),
]


@pytest.mark.parametrize(("name", "options", "where"), DROPOUT)
def test_dropout_below_is_refused(name: str, options: dict[str, float], where: str) -> None:
    model = tiny(name, **options)
    with tuner(model) as trained:
        with pytest.raises(UnsupportedModelError, match=f"dropout is active below layer 1: .*{where}"):
            PrefixCache(trained)
        model.eval()
        cache = PrefixCache(trained)
        cache(**fixed()[0])
        model.train()
        with pytest.raises(UnsupportedModelError, match="dropout is active"):
            cache(**fixed()[0])


def test_dropout_above_draws_what_it_drew() -> None:
    losses = []
    for cached in (False, True):
        model = tiny("llama")
        for block in model.model.layers[1:]:
            block.self_attn.attention_dropout = 0.3
        torch.manual_seed(0)
        with tuner(model) as trained:
            cache = PrefixCache(trained)
            run = cache if cached else partial(model, use_cache=False)
            losses.append([run(**fixed()[0]).loss.item() for _ in range(3)])
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


@pytest.mark.parametrize("first", ["train", "eval"])
def test_noise_on_embeddings_is_refused(first: str) -> None:
    model = tiny()
    noisy = model.model.embed_tokens
    noisy.register_forward_hook(lambda module, _, out: out + torch.rand_like(out) if module.training else out)
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        if first == "eval":
            model.eval()
            cache(**fixed()[0])
            model.train()
        with pytest.raises(UnsupportedModelError, match="random numbers were drawn below layer 1"):
            cache(**fixed()[0])
        assert cache.stats()["batches"] == (first == "eval")


ARGUMENTS = [
    ({"use_cache": True}, "use_cache: not possible while a PrefixCache"),
    ({"output_hidden_states": True}, "output_hidden_states: not possible"),
    ({"output_attentions": True}, "output_attentions: not possible"),
    ({"inputs_embeds": torch.zeros(3, 6, 32), "input_ids": None}, "inputs_embeds: not possible .* give input_ids"),
    ({"input_ids": torch.tensor([1, 2])}, r"input_ids: expected a tensor \[batch, pos\], got \[2\]"),
]


@pytest.mark.parametrize(("given", "message"), ARGUMENTS)
def test_arguments_that_cannot_be_served(given: dict[str, Any], message: str) -> None:
    model = tiny(attn="eager")
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        with unchanged(model), pytest.raises(InputError, match=message):
            cache(**{**fixed()[0], **given})


def test_generation_inside_the_block_is_refused() -> None:
    model = tiny().eval()
    with tuner(model) as trained, PrefixCache(trained):
        with pytest.raises(InputError, match="not possible while a PrefixCache serves the model"):
            model.generate(fixed()[0]["input_ids"], max_new_tokens=2)


def test_a_config_that_asks_for_hidden_states() -> None:
    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        model.config.output_hidden_states = True
        with pytest.raises(InputError, match="output_hidden_states: not possible"):
            cache(**fixed()[0])


def test_an_argument_without_content() -> None:
    model = tiny("gpt2")
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        with pytest.raises(InputTypeError, match=r"extra: expected a tensor, a number, .* got object"):
            cache(**fixed()[0], extra=object())


def test_masks_of_another_form() -> None:
    """4-D masks are part of the batch as they are; such batches are known as a whole."""
    model, one = tiny("llama", attn="eager"), fixed()[0]
    mask = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1).expand(3, 1, 6, 6).clone()
    mask[:, :, 4, 1] = torch.finfo(torch.float32).min
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        expected = model(**one, attention_mask=mask, use_cache=False).logits
        assert all(torch.equal(cache(**one, attention_mask=mask).logits, expected) for _ in range(2))
        turned = {name: value.flip(0) for name, value in one.items()}
        cache(**turned, attention_mask=mask)
        assert (cache.stats()["served"], cache.stats()["assembled"]) == (1, 0)


def test_rotary_embeddings_that_depend_on_the_company() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=12)
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        assert torch.equal(cache(**fixed()[2]).logits, model(**fixed()[2], use_cache=False).logits)
        with pytest.raises(UnsupportedModelError, match="14 tokens; beyond 12 this model's rotary"):
            cache(**batch(rows((14, 14)), "none"))
        far = {**fixed()[0], "position_ids": torch.arange(10, 16)[None]}
        with pytest.raises(UnsupportedModelError, match="16 tokens; beyond 12"):
            cache(**far)


def test_what_has_nothing_below_is_refused() -> None:
    with pa.SelectiveTuner(tiny(), [(0, 1), (2, 0)]) as trained:
        with pytest.raises(InputError, match="lowest trained layer above 0: below layer 0 there is nothing to keep"):
            PrefixCache(trained)


def test_bad_arguments() -> None:
    model = tiny()
    with pytest.raises(InputTypeError, match="tuner: expected a SelectiveTuner, got Llama"):
        PrefixCache(model)  # type: ignore[arg-type]
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        for memory in ("much", 0, None):
            with unchanged(model), pytest.raises(InputError, match="memory: expected"):
                PrefixCache(trained, memory)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="its tuner was detached"):
        cache(**fixed()[0])
    with pytest.raises(InputError, match="tuner: expected an attached"):
        PrefixCache(trained)


def test_one_cache_at_a_time() -> None:
    model = tiny()
    with tuner(model) as trained, PrefixCache(trained):
        with unchanged(model), pytest.raises(UnsupportedModelError, match=r"layers\.0: the forward was replaced"):
            PrefixCache(trained)


@pytest.mark.parametrize("place", ["", "model", "model.layers.0.mlp"])
def test_compiled_models_are_refused(place: str) -> None:
    model = tiny()
    with tuner(model) as trained:
        cache = PrefixCache(trained)
        model.get_submodule(place).compile(backend="eager")
        with pytest.raises(UnsupportedModelError, match=f"{place or 'the model itself'} was compiled"):
            cache(**fixed()[0])


def test_weights_shared_with_trained_ones() -> None:
    model = make("llama", torch.float32)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    with tuner(model) as trained, pytest.raises(UnsupportedModelError, match="below layer 1 share weights"):
        PrefixCache(trained)


def test_single_blocks_run_as_they_are() -> None:
    """Outside a call of the decoder, as gradient checkpointing runs them again."""
    model = tiny("gpt2")
    x = F.one_hot(torch.arange(6), 32)[None].float()
    with tuner(model) as trained:
        expected = model.transformer.h[0](x)
        with PrefixCache(trained) as cache:
            assert torch.equal(model.transformer.h[0](x), expected)
            for _ in range(2):
                model(**fixed()[0])
                with pytest.raises(RuntimeError):
                    model(**fixed()[0], attention_mask=torch.ones(3, 5))
                assert torch.equal(model.transformer.h[0](x), expected)
            assert cache.stats()["computed"] == 1
