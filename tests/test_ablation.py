"""Baselines and ``ablated`` against hooks written here by the letter: one prompt at a time, without padding."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from literal_oracle import PATHS
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, VOCAB, make, pad, prompts
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.engine.baselines import Baseline, MeanAblation, ResampleAblation, ZeroAblation
from pyarith.errors import InputError, InputTypeError, NonFiniteError, PyarithError, UnsupportedModelError
from pyarith.models.sites import resolve

HEADS, MLPS = [(0, 1), (0, 2), (2, 0)], [1]
SIDES = ["none", "left", "right"]
SDPA = [name for name in NAMES if name != "gemma2"]
Model = torch.nn.Module
Rows = list[list[int]]


def rows(lengths: tuple[int, ...] = (7, 5, 9), seed: int = 1) -> Rows:
    return [p.clean for p in prompts(lengths, seed=seed)]


def given(side: str, ragged: bool = True) -> tuple[Rows, torch.Tensor, torch.Tensor | None]:
    tokens = rows((7, 5, 9, 5, 7, 9) if ragged and side != "none" else (7, 7, 7))
    return tokens, *pad(tokens, side)


# --- the letter ---------------------------------------------------------------------------------------------------


def blocks(model: Model) -> list[Model]:
    return list(model.get_submodule(PATHS[model.config.model_type][0]))


def projection(model: Model, layer: int) -> Model:
    return blocks(model)[layer].get_submodule(PATHS[model.config.model_type][1])


def mlp_write(model: Model, layer: int) -> Model:
    name = "post_feedforward_layernorm" if model.config.model_type == "gemma2" else "mlp"
    return blocks(model)[layer].get_submodule(name)


def width(model: Model) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


@contextmanager
def letter(model: Model, heads: dict[tuple[int, int], Any], mlps: dict[int, Any] | None = None) -> Iterator[None]:
    """Write values (0 or what broadcasts to [1, pos, size]) over slices of z and over MLP outputs."""
    with ExitStack() as stack:
        for (layer, head), value in heads.items():
            part = slice(head * width(model), (head + 1) * width(model))

            def on_z(_module: Any, args: Any, part: slice = part, value: Any = value) -> Any:
                z = args[0].clone()
                z[:, :, part] = value
                return (z, *args[1:])

            stack.callback(projection(model, layer).register_forward_pre_hook(on_z).remove)
        for layer, value in (mlps or {}).items():

            def on_mlp(_module: Any, _args: Any, output: Any, value: Any = value) -> Any:
                return torch.zeros_like(output) + value

            stack.callback(mlp_write(model, layer).register_forward_hook(on_mlp).remove)
        yield


def run(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits [pos, vocab] of one prompt without padding and without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def seen(model: Model, tokens: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """z [pos, head, d_head] and MLP writes [pos, d_model] of one prompt, per layer."""
    z, writes = [], []
    n = model.config.num_attention_heads
    with ExitStack() as stack:
        for layer in range(len(blocks(model))):
            hook = projection(model, layer).register_forward_pre_hook(
                lambda _, args: z.append(args[0][0].reshape(-1, n, width(model)))
            )
            stack.callback(hook.remove)
            hook = mlp_write(model, layer).register_forward_hook(lambda _, __, output: writes.append(output[0]))
            stack.callback(hook.remove)
        run(model, tokens)
    return z, writes


def logits(model: Model, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits [batch, pos, vocab] of a padded batch."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def real(values: torch.Tensor, tokens: Rows, side: str) -> list[torch.Tensor]:
    """What belongs to real tokens, per prompt."""
    return [v[len(v) - len(t) :] if side == "left" else v[: len(t)] for v, t in zip(values, tokens, strict=True)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=2e-12)


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2)


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


# --- contexts -------------------------------------------------------------------------------------------------------


def test_contexts_nest() -> None:
    model, other = make("llama-gqa2"), make("gpt2")
    ids = torch.tensor(rows((7, 7)))
    mean = MeanAblation.from_inputs(model, ids)
    plain = logits(model, ids, None)
    with pa.ablated(model, HEADS):
        outer = logits(model, ids, None)
        with pa.ablated(model, [(0, 1), (1, 3)], mean):
            both = logits(model, ids, None)
            with pa.ablated(other, [(0, 0)]):
                assert torch.equal(logits(model, ids, None), both)
                assert differs(logits(other, ids, None), plain)
        assert torch.equal(logits(model, ids, None), outer)
    assert torch.equal(logits(model, ids, None), plain)
    inner = {(0, 1): mean.heads[0, 0, 1], (1, 3): mean.heads[1, 0, 3]}
    with letter(model, {(0, 2): 0.0, (2, 0): 0.0, **inner}):
        assert torch.equal(logits(model, ids, None), both)


def lived_in(name: str) -> Model:
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = make(name, torch.float32, **no_dropout)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    model.register_forward_hook(lambda *_: None)
    projection(model, 0).register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox", "phi3"])
def test_leaves_no_trace(name: str) -> None:
    model = lived_in(name)
    _, ids, mask = given("left")
    with unchanged(model):
        mean = MeanAblation.from_inputs(model, ids, mask)
        resampled = ResampleAblation.from_inputs(model, ids, mask)
        for baseline in (ZeroAblation(), mean, resampled):
            with pa.ablated(model, HEADS, baseline, mlps=MLPS):
                training = [module.training for module in model.modules()]
                logits(model, ids, mask)
                assert [module.training for module in model.modules()] == training
        with pytest.raises(KeyboardInterrupt), pa.ablated(model, HEADS, mean, mlps=MLPS):
            logits(model, ids, mask)
            raise KeyboardInterrupt
        with pytest.raises(InputError), pa.ablated(model, HEADS, resampled):
            logits(model, ids[:2], mask[:2])  # an error out of a hook
        with pytest.raises(InputError), pa.ablated(model, [*HEADS, (9, 9)]):
            pass
    hook = projection(model, 1).register_forward_hook(broken)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        MeanAblation.from_inputs(model, ids, mask)
    hook.remove()


def broken(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("heads", "mlps", "error", "message"),
    [
        ([], [], InputError, "at least one head or MLP"),
        ([(0, 1), (3, 0), (0, 4), (-1, 0)], [7], InputError, r"0 to 2 with heads 0 to 3.*3\.0, 0\.4, -1\.0; mlps.*7"),
        ([(0, 1), (1, 1), (0, 1)], [2, 0, 2], InputError, r"each head once, got twice 0\.1; mlps: .* twice 2"),
        (["0.1"], [], InputTypeError, r"Head\.parse"),
        ("0.1", [], InputTypeError, "expected a list"),
        ((0, 1), [], InputTypeError, r"\(layer, head\) tuples of integers .*got 0, 1"),
        ([(0, 1, 2), (0.5, 1), (True, 1)], [], InputTypeError, r"got \[0, 1, 2\], \[0\.5, 1\], \[True, 1\]"),
        ([], 1, InputTypeError, "mlps: expected a list"),
        ([], ["1"], InputTypeError, "mlps: expected layer numbers"),
        ([], [1.0, (1,)], InputTypeError, "mlps: expected layer numbers"),
    ],
)
def test_bad_targets(heads: Any, mlps: Any, error: type[PyarithError], message: str) -> None:
    model = make("llama", torch.float32)
    with unchanged(model), pytest.raises(error, match=message):
        pa.ablated(model, heads, mlps=mlps)


def test_targets_of_other_kinds() -> None:
    """Heads as ``pa.Head``, lists, numpy or torch integers; any iterable."""
    import numpy as np

    model = make("llama", torch.float32)
    ids = torch.tensor(rows((7,)))
    found = []
    for heads in ([(0, 1), (2, 0)], iter([pa.Head(0, 1), pa.Head(2, 0)]), np.array([[0, 1], [2, 0]]),
                  torch.tensor([[0, 1], [2, 0]]), [[0, 1], [np.int64(2), 0]], {(0, 1), (2, 0)}):  # fmt: skip
        with pa.ablated(model, heads):
            found.append(logits(model, ids, None))
    assert all(torch.equal(found[0], other) for other in found)
    with pa.ablated(model, mlps=np.arange(2)):
        logits(model, ids, None)


def test_bad_baselines() -> None:
    model, other = make("llama", torch.float32), make("llama-gqa2", torch.float32)
    smaller = make("qwen3", torch.float32)
    ids = torch.tensor(rows((7, 7)))
    mean = MeanAblation.from_inputs(model, ids)
    for bad in ("zero", ZeroAblation, mean.heads):
        with pytest.raises(InputTypeError, match="baseline: expected ZeroAblation"):
            pa.ablated(model, HEADS, bad)
    for wrong in (other, make("llama", torch.float32, seed=1), make("llama", torch.bfloat16)):
        with pytest.raises(InputError, match="another model of the same sizes"):
            pa.ablated(wrong, HEADS, mean)
    with pytest.raises(InputError, match=r"n_layers, n_heads, d_head, d_model are \(3, 4, 8, 32\).* \(3, 4, 12, 32\)"):
        pa.ablated(smaller, HEADS, mean)
    sdpa = make("llama", torch.float32, attn="sdpa")
    pa.ablated(sdpa, HEADS, mean)  # another attention kernel is no other model
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").add_(1e-3)
    with pytest.raises(InputError, match="weights, their dtype or the config have changed"):
        pa.ablated(model, HEADS, mean)


def test_check_of_prompts() -> None:
    """What a sweep asks before it runs."""
    model = make("llama", torch.float32)
    sites = resolve(model)
    _, ids, mask = given("left")
    per_position = MeanAblation.from_inputs(model, ids[:1, -7:], over="batch")
    resampled = ResampleAblation.from_inputs(model, ids, mask)
    ZeroAblation().check(sites, 5, 100)
    MeanAblation.from_inputs(model, ids, mask).check(sites, 5, 100)
    per_position.check(sites, 5, 7)
    resampled.check(sites, 6, torch.tensor([7, 5, 9, 5, 7, 9]))
    with pytest.raises(InputError, match="positions 0 to 6 of its reference"):
        per_position.check(sites, 5, 8)
    with pytest.raises(InputError, match="prompts 1, 3 are longer"):
        resampled.check(sites, 6, torch.tensor([7, 6, 9, 6, 7, 9]))
    with pytest.raises(InputError, match="6 prompts, one row each; got a batch of 3"):
        resampled.check(sites, 3)
    assert [b.name for b in (ZeroAblation(), per_position, resampled)] == [
        "zero", "mean(over='batch')", "resample(seed=0)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "mask", "over", "message"),
    [
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "batch_pos", "at least one real token per prompt; prompts 1"),
        ([[1, 2, 3]], [[1, 0, 1]], "batch_pos", "hole"),
        ([[1, 2, 3]], [[1, 1]], "batch_pos", r"expected shape \[1, 3\]"),
        ([[1, VOCAB]], None, "batch_pos", "token ids in"),
        ([[1.0, 2.0]], None, "batch_pos", "integer token ids|a pair"),
        (torch.zeros(0, 4, dtype=torch.long), None, "batch_pos", "at least one prompt"),
        ([], None, "batch_pos", "at least one batch of prompts, got none"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 1]], "batch", r"equal length \(aligned.*\[1, 2\]"),
        ([torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])], None, "batch", "expected 2 tokens each, got .3."),
        ([torch.tensor([[1, 2]]), 3], None, "batch_pos", "batch 1 to be a tensor or a pair"),
        ([[1, 2]], None, "tokens", r"over: expected one of \('batch_pos', 'batch'\)"),
    ],
)
def test_bad_reference_sets(ids: Any, mask: Any, over: str, message: str) -> None:
    model = make("llama", torch.float32)
    with unchanged(model), pytest.raises(InputError, match=message):
        MeanAblation.from_inputs(model, ids, mask, over=over)


def test_bad_values_in_the_reference() -> None:
    model = make("llama", torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1: the mean of the z"):
        MeanAblation.from_inputs(model, [[1, 2, 3]])


def test_save_and_load(tmp_path: Any) -> None:
    model = make("llama-gqa2", torch.bfloat16)
    _, ids, mask = given("left")
    made: list[Baseline] = [
        ZeroAblation(), MeanAblation.from_inputs(model, ids, mask), ResampleAblation.from_inputs(model, ids, mask),
    ]  # fmt: skip
    for baseline in made:
        baseline.save(tmp_path / baseline.name)
        loaded = type(baseline).load(tmp_path / baseline.name)
        assert type(Baseline.load(tmp_path / baseline.name)) is type(baseline)
        assert loaded.name == baseline.name and loaded is not baseline
        results = []
        for each in (baseline, loaded):
            with pa.ablated(model, HEADS, each, mlps=MLPS):
                results.append(logits(model, ids, mask))
        assert torch.equal(*results)
    with pytest.raises(InputError, match=r"kind .'MeanAblation'.*got 'ZeroAblation'"):
        MeanAblation.load(tmp_path / "zero")
    with pytest.raises(InputError, match=r"baseline\.json"):
        Baseline.load(tmp_path)
    (tmp_path / "zero" / "baseline.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="expected format 1, got 99"):
        Baseline.load(tmp_path / "zero")


# --- what would silently do nothing ---------------------------------------------------------------------------------


def test_a_model_that_did_not_run_is_warned_about() -> None:
    model = make("llama", torch.float32)
    with pytest.warns(UserWarning, match="did not run inside the block"), pa.ablated(model, HEADS):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pa.ablated(model, HEADS):
            run(model, [1, 2, 3])
        with pytest.raises(ZeroDivisionError), pa.ablated(model, HEADS):
            raise ZeroDivisionError  # an error says enough


def test_compiled_models_are_refused() -> None:
    model = make("llama", torch.float32)
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="the model itself was compiled"):
        pa.ablated(model, HEADS)
    model = make("llama", torch.float32)
    blocks(model)[1].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1 was compiled"):
        pa.ablated(model, HEADS)


def test_gradient_checkpointing_is_refused() -> None:
    model = make("llama", torch.float32)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.tensor(rows((7,)))
    with pa.ablated(model, HEADS):
        found = logits(model.eval(), ids, None)
        assert torch.equal(logits(model.train(), ids, None), found)
        with pytest.raises(UnsupportedModelError, match="layer 0 uses gradient checkpointing"):
            model(ids)


def test_single_blocks_are_refused_where_positions_count() -> None:
    model = make("gpt2", torch.float32)
    ids = torch.tensor(rows((7, 7)))
    baseline = MeanAblation.from_inputs(model, ids, over="batch")
    with pytest.raises(InputError, match="as a whole, not single blocks"), pa.ablated(model, HEADS, baseline):
        blocks(model)[0](torch.zeros(1, 7, 32))
