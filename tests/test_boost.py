"""``boost`` against attention mixed by the letter: one prompt at a time, layer after layer, without padding."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import planted
import pytest
import torch
from literal_oracle import PATHS
from planted import KEY_HEADS, PLUS, SUM0, adder, problem
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, SDPA, make, pad, prompts
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.errors import InputError, InputTypeError, PyarithError, UnsupportedModelError

HEADS = [(0, 1), (1, 0), (1, 3), (2, 2)]
SIDES = ["none", "left", "right"]
Model = torch.nn.Module
Rows = list[list[int]]


def given(side: str) -> tuple[Rows, Rows, torch.Tensor, torch.Tensor | None]:
    """Prompts, source positions, ids and mask. Some sources lie outside every window of 4 tokens."""
    tokens = [p.clean for p in prompts((7, 5, 9) if side != "none" else (7, 7, 7))]
    sources = [[1, 4], [0, 3, 4], [2]]
    return tokens, sources, *pad(tokens, side)


def as_columns(tokens: Rows, sources: Rows, ids: torch.Tensor, side: str) -> torch.Tensor:
    columns = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(sources):
        start = ids.shape[1] - len(tokens[i]) if side == "left" else 0
        columns[i, [start + p for p in row]] = True
    return columns


# --- the letter ---------------------------------------------------------------------------------------------------


def sizes(model: Model) -> tuple[int, int, int]:
    """Heads, kv heads, d_head."""
    config = model.config
    n = config.num_attention_heads
    return n, getattr(config, "num_key_value_heads", None) or n, getattr(config, "head_dim", None) or (
        config.hidden_size // n
    )  # fmt: skip


def value_of(model: Model, attention: Model, raw: torch.Tensor) -> torch.Tensor:
    """Values [pos, kv head, d_head] from the output of the projection that makes them."""
    n, n_kv, d = sizes(model)
    kind = model.config.model_type
    if kind == "gpt_neox":
        return raw.reshape(len(raw), n, 3, d)[:, :, 2]
    return raw[:, -n_kv * d :].reshape(len(raw), n_kv, d)


def projection_of_values(model: Model, layer: int) -> Model:
    block = model.get_submodule(PATHS[model.config.model_type][0])[layer]
    names = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value", "phi3": "self_attn.qkv_proj"}
    return block.get_submodule(names.get(model.config.model_type, "self_attn.v_proj"))


def letter(
    model: Model, tokens: list[int], source: list[int], alpha: float, queries: list[int], heads: Any = tuple(HEADS)
) -> torch.Tensor:
    """Logits [pos, vocab] with z of the chosen heads at ``queries`` made from mixed attention, layer by layer."""
    blocks, out, _ = PATHS[model.config.model_type]
    layers = list(model.get_submodule(blocks))
    n, n_kv, d = sizes(model)
    patches: dict[int, dict[tuple[int, int], torch.Tensor]] = {}

    def forward(layer: int | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Logits, and attention [head, pos, pos] and values of one layer, under the patches made so far."""
        raw: list[torch.Tensor] = []
        with ExitStack() as stack, torch.no_grad():
            for place, patch in patches.items():

                def on_z(_module: Any, args: Any, patch: Any = patch) -> Any:
                    z = args[0].clone()
                    for (head, query), value in patch.items():
                        z[0, query, head * d : (head + 1) * d] = value
                    return (z, *args[1:])

                stack.callback(layers[place].get_submodule(out).register_forward_pre_hook(on_z).remove)
            if layer is not None:
                hook = projection_of_values(model, layer).register_forward_hook(lambda _, __, o: raw.append(o[0]))
                stack.callback(hook.remove)
            output = model(input_ids=torch.tensor([tokens]), output_attentions=True, use_cache=False)
        if layer is None:
            return output.logits[0], None, None
        return output.logits[0], output.attentions[layer][0], value_of(model, layers[layer], raw[0])

    for layer in sorted({layer for layer, _ in heads}):
        _, p, value = forward(layer)
        patches[layer] = {}
        for head in [h for i, h in heads if i == layer]:
            for query in queries:
                own = p[head, query].tolist()
                mass = sum(own[k] for k in source)
                mixed = [
                    (1 - alpha) * own[k] + alpha * (own[k] / mass if k in source else 0.0) if mass > 0 else own[k]
                    for k in range(len(tokens))
                ]
                assert abs(sum(mixed) - 1) < 1e-12 or model.config.model_type == "gpt_oss"  # its sinks take a share
                z = sum(mixed[k] * value[k, head // (n // n_kv)] for k in range(len(tokens)))
                patches[layer][head, query] = z
    return forward(None)[0]


def logits(model: Model, ids: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> torch.Tensor:
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **more).logits


def real(values: torch.Tensor, tokens: Rows, side: str) -> list[torch.Tensor]:
    return [v[len(v) - len(t) :] if side == "left" else v[: len(t)] for v, t in zip(values, tokens, strict=True)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=5e-12)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "alpha"), [("none", 0.3), ("left", 0.3), ("right", 1.0)])
