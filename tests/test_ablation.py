"""Baselines and ``ablated`` against hooks written here by the letter: one prompt at a time, without padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ablation_letter import (
    HEADS,
    MLPS,
    SIDES,
    Model,
    blocks,
    close,
    differs,
    given,
    letter,
    logits,
    mlp_write,
    projection,
    real,
    rows,
    run,
    seen,
)
from single_thread import one_thread  # noqa: F401
from tiny_models import NAMES, SDPA, VOCAB, make, pad
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.engine.baselines import MeanAblation, ResampleAblation, ZeroAblation
from pyarith.errors import InputError
from pyarith.models.sites import resolve

# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_zero(name: str, side: str) -> None:
    model = make(name)
    tokens, ids, mask = given(side)
    with true_fp64():
        with pa.ablated(model, HEADS, mlps=MLPS):
            found = logits(model, ids, mask)
        for prompt, got in zip(tokens, real(found, tokens, side), strict=True):
            with letter(model, dict.fromkeys(HEADS, 0.0), dict.fromkeys(MLPS, 0.0)):
                expected = run(model, prompt)
            close(got, expected)
            assert differs(expected, run(model, prompt))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_mean_is_the_mean_over_real_tokens(name: str, side: str) -> None:
    """Neither END only, nor over heads, nor of what comes after o_proj, nor with padding."""
    model = make(name)
    tokens, ids, mask = given(side)
    with true_fp64():
        runs = [seen(model, prompt) for prompt in tokens]
        baseline = MeanAblation.from_inputs(model, ids, mask, batch_size=4)
        values = {}
        for layer in range(len(blocks(model))):
            z = torch.cat([z[layer] for z, _ in runs])  # [all tokens, head, d_head]
            expected = torch.stack([token for token in z]).sum(0) / sum(map(len, tokens))
            close(baseline.heads[layer, 0], expected)
            close(baseline.mlps[layer, 0], torch.cat([m[layer] for _, m in runs]).mean(0))
            assert differs(expected, torch.stack([z[layer][-1] for z, _ in runs]).mean(0))  # END only
            assert differs(expected, expected.mean(0, keepdim=True).expand_as(expected))  # averaged over heads
            assert differs(expected, torch.stack([z[layer].mean(0) for z, _ in runs]).mean(0)) == (side != "none")
            values[layer] = expected
        with pa.ablated(model, HEADS, baseline):
            found = logits(model, ids, mask)
        for prompt, got in zip(tokens, real(found, tokens, side), strict=True):
            with letter(model, {(layer, head): values[layer][head] for layer, head in HEADS}):
                close(got, run(model, prompt))
    assert baseline.n_tokens == sum(map(len, tokens)) and baseline.n_prompts == len(tokens)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_mean_per_position(name: str, side: str) -> None:
    model = make(name)
    tokens = rows((7, 7, 7))
    ids, mask = pad(tokens, side)
    with true_fp64():
        runs = [seen(model, prompt) for prompt in tokens]
        baseline = MeanAblation.from_inputs(model, ids, mask, over="batch", batch_size=2)
        z = [torch.stack([z[layer] for z, _ in runs]).mean(0) for layer in range(len(blocks(model)))]
        writes = [torch.stack([m[layer] for _, m in runs]).mean(0) for layer in range(len(blocks(model)))]
        close(baseline.heads, torch.stack(z))
        close(baseline.mlps, torch.stack(writes))
        # other prompts, of other lengths up to the reference's: positions count from the first real token
        others = rows((4, 7, 5), seed=8) if side != "none" else rows((6, 6), seed=8)
        ids, mask = pad(others, side)
        with pa.ablated(model, HEADS, baseline, mlps=MLPS):
            found = logits(model, ids, mask)
        for prompt, got in zip(others, real(found, others, side), strict=True):
            n = len(prompt)
            with letter(model, {(i, h): z[i][:n, h] for i, h in HEADS}, {i: writes[i][:n] for i in MLPS}):
                close(got, run(model, prompt))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("own", [True, False], ids=["permuted", "reference"])
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_resample(name: str, own: bool, side: str) -> None:
    model = make(name)
    tokens, ids, mask = given(side)
    pool = tokens if own else rows((9, 7, 5, 7, 5), seed=5)
    reference = {}
    if not own:
        reference["reference"], reference["reference_attention_mask"] = pad(pool, "right")
    with true_fp64():
        baseline = ResampleAblation.from_inputs(model, ids, mask, seed=3, batch_size=2, **reference)
        with pa.ablated(model, HEADS, baseline, mlps=MLPS):
            found = logits(model, ids, mask)
        for i, got in enumerate(real(found, tokens, side)):
            source = pool[baseline.sources[i]]
            assert len(source) == len(tokens[i]) and source != tokens[i]
            z, writes = seen(model, source)
            with letter(model, {(j, h): z[j][:, h] for j, h in HEADS}, {j: writes[j] for j in MLPS}):
                close(got, run(model, tokens[i]))


def test_own_values_change_nothing() -> None:
    """Resampled from itself, each prompt runs as if nothing were ablated: bit by bit where shapes are the same."""
    model = make("llama-gqa2", torch.float32)
    tokens, ids, mask = given("right")
    baseline = ResampleAblation.from_inputs(model, ids, mask)
    z, writes = zip(*[seen(model, prompt) for prompt in tokens], strict=True)
    heads, mlps = torch.zeros_like(baseline.heads), torch.zeros_like(baseline.mlps)
    for i, prompt in enumerate(tokens):
        for layer in range(3):
            heads[layer, i, : len(prompt)], mlps[layer, i, : len(prompt)] = z[i][layer], writes[i][layer]
    itself = dataclasses.replace(baseline, heads=heads, mlps=mlps)
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    with pa.ablated(model, everything, itself, mlps=range(3)):
        found = logits(model, ids, mask)
    for got, expected in zip(
        real(found, tokens, "right"), real(logits(model, ids, mask), tokens, "right"), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_permutation() -> None:
    """Seeded, another prompt of the same length each, also where prompts stand several times in the batch."""
    model = make("llama", torch.float32)
    tokens = [[1, 2, 3], [1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2], [0, 2], [1, 2, 0], [3, 3, 3]]
    ids, mask = pad(tokens, "left", filler=0)
    drawn = set()
    for seed in range(30):
        baseline = ResampleAblation.from_inputs(model, ids, mask, seed)
        assert sorted(baseline.sources.tolist()) == list(range(8))
        assert all(len(tokens[s]) == len(tokens[i]) for i, s in enumerate(baseline.sources))
        assert all(tokens[s] != tokens[i] for i, s in enumerate(baseline.sources))
        drawn.add(tuple(baseline.sources.tolist()))
    again = ResampleAblation.from_inputs(model, ids, mask, seed)
    assert torch.equal(again.sources, baseline.sources) and torch.equal(again.heads, baseline.heads)
    assert len(drawn) > 20
    with pytest.raises(InputError, match=r"prompts 0, 1, 2 have no other prompt"):
        ResampleAblation.from_inputs(model, [[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    with pytest.raises(InputError, match="prompts 0, 1 have"):
        ResampleAblation.from_inputs(model, *pad([[1, 2, 3], [1, 2], [3, 4, 5, 6], [3, 4, 5, 7]], "left"))
    with pytest.raises(InputError, match="prompts 1 have no other"):
        ResampleAblation.from_inputs(model, [[1, 2], [3, 4]], reference=[[3, 4]])


@pytest.mark.parametrize("over", ["batch_pos", "batch"])
def test_batches_of_a_stream(over: str) -> None:
    """An iterable gives what one batch gives, tensors and pairs mixed."""
    model = make("qwen3")
    tokens = rows((6, 6, 6, 6, 6))
    whole = MeanAblation.from_inputs(model, torch.tensor(tokens), over=over)
    parts: Any = iter([torch.tensor(tokens[:2]), pad(tokens[2:4], "left"), (torch.tensor(tokens[4:]), None)])
    streamed = MeanAblation.from_inputs(model, parts, over=over)
    torch.testing.assert_close(streamed.heads, whole.heads, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(streamed.mlps, whole.mlps, rtol=1e-6, atol=1e-6)
    assert (streamed.n_tokens, streamed.n_prompts) == (whole.n_tokens, whole.n_prompts) == (30, 5)


def test_sums_are_fp64() -> None:
    """Means of a bf16 model are exact means of its bf16 z; sums in bf16 or fp32 would not be."""
    model = make("llama", torch.bfloat16)
    ids = torch.randint(VOCAB, (16, 60), generator=torch.Generator().manual_seed(0))
    baseline = MeanAblation.from_inputs(model, ids, batch_size=16)
    kept = []
    hook = projection(model, 1).register_forward_pre_hook(lambda _, args: kept.append(args[0].double()))
    logits(model, ids, None)
    hook.remove()
    close(baseline.heads[1, 0].flatten(), kept[0].mean((0, 1)))
    assert baseline.heads.dtype == torch.float64
    sites = resolve(model)
    assert baseline.head_values(sites, 0).dtype == baseline.mlp_values(sites, 0).dtype == torch.bfloat16


# --- the model's own forward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SDPA)
def test_dtypes_and_kernels(name: str, attn: str, dtype: torch.dtype) -> None:
    """The same bits as the hooks of this file in the same batch."""
    model = make(name, dtype, attn=attn)
    _, ids, mask = given("left")
    with pa.ablated(model, HEADS, mlps=MLPS):
        found = logits(model, ids, mask)
    with letter(model, dict.fromkeys(HEADS, 0.0), dict.fromkeys(MLPS, 0.0)):
        assert torch.equal(found, logits(model, ids, mask))
    assert found.dtype == dtype


def test_autocast() -> None:
    model = make("llama", torch.float32)
    ids = torch.tensor(rows((7, 7)))
    baseline = MeanAblation.from_inputs(model, ids)
    dtypes = []
    with torch.autocast("cpu", dtype=torch.bfloat16), pa.ablated(model, HEADS, baseline, mlps=MLPS):
        # hooks that come later see what the ablation hands on
        after = [
            projection(model, 0).register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype)),
            mlp_write(model, MLPS[0]).register_forward_hook(lambda _, __, output: dtypes.append(output.dtype)),
        ]
        found = logits(model, ids, None)
        for hook in after:
            hook.remove()
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    with pa.ablated(model, HEADS, baseline, mlps=MLPS):
        plain = logits(model, ids, None)
    assert 0 < (found.float() - plain).abs().max() < 0.5


@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_gradients(name: str) -> None:
    """Those of the hooks by the letter; nothing flows into what was replaced."""
    model = make(name)
    ids = torch.tensor(rows((7, 7)))
    mean = MeanAblation.from_inputs(model, ids)
    grads = []
    values = {(i, h): mean.heads[i, 0, h] for i, h in HEADS}
    for context in (
        pa.ablated(model, HEADS, mean, mlps=MLPS),
        letter(model, values, {i: mean.mlps[i, 0] for i in MLPS}),
    ):
        model.zero_grad()
        with context:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], rtol=1e-9, atol=1e-12)
    replaced = [key for key in grads[0] if key.startswith("model.layers.1.mlp.")]
    assert not replaced or all(not grads[0][key].any() for key in replaced)
    missing = {n for n, _ in model.named_parameters()} - grads[0].keys()
    assert all(".1." in n and ("mlp" in n or "norm" in n or "ln_2" in n) for n in missing)


def greedy(model: Model, prompt: list[int], n: int, **hooks: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Token by token, the whole prompt anew each time, no cache."""
    tokens, steps = list(prompt), []
    for _ in range(n):
        place = slice(0, len(tokens))
        at = {k: v[place] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in hooks["heads"].items()}
        with letter(model, at, hooks.get("mlps")):
            steps.append(run(model, tokens)[-1])
        tokens.append(int(steps[-1].argmax()))
    return tokens[len(prompt) :], steps


