"""Attention of heads at END against what eager models report themselves, one unpadded prompt at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import planted
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, SDPA, make, pad, prompts
from tokenizers_for_tests import byte_level
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.analysis import attention_mass
from pyarith.errors import PyarithError, SelfCheckError, UnsupportedModelError

ALL_HEADS = [(layer, head) for layer in range(3) for head in range(4)]
SOME = [(2, 3), (0, 1), (2, 0)]  # in no order
LENGTHS = (7, 5, 9, 7)
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [prompt.clean for prompt in prompts(lengths)]


@cache
def truth(name: str, lengths: tuple[int, ...] = LENGTHS, **overrides: Any) -> list[np.ndarray]:
    """Per prompt [layer, head, pos]: the END rows that the eager model returns."""
    model = make(name, **overrides)
    found = []
    with true_fp64(), torch.no_grad():
        for ids in rows(lengths):
            output = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
            found.append(torch.stack([one[0, :, -1] for one in output.attentions]).numpy())
    return found


def roles_for(ids: torch.Tensor) -> torch.Tensor:
    """Any codes at all: 0 .. 4 by token id."""
    return ids % 5


def run(model: Any, side: str, heads: Any = SOME, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Any:
    ids, mask = pad(rows(lengths), side)
    options = {"patterns": True, "tokens_per_pass": 14, **options}
    return attention_mass(model, ids, heads, attention_mask=mask, roles=roles_for(ids), **options)


def agree(result: Any, expected: list[np.ndarray], side: str, heads: Any = SOME, **tolerance: float) -> None:
    tolerance = tolerance or EXACT
    width = result.patterns.shape[2]
    for number, (ids, pattern) in enumerate(zip(rows(tuple(p.shape[-1] for p in expected)), expected, strict=True)):
        start = width - len(ids) if side == "left" else 0
        codes = ["other", "operand_a", "operand_b", "operator", "special"]
        names = [codes[i % 5] for i in ids]
        names[0] = "first" if names[0] in ("other", "special") else names[0]
        for i, (layer, head) in enumerate(heads):
            own = pattern[layer, head]
            outside = np.ones(width, bool)
            outside[start : start + len(ids)] = False
            assert not result.patterns[i, number, outside].any()
            np.testing.assert_allclose(result.patterns[i, number, ~outside], own, **tolerance)
            for r, role in enumerate(result.roles):
                mass = sum(value for value, name in zip(own, names, strict=True) if name == role)
                np.testing.assert_allclose(result.mass[i, number, r], mass, **tolerance)
                assert result.role_tokens[number, r] == names.count(role)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_eager(name: str, side: str) -> None:
    lengths = (9, 9, 9) if side == "none" else LENGTHS
    with true_fp64():
        result = run(make(name), side, ALL_HEADS, lengths)
    agree(result, truth(name, lengths), side, ALL_HEADS)
    assert result.check_error < 1e-12 and result.mass.dtype == np.float64
    if name == "gpt-oss":
        assert (result.mass.sum(-1) < 1).all()  # its sinks take a share
    else:
        np.testing.assert_allclose(result.mass.sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str) -> None:
    with true_fp64():
        result = run(make(name, attn="sdpa"), "left")
    agree(result, truth(name), "left")
    assert result.settings["attention"] == "sdpa"


@pytest.mark.parametrize("name", ["llama-gqa2", "mistral", "gpt2", "neox"])
def test_an_implementation_of_ones_own(name: str) -> None:
    AttentionInterface.register("of_this_test", sdpa_attention_forward)
    AttentionMaskInterface.register("of_this_test", sdpa_mask)
    with true_fp64():
        result = run(make(name, attn="of_this_test"), "right")
    agree(result, truth(name), "right")


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gemma2-no-cap": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma2-scale": ("gemma2", {"query_pre_attn_scalar": 3}),
    "mistral-window-1": ("mistral", {"sliding_window": 1}),
    "phi3-window": ("phi3", {"sliding_window": 3}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_config_options(option: str) -> None:
    name, settings = OPTIONS[option]
    with true_fp64():
        agree(run(make(name, **settings), "left"), truth(name, **settings), "left")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    result = run(make(name, dtype), "left")
    assert result.mass.dtype == np.float32
    # the embedding and the weights are rounded too
    agree(result, truth(name), "left", atol=1e-5 if dtype is torch.float32 else 0.15)
    np.testing.assert_allclose(result.mass.sum(-1), 1, rtol=1e-5)


def test_blocks_do_not_matter() -> None:
    model = make("qwen3")
    small, large = (run(model, "right", tokens_per_pass=n) for n in (1, 10_000))
    np.testing.assert_allclose(small.patterns, large.patterns, **EXACT)
    np.testing.assert_allclose(small.mean, large.mean, **EXACT)


ROLES = {planted.PLUS: 3, planted.EQUALS: 0, planted.BOS: 4}


def arithmetic_roles(ids: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(planted.VOCAB, dtype=torch.int64)
    table[planted.A : planted.A + 5], table[planted.B : planted.B + 5] = 1, 2
    for token, code in ROLES.items():
        table[token] = code
    return table[ids]


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_planted_movers(side: str) -> None:
    """1.2 looks at the operator, 2.0 at operand b, 0.3 at END itself, 0.1 (not its token) at BOS."""
    problems = [planted.problem(a, b, (a + b) % 3 if side != "none" else 0) for a in range(5) for b in range(5)]
    ids, mask = pad(problems, side)
    heads = [(1, 2), (2, 0), (0, 3), (0, 1)]
    with true_fp64():
        result = attention_mass(
            planted.adder(), ids, heads, attention_mask=mask, roles=arithmetic_roles(ids), patterns=True
        )
    assert result.roles == ("operand_a", "operand_b", "operator", "first", "special", "other")
    expected = np.zeros((4, 6))
    expected[0, 2] = expected[1, 1] = expected[2, 5] = expected[3, 3] = 1
    np.testing.assert_allclose(result.mass, np.repeat(expected[:, None], len(problems), 1), atol=1e-12)
    np.testing.assert_allclose(result.mean, expected, atol=1e-12)
    np.testing.assert_allclose(result.spread, 0, atol=1e-12)
    table = list(result.rows())
    assert len(table) == 24 and table[2]["role"] == "operator" and table[2]["mass"] == pytest.approx(1)
    assert "operator" in repr(result) and "1.2" in repr(result)


def test_prompt_pairs_bring_their_roles() -> None:
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, n=40)
    result = attention_mass(model, pairs, [(2, 7)], patterns=True)
    np.testing.assert_allclose(result.mass.sum(-1), 1, rtol=1e-5)
    for i in range(len(pairs)):
        for code, name in ((1, "operand_a"), (2, "operand_b"), (3, "operator")):
            own = result.patterns[0, i][pairs.roles[i] == code].sum()
            np.testing.assert_allclose(result.mass[0, i, result.roles.index(name)], own, rtol=1e-5, atol=1e-7)
    subset = attention_mass(model, pairs.subset([3, 17]), [(2, 7)])
    np.testing.assert_allclose(subset.mass, result.mass[:, [3, 17]], rtol=1e-4, atol=1e-6)


def test_a_first_token_with_a_role_keeps_it() -> None:
    """`3 + 4 =` without BOS: the first token is operand a."""
    ids = torch.tensor([[5, 6, 7, 8]])
    result = attention_mass(make("llama"), ids, [(0, 0)], roles=torch.tensor([[1, 3, 2, 0]]))
    assert result.role_tokens.tolist() == [[1, 1, 1, 0, 0, 1]]
    own = attention_mass(
        make("llama"), ids, [(0, 0)], roles=torch.tensor([[1, 0, 2, 0]]), role_names=("other", "x", "y")
    )
    assert own.roles == ("x", "y", "first", "special", "other")


# what must not pass in silence


def sharper(module: Any, query: torch.Tensor, *args: Any, **options: Any) -> Any:
    return sdpa_attention_forward(module, query * 1.2, *args, **options)


def test_attention_that_does_something_else_is_found() -> None:
    AttentionInterface.register("sharper", sharper)
    AttentionMaskInterface.register("sharper", sdpa_mask)
    model = make("llama-gqa2", attn="sharper")
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with unchanged(model), pytest.raises(SelfCheckError, match=r"llama.*'sharper', head \d\.\d, prompt \d"):
        run(model, "left")
    assert dict(ALL_ATTENTION_FUNCTIONS) == before and "sharper" not in vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"]


def test_a_kernel_that_forgets_the_softcap_is_found() -> None:
    def capless(*args: Any, softcap: float | None = None, **options: Any) -> Any:
        return sdpa_attention_forward(*args, **options)

    AttentionInterface.register("capless", capless)
    AttentionMaskInterface.register("capless", sdpa_mask)
    with pytest.raises(SelfCheckError, match=r"'gemma2'.*'capless'.*softcap"):
        run(make("gemma2", attn="capless"), "left")


def test_a_hook_on_z_is_found() -> None:
    model = make("gpt2")
    model.transformer.h[2].attn.c_proj.register_forward_pre_hook(lambda _, args: (args[0] * 1.01, *args[1:]))
    with pytest.raises(SelfCheckError, match=r"gpt2.*head 2\."):
        run(model, "left")


@pytest.mark.parametrize("part", ["scale", "window", "cap", "group"])
def test_the_check_knows_each_part(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputation without one of its parts does not reproduce z."""
    import pyarith.analysis.attention as module

    attend = module.Observer.attend

    def broken(self: Any, layer: int, query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
        options = dict(options)
        if part == "scale":
            options["scaling"] = None
        if part == "cap":
            options["softcap"] = None
        if part == "group":
            key, value = key.flip(1), value.flip(1)
        if part == "window":
            monkeypatch.setattr(self, "sites", type(self.sites)(**{**vars(self.sites), "windows": (None,) * 4}))
        return attend(self, layer, query, key, value, options)

    monkeypatch.setattr(module.Observer, "attend", broken)
    with pytest.raises(SelfCheckError):
        run(make("gemma2"), "right")


def test_an_attention_beside_the_interface_is_refused_by_name() -> None:
    model = make("gpt2", torch.float32, reorder_and_upcast_attn=True)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"'gpt2'.*'eager'.*\[0, 2\].*reorder_and_upcast"):
        run(model, "left")
    model = make("llama")
    model.config._attn_implementation = "no_such_kernel"
    with unchanged(model), pytest.raises(UnsupportedModelError, match="'no_such_kernel' is not in"):
        run(model, "left")
    model = make("llama")
    for block in model.model.layers:
        own = block.self_attn
        own.forward = lambda hidden_states, own=own, **_: (own.o_proj(hidden_states), None)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"'llama'.*\[0, 2\] do not call"):
        run(model, "left")
    own.forward = lambda hidden_states, **_: (hidden_states, None)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"layers \[2\] did not call"):
        run(model, "left")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_model_and_interface_are_as_before(name: str, attn: str) -> None:
    if name == "gemma2" and attn == "sdpa":
        return
    model = make(name, torch.float32, attn=attn).train()
    before, local = dict(ALL_ATTENTION_FUNCTIONS), dict(vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"])
    with unchanged(model):
        run(model, "left")
    assert dict(ALL_ATTENTION_FUNCTIONS) == before and vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"] == local


def test_an_error_inside_the_model_leaves_everything_as_before() -> None:
    model = make("llama", attn="sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward  # a local entry of someone else's stays
    try:
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with unchanged(model), pytest.raises(ZeroDivisionError):
            run(model, "left")
        handle.remove()
        assert vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"] == {"sdpa": sdpa_attention_forward}
        assert run(model, "left").check_error < 1e-4
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
CODES = torch.tensor([[4, 1, 3, 0]] * 2)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "heads-missing": ({"heads": [(0, 0), (3, 0), (1, 4), (-1, 2)]}, r"got 3\.0, 1\.4, -1\.2"),
    "heads-twice": ({"heads": [(0, 1), (1, 1), (0, 1)]}, r"0\.1 more than once"),
    "heads-none": ({"heads": []}, "at least one"),
    "heads-text": ({"heads": "0.1"}, r"heads: expected \(layer, head\) pairs"),
    "heads-number": ({"heads": 3}, r"heads: expected \(layer, head\) pairs"),
    "heads-floats": ({"heads": [(0.0, 1)]}, r"heads: expected \(layer, head\) pairs"),
    "heads-triple": ({"heads": [(0, 1, 2)]}, r"heads: expected \(layer, head\) pairs"),
    "roles-missing": ({"roles": None}, "roles: expected the role of every token"),
    "roles-shape": ({"roles": CODES[:, :3]}, r"roles: expected shape \[2, 4\]"),
    "roles-floats": ({"roles": CODES.float()}, "roles: expected integer codes"),
    "roles-outside": ({"roles": CODES + 1}, "prompts 0, 1 have others"),
    "roles-name": ({"role_names": ("first", "b", "c", "d", "e")}, "role name 'first' is taken"),
    "ids-outside": ({"prompts": IDS + 90}, r"prompts: expected token ids in \[0, 97\)"),
    "ids-floats": ({"prompts": IDS.float()}, "integer token ids"),
    "mask-shape": ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: expected shape \[2, 4\]"),
    "mask-empty": ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "prompts 1 have none"),
    "tokens": ({"tokens_per_pass": 0}, "tokens_per_pass: expected a positive"),
    "model": ({"model": 3}, "model: expected a Hugging Face"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, message = BAD[case]
    given: dict[str, Any] = {"model": make("llama"), "prompts": IDS, "heads": [(0, 0)], "roles": CODES, **changes}
    with pytest.raises(PyarithError, match=message):
        attention_mass(**given)


def test_prompt_pairs_without_roles_or_with_arguments_of_their_own() -> None:
    pairs = pa.PromptPairs.from_text(["1 + 2 ="], ["1 < 2 ="], ["3"], byte_level())
    model = make("llama", vocab_size=int(pairs.clean.max()) + 1)
    with pytest.raises(PyarithError, match="roles: expected the role of every token"):
        attention_mass(model, pairs, [(0, 0)])
    with pytest.raises(PyarithError, match="roles: expected None beside PromptPairs"):
        attention_mass(model, pairs, [(0, 0)], roles=CODES)