@pytest.mark.parametrize("name", NAMES)
def test_exact(name: str, alpha: float, side: str) -> None:
    """Every family, both kernels, sources as positions and as columns; all positions of all prompts."""
    tokens, sources, ids, mask = given(side)
    model = make(name)
    with true_fp64():
        expected = [letter(model, t, s, alpha, [len(t) - 1]) for t, s in zip(tokens, sources, strict=True)]
        plain = real(logits(model, ids, mask), tokens, side)
        for attn in ("eager", "sdpa") if name in SDPA else ("eager",):
            model = make(name, attn=attn)
            for source in (sources, as_columns(tokens, sources, ids, side)):
                with pa.boost(model, HEADS, source, alpha):
                    found = logits(model, ids, mask)
                for got, want, before in zip(real(found, tokens, side), expected, plain, strict=True):
                    close(got, want)
                    close(got[:-1], before[:-1])
        moved = [float((want[-1] - before[-1]).abs().max()) for want, before in zip(expected, plain, strict=True)]
        # mistral's window of 4 tokens hides all sources of the last prompt
        assert min(moved[:2] if name == "mistral" else moved) > 1e-2


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_alpha_zero_is_the_plain_run(name: str, attn: str) -> None:
    """Bit by bit, in a forward pass and in ``generate``, in three dtypes."""
    if (name, attn) == ("gemma2", "sdpa"):
        return  # transformers has no sdpa for Gemma-2's softcap
    _, sources, ids, mask = given("left")
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = make(name, dtype, attn=attn)
        plain, made = logits(model, ids, mask), model.generate(ids, **settings)
        with pa.boost(model, HEADS, sources, 0.0):
            found = logits(model, ids, mask)
            assert torch.equal(found.view(torch.uint8), plain.view(torch.uint8))
            assert torch.equal(model.generate(ids, **settings), made)
        with pa.boost(model, HEADS, sources, 0.9):
            assert not torch.equal(logits(model, ids, mask), plain) or plain.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_rows_sum_to_one(name: str, dtype: torch.dtype) -> None:
    """The attention that the model hands out is the mixed one: nothing outside the sources with alpha = 1."""
    tokens, sources, ids, mask = given("right")
    model = make(name, dtype)
    # without it the additive mask of an fp64 model overflows in transformers' fp32 softmax, and padding is NaN
    with torch.no_grad(), true_fp64() if dtype == torch.float64 else nullcontext():
        with pa.boost(model, HEADS, sources, 1.0):
            boosted = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
        plain = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for layer, (p, before) in enumerate(zip(boosted, plain, strict=True)):
        for i, prompt in enumerate(tokens):
            end = len(prompt) - 1
            torch.testing.assert_close(
                p[i, :, : end + 1].sum(-1), torch.ones(4, end + 1, dtype=dtype), atol=rounding, rtol=0
            )
            others = [k for k in range(ids.shape[1]) if k not in sources[i]]
            for head in range(4):
                unseen = not before[i, head, end, sources[i]].any()  # all sources behind the sliding window
                chosen = (layer, head) in HEADS and not unseen
                assert (not p[i, head, end, others].any()) == chosen
                if layer == 0:
                    assert torch.equal(p[i, head, end], before[i, head, end]) != chosen
                    assert torch.equal(p[i, head, :end], before[i, head, :end])