@pytest.mark.parametrize("kind", ["zero", "mean", "per position"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_with_a_cache(name: str, kind: str) -> None:
    """Left-padded prompts of several lengths, step by step as without cache, padding or batch."""
    model = make(name)
    tokens = rows((6, 4, 8))
    ids, mask = pad(tokens, "left")
    long = torch.tensor(rows((14, 14, 14), seed=4))
    with true_fp64():
        baseline: Any = ZeroAblation()
        heads: dict[tuple[int, int], Any] = dict.fromkeys(HEADS, 0.0)
        if kind != "zero":
            baseline = MeanAblation.from_inputs(model, long, over="batch" if kind == "per position" else "batch_pos")
            mean = baseline.heads
            heads = {(i, h): mean[i, :, h] if kind == "per position" else mean[i, 0, h] for i, h in HEADS}
        with pa.ablated(model, HEADS, baseline):
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        for i, prompt in enumerate(tokens):
            expected, steps = greedy(model, prompt, 6, heads=heads)
            assert made.sequences[i, ids.shape[1] :].tolist() == expected
            for step, row in enumerate(steps):
                close(made.logits[step][i].double(), row)
    intact = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert not torch.equal(intact, made.sequences)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_beams_and_sampling(how: dict[str, Any]) -> None:
    model = make("llama-gqa2")
    ids, mask = pad(rows((6, 4, 8)), "left")
    baseline = MeanAblation.from_inputs(model, torch.tensor(rows((14, 14), seed=4)), over="batch")
    made = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        with true_fp64(), pa.ablated(model, HEADS, baseline, mlps=MLPS):
            settings = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False, **how}
            made.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings))
    assert torch.equal(*made)