def test_no_mass_on_the_sources_changes_nothing() -> None:
    """A head that cannot see its sources keeps its attention, bit by bit."""
    model = make("mistral", torch.float32)  # a window of 4 tokens
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    plain = logits(model, ids, None)
    with pa.boost(model, HEADS, [[0, 2]], 1.0):
        assert torch.equal(logits(model, ids, None), plain)
    with pa.boost(model, HEADS, [[0, 3]], 1.0):
        assert not torch.equal(logits(model, ids, None), plain)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama-gqa2", "mistral", "gemma2", "gpt2", "neox", "phi3"])
def test_generate_with_a_cache(name: str, attn: str) -> None:
    """Each token is boosted while it is the newest one; sources stay where they were under left padding."""
    if (name, attn) == ("gemma2", "sdpa"):
        return
    tokens, sources, ids, mask = given("left")
    model = make(name, attn=attn)
    with true_fp64():
        with pa.boost(model, HEADS, sources, 0.7):
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        slow = make(name)
        for i, prompt in enumerate(tokens):
            new = made.sequences[i, ids.shape[1] :].tolist()
            n = len(prompt)
            for step in range(4):
                wanted = letter(slow, prompt + new[:step], sources[i], 0.7, list(range(n - 1, n + step)))
                close(made.logits[step][i].double(), wanted[-1])


def test_contexts_nest() -> None:
    """Twice alpha = 0.5 towards the same tokens is once 0.75; other models and ablations beside it."""
    tokens, sources, ids, mask = given("left")
    model, other = make("llama-gqa2"), make("gpt2")
    with true_fp64():
        with pa.boost(model, HEADS[:3], sources, 0.5), pa.boost(model, HEADS[:3], sources, 0.5):
            twice = logits(model, ids, mask)
            with pa.boost(other, HEADS, sources, 0.5):
                close(logits(model, ids, mask), twice)
                logits(other, ids, mask)
        with pa.boost(model, HEADS[:3], sources, 0.75):
            once = logits(model, ids, mask)
        close(real(twice, tokens, "left")[2], real(once, tokens, "left")[2])
        with pa.boost(model, [(0, 1)], sources, 0.75), pa.ablated(model, [(0, 1)]):
            both = logits(model, ids, mask)
        with pa.ablated(model, [(0, 1)]):
            assert torch.equal(both[:, -1], logits(model, ids, mask)[:, -1])


def test_gradients() -> None:
    """Autograd's slope in a weight is that of finite differences; both kernels."""
    _, sources, ids, mask = given("left")
    for attn in ("eager", "sdpa"):
        model = make("llama-gqa2", attn=attn)
        weight = model.get_parameter("model.layers.0.self_attn.k_proj.weight")
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with true_fp64(), pa.boost(model, HEADS, sources, 0.6):

            def score() -> torch.Tensor:
                return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1, 5].sum()  # noqa: B023

            score().backward()
            slope = float(weight.grad[2, 3])
            values = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    weight[2, 3] += step
                    values.append(float(score()))
        assert abs(slope) > 1e-4
        assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-6 * max(1.0, abs(slope))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_autocast(attn: str) -> None:
    _, sources, ids, mask = given("left")
    model = make("llama-gqa2", torch.float32, attn=attn)
    with pa.boost(model, HEADS, sources, 0.5):
        plain = logits(model, ids, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = logits(model, ids, mask)
    assert 0 < (found.float() - plain)[:, -1].abs().max() < 0.5


# --- a planted head ---------------------------------------------------------------------------------------------------


def absent_minded(share: float) -> Any:
    """The planted adder, but 1.2, which moves operand a from ``+`` to END, looks at ``+`` with this share only."""
    model = adder()
    attention = model.model.layers[1].self_attn
    rows = slice(2 * planted.D_HEAD, 3 * planted.D_HEAD)
    with torch.no_grad():
        attention.q_proj.weight[rows] *= 0.0
        attention.k_proj.weight[rows] *= 0.0
        # a score for + against 0 for the other five tokens: share = e^s / (e^s + 5); both norms scale what they read
        score = torch.log(torch.tensor(5 * share / (1 - share), dtype=torch.float64)) * planted.D_HEAD**0.5
        attention.q_proj.weight[rows.start + 7, planted.EQUALS] = score
        attention.k_proj.weight[rows.start + 7, PLUS] = 1.0 / planted._norm_scale(2) ** 2
    return model


def test_boosting_a_planted_head_raises_the_answer() -> None:
    model = absent_minded(0.55)
    ids = torch.tensor([problem(a, b) for a, b in ((1, 2), (3, 4), (0, 3), (4, 4))])
    answers = torch.tensor([SUM0 + a + b for a, b in ((1, 2), (3, 4), (0, 3), (4, 4))])

    def answer(heads: list[tuple[int, int]], source: list[int], alpha: float) -> torch.Tensor:
        with pa.boost(model, heads, [source] * 4, alpha):
            return logits(model, ids, None)[torch.arange(4), -1, answers]

    assert KEY_HEADS["a"] == [(1, 2)]
    plus = [problem(1, 2).index(PLUS)]
    plain = answer([(1, 2)], plus, 0.0)
    raised = [answer([(1, 2)], plus, alpha) for alpha in (0.25, 0.5, 1.0)]
    for lower, higher in zip([plain, *raised], raised, strict=False):
        assert (higher > lower + 0.1).all()
    torch.testing.assert_close(raised[-1], torch.full_like(plain, planted.LOGIT), rtol=0.05, atol=0)
    # another source of the same head lowers it; heads that write nothing, or look there already, do nothing
    assert (answer([(1, 2)], [0], 0.5) < plain - 0.1).all()
    silent = [
        (layer, head)
        for layer in range(4)
        for head in range(4)
        if (layer, head) not in [(0, 1), (0, 3), (1, 2), (2, 0)]
    ]
    for head in silent:
        assert (answer([head], plus, 1.0) - plain).abs().max() < 1e-6
    operand_b = [problem(1, 2).index(planted.B + 2)]
    assert (answer([(2, 0)], operand_b, 1.0) - plain).abs().max() < 1e-6


# --- what is left behind, and what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_leaves_no_trace(attn: str) -> None:
    _, sources, ids, mask = given("left")
    model = make("llama-gqa2", torch.float32, attn=attn).train()
    with unchanged(model):
        with pa.boost(model, HEADS, sources, 0.5):
            logits(model, ids, mask)
            assert all(module.training for module in model.modules())
        with pytest.raises(KeyboardInterrupt), pa.boost(model, HEADS, sources, 0.5), pa.boost(model, HEADS, sources, 1):
            raise KeyboardInterrupt
        with pytest.raises(InputError), pa.boost(model, HEADS, sources, 0.5):
            logits(model, ids[:2], mask[:2])
        with pytest.raises(InputError), pa.boost(model, [(0, 1), (9, 9)], sources, 0.5):
            pass
    from pyarith.engine.boost import _active

    assert not len(_active)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 1.5}, InputError, r"alpha: expected a number in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, InputError, "alpha"),
        ({"alpha": float("nan")}, InputError, "alpha"),
        ({"alpha": True}, InputTypeError, "alpha"),
        ({"alpha": "0.5"}, InputTypeError, "alpha"),
        ({"heads": []}, InputError, "at least one head"),
        ({"heads": [(7, 0), (0, 4), (0, 0)]}, InputError, r"7\.0, 0\.4"),
        ({"heads": [(0, 0), (0, 0)]}, InputError, "each head once"),
        ({"source": [[1], []]}, InputError, "at least one token per prompt; prompts 1 have none"),
        ({"source": torch.tensor([[True], [False]])}, InputError, "prompts 1 have none"),
        ({"source": torch.tensor([[1, 0]])}, InputError, r"source: expected bool \[batch, pos\].*int64"),
        ({"source": torch.tensor([True])}, InputError, r"source: expected bool \[batch, pos\]"),
        ({"source": [[0.5]]}, InputTypeError, "prompt 0: expected a list of positions"),
        ({"source": [[True, False]]}, InputTypeError, "prompt 0: expected a list of positions"),
        ({"source": [1, 2]}, InputTypeError, "prompt 0: expected a list of positions"),
        ({"source": "operand"}, InputTypeError, "source: expected bool"),
        ({"source": 3}, InputTypeError, "source: expected bool"),
        ({"source": []}, InputError, "at least one prompt"),
        ({"source": [[-1]]}, InputError, "positions from 0 on"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], error: type[PyarithError], message: str) -> None:
    model = make("llama", torch.float32)
    with unchanged(model), pytest.raises(error, match=message):
        pa.boost(model, **{"heads": HEADS, "source": [[0], [1]], "alpha": 0.5, **change})