def test_positions_without_values_are_refused() -> None:
    model = make("llama-gqa2", torch.float32)
    baseline = MeanAblation.from_inputs(model, torch.tensor(rows((8, 8))), over="batch")
    ids, mask = pad(rows((4, 6)), "left")
    settings = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    with pa.ablated(model, HEADS, baseline):
        model.generate(ids, max_new_tokens=3, **settings)  # the last token made is never read
        with pytest.raises(InputError, match=r"positions 0 to 7; prompt 1 has a token at position 8"):
            model.generate(ids, max_new_tokens=4, **settings)
        with pytest.raises(InputError, match="prompt 0 has a token at position 8"):
            model(torch.tensor(rows((9,))))
        with pytest.raises(InputError, match="position 8"):
            model(torch.tensor([[1]]), position_ids=torch.tensor([[8]]))
        model(torch.tensor([[1]]), position_ids=torch.tensor([[7]]))
        own = torch.zeros(1, 1, 3, 3)
        model(torch.tensor([[1, 2, 3]]), attention_mask=own, position_ids=torch.arange(3)[None])
        with pytest.raises(InputError, match=r"attention_mask: expected \[batch, pos\]"):
            model(torch.tensor([[1, 2, 3]]), attention_mask=own)
    tokens, ids, mask = given("left")
    resampled = ResampleAblation.from_inputs(model, ids, mask)
    with pa.ablated(model, HEADS, resampled):
        with pytest.raises(InputError, match="6 prompts, one row each; got a batch of 5"):
            logits(model, ids[:5], mask[:5])
        with pytest.raises(InputError, match="got a batch of 12"):
            model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=2, pad_token_id=0)
        longer = [[*t, 1] if i == 1 else t for i, t in enumerate(tokens)]
        with pytest.raises(InputError, match=r"positions 0 to 4; prompt 1 has a token at position 5"):
            logits(model, *pad(longer, "left"))


def test_chunks_with_a_cache() -> None:
    """A prompt handed over in pieces, as chat front ends do, with and without an attention mask."""
    from transformers import DynamicCache

    model = make("gpt2")
    tokens = rows((8,))[0]
    baseline = MeanAblation.from_inputs(model, torch.tensor(rows((8, 8), seed=4)), over="batch")
    with true_fp64(), pa.ablated(model, HEADS, baseline):
        expected = run(model, tokens)
        for masked in (True, False):
            cache, found = DynamicCache(), []
            for start, end in ((0, 3), (3, 4), (4, 8)):
                mask = torch.ones(1, end, dtype=torch.long) if masked else None
                ids = torch.tensor([tokens[start:end]])
                found.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[0])
            close(torch.cat(found), expected)
            assert differs(expected, run(make("gpt2"), tokens))