def test_bad_inputs_of_the_model() -> None:
    _, sources, ids, mask = given("left")
    model = make("llama", torch.float32)
    with pa.boost(model, HEADS, sources, 0.5):
        with pytest.raises(InputError, match="tokens of 3 prompts, one row each; got a batch of 2"):
            logits(model, ids[:2], mask[:2])
        with pytest.raises(InputError, match="got a batch of 6"):
            model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(InputError, match=r"prompt 0 has 4 tokens, got positions \[4\]"):
            logits(model, ids[:, -4:], mask[:, -4:])
        with pytest.raises(InputError, match=r"attention_mask: expected \[batch, pos\]"):
            model(ids, attention_mask=torch.zeros(3, 1, 10, 10))
    columns = torch.ones_like(mask, dtype=torch.bool)
    with pa.boost(model, HEADS, columns, 0.5):
        with pytest.raises(InputError, match="prompts 0, 1, 2 have sources on padding"):
            logits(model, ids, mask)
        with pytest.raises(InputError, match="at most 9 columns like input_ids, got 10"):
            logits(model, ids[:, 1:], mask[:, 1:])
        with pytest.raises(UnsupportedModelError, match="static caches"):
            model.generate(ids, cache_implementation="static", max_new_tokens=2, pad_token_id=0)


def test_unsupported_models() -> None:
    sources = [[0], [1]]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model = make("llama", torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"'flash_attention_2'.*\('eager', 'sdpa'\)"):
        pa.boost(model, HEADS, sources, 0.5)
    with pytest.raises(UnsupportedModelError, match="reorder_and_upcast_attn"):
        pa.boost(make("gpt2", torch.float32, reorder_and_upcast_attn=True), HEADS, sources, 0.5)
    dropping = make("gpt2", torch.float32).train()
    with (
        pytest.raises(UnsupportedModelError, match="attention dropout is active"),
        pa.boost(dropping, HEADS, sources, 0.5),
    ):
        logits(dropping, ids, None)
    compiled = make("llama", torch.float32)
    compiled.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="boost: the model itself was compiled"):
        pa.boost(compiled, HEADS, sources, 0.5)
    # an attention with a config of its own would not see the change, and nothing would happen
    import copy

    apart = make("llama", torch.float32)
    apart.model.layers[1].self_attn.config = copy.deepcopy(apart.config)
    with (
        pytest.raises(UnsupportedModelError, match=r"layers \[1\] did not go through"),
        pa.boost(apart, HEADS, sources, 0.5),
    ):
        logits(apart, ids, None)
    model = make("llama", torch.float32)
    with pytest.warns(UserWarning, match="did not run inside the block"), pa.boost(model, HEADS, sources, 0.5):
        pass
