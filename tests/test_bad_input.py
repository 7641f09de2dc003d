"""Bad input: the message names the argument, what was expected and what came, and nothing is changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import VOCAB, inputs, make, prompts

import pyarith as pa
from pyarith.errors import (
    BackendError,
    InputError,
    InputTypeError,
    MemoryBudgetError,
    NonFiniteError,
    PyarithError,
    UnsupportedModelError,
)

QUIET = {"progress": False, "verify": 0}
PAIRS = prompts((6, 6, 6), seed=5)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")


def good(side: str = "none") -> dict[str, Any]:
    return inputs(PAIRS if side == "none" else prompts((6, 4, 5), seed=5), [1, 2, 3], side)


def refused(error: type[PyarithError], *words: str, model: Any = None, call: Any = None, **changes: Any) -> str:
    """The call raises ``error`` with all ``words`` in its message and leaves the model as it was."""
    model = make("llama", torch.float32) if model is None else model
    given = {**good(), **QUIET, **changes}
    with unchanged(model), pytest.raises(error) as caught:
        call(model, given) if call else pa.fast_patch(model, **given)
    text = str(caught.value)
    missing = [word for word in words if not re.search(word, text)]
    assert not missing, f"{missing} not in: {text}"
    return text


def replaced(ids: torch.Tensor, value: Any, at: tuple[int, ...] = (1, 2)) -> torch.Tensor:
    ids = ids.clone()
    ids[at] = value
    return ids


IDS = good()["clean"]
MASK = torch.ones_like(IDS)
# id: (what is changed in a good call, error, what the message must hold: argument, expected, got)
CALLS: dict[str, tuple[dict[str, Any], type[PyarithError], tuple[str, ...]]] = {
    "corrupted-batch": ({"corrupted": IDS[:2]}, InputError, ("corrupted", "3", "2")),
    "answers-batch": ({"answers": torch.tensor([1, 2])}, InputError, ("answers", "3", "2")),
    "answers-2d": ({"answers": torch.tensor([[1, 2, 3]])}, InputError, ("answers", r"\[batch\]", r"\[1, 3\]")),
    "corrupted-length": ({"corrupted": IDS[:, :-1]}, InputError, ("corrupted", "6", "5")),
    "answer-high": ({"answers": torch.tensor([1, VOCAB, 3])}, InputError, ("answers", str(VOCAB), "prompts? 1")),
    "answer-negative": ({"answers": torch.tensor([1, 2, -1])}, InputError, ("answers", "-1", "prompts? 2")),
    "answer-float": ({"answers": torch.tensor([1.0, 2.0, 3.0])}, InputError, ("answers", "integer", "float32")),
    "id-high": ({"clean": replaced(IDS, VOCAB)}, InputError, ("clean", str(VOCAB), "prompts? 1")),
    "id-negative": ({"clean": replaced(IDS, -100)}, InputError, ("clean", "-100", "prompts? 1")),
    "corrupted-id": ({"corrupted": replaced(IDS, 1 << 40)}, InputError, ("corrupted", str(1 << 40))),
    "ids-float": ({"clean": IDS.float()}, InputError, ("clean", "integer", "float32")),
    "ids-bool": ({"clean": IDS > 5}, InputError, ("clean", "integer", "bool")),
    "ids-text": ({"clean": ["1 + 1 ="]}, (InputTypeError, InputError), ("clean",)),
    "ids-none": ({"clean": None}, (InputTypeError, InputError), ("clean", "None")),
    "ids-1d": ({"clean": IDS[0]}, InputError, ("clean", r"\[batch, pos\]", r"\[6\]")),
    "ids-ragged": ({"clean": [[1, 2], [3]]}, (InputTypeError, InputError), ("clean",)),
    "empty-batch": (
        {"clean": IDS[:0], "corrupted": IDS[:0], "answers": IDS[:0, 0]},
        InputError,
        ("clean", "at least one", r"\[0, 6\]"),
    ),
    "no-tokens": ({"clean": IDS[:, :0], "corrupted": IDS[:, :0]}, InputError, ("clean", r"\[3, 0\]")),
    "mask-hole": ({"attention_mask": replaced(MASK, 0)}, InputError, ("attention_mask", "hole", "prompts? 1")),
    "mask-shape": ({"attention_mask": MASK[:, 1:]}, InputError, ("attention_mask", r"\[3, 6\]", r"\[3, 5\]")),
    "mask-values": ({"attention_mask": MASK * 2}, InputError, ("attention_mask", "0 and 1")),
    "mask-empty-row": ({"attention_mask": replaced(MASK, 0, (2,))}, InputError, ("attention_mask", "prompts? 2")),
    "corrupted-mask-hole": (
        {"attention_mask": MASK, "corrupted_attention_mask": replaced(MASK, 0)},
        InputError,
        ("corrupted_attention_mask", "hole", "prompts? 1"),
    ),
    "pair-lengths": (
        {"attention_mask": MASK, "corrupted_attention_mask": replaced(MASK, 0, (1, 0))},
        InputError,
        ("corrupted", "6", "5", "prompts? 1"),
    ),
    "equal-pairs": (
        {"corrupted": torch.cat([IDS[:2], good()["corrupted"][2:]])},
        InputError,
        ("corrupted", "differ", "prompts? 0, 1"),
    ),
    "foils-batch": ({"foils": torch.tensor([[1, 2]])}, InputError, ("foils", "3", "1")),
    "foils-1d": ({"foils": torch.tensor([1, 2, 3])}, InputError, ("foils", r"\[batch, k\]")),
    "foils-high": ({"foils": torch.full((3, 2), VOCAB)}, InputError, ("foils", str(VOCAB))),
    "mlps": ({"mlps": "thawed"}, InputError, ("mlps", "recomputed", "frozen", "thawed")),
    "senders": ({"senders": ("heads", "neurons")}, InputError, ("senders", "heads", "mlps", "neurons")),
    "senders-empty": ({"senders": ()}, InputError, ("senders", "heads", "mlps")),
    "backend": ({"backend": "quantum"}, (InputError, BackendError), ("backend", "auto", "cpu", "reference", "quantum")),
    "budget-text": ({"memory_budget": "lots"}, InputError, ("memory_budget", "lots")),
    "budget-zero": ({"memory_budget": 0}, InputError, ("memory_budget", "0")),
    "verify": ({"verify": -1}, InputError, ("verify", "-1")),
    "progress": ({"progress": "yes"}, (InputTypeError, InputError), ("progress", "yes|str")),
}


@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_pairs_under_padding(side: str) -> None:
    """Pads that differ do not make a pair differ."""
    given = good(side)
    ids, mask = given["clean"].clone(), given["attention_mask"].bool()
    given["corrupted"][1] = ids[1].where(mask[1], 77)
    refused(InputError, "corrupted", "differ", "prompts? 1", **given)


def test_longer_than_the_learned_positions() -> None:
    model = make("gpt2", n_positions=8)
    given = inputs(prompts((9, 6, 10)), [1, 2, 3], "left")
    refused(InputError, "clean", "8", "prompts? 0, 2", model=model, **given)
    pa.fast_patch(model, **inputs(prompts((8, 6)), [1, 2], "left"), **QUIET)  # pads do not count


@pytest.mark.parametrize("case", CALLS)
def test_call(case: str) -> None:
    changes, error, words = CALLS[case]
    refused(error, *words, **changes)


def test_one_sender_as_text() -> None:
    """A single sender given as text is either taken as one sender or refused with the known ones."""
    try:
        result = pa.fast_patch(make("llama"), **good(), senders="heads", **QUIET)
    except InputError as error:
        assert "senders" in str(error) and "mlps" in str(error)
    else:
        assert result.head_logits is not None and result.mlp_logits is None


BATCHES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "none": (lambda: [], ("batch", "at least one")),
    "missing-key": (lambda: [good(), {"clean": IDS, "corrupted": IDS}], ("answers",)),
    "unknown-key": (lambda: [{**good(), "lables": 1}], ("lables",)),
    "not-a-dict": (lambda: [3], ("batch|mapping|dict", "int")),
    "second-bad": (lambda: [good(), {**good(), "answers": torch.tensor([1, 2, VOCAB])}], ("answers", str(VOCAB))),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches(case: str) -> None:
    made, words = BATCHES[case]
    refused((InputError, InputTypeError), *words, call=lambda model, _: pa.fast_patch(model, made(), **QUIET))


def test_needs_corrupted_and_answers() -> None:
    refused((InputError, InputTypeError), "corrupted", call=lambda model, given: pa.fast_patch(model, given["clean"]))


@pytest.mark.parametrize(
    "what", [None, "gpt2", 3, print, torch.nn.Linear(2, 2), torch.ones(3)], ids=lambda w: type(w).__name__
)
def test_not_a_model(what: Any) -> None:
    call = lambda _, given: pa.fast_patch(what, **given)  # noqa: E731
    refused(InputTypeError, "model", type(what).__name__, call=call)


def other_model(name: str) -> torch.nn.Module:
    """Tiny Hugging Face models that are not causal language models of a known family."""
    import transformers as tf

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = {**small, "vocab_size": VOCAB}
    t5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    opt = {**bert, "ffn_dim": 16, "word_embed_proj_dim": 16}
    made: dict[str, Callable[[], torch.nn.Module]] = {
        "bert": lambda: tf.BertModel(tf.BertConfig(**bert)),
        "bert-masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**bert)),
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**small, image_size=8, patch_size=4)),
        "llama-base": lambda: make("llama").model,
        "llama-classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**bert)),
        "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**t5)),
        "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**opt)),
    }  # fmt: skip
    return made[name]()


@pytest.mark.parametrize("name", ["bert", "bert-masked", "vit", "llama-base", "llama-classifier", "t5", "opt"])
def test_other_models(name: str) -> None:
    model = other_model(name)
    refused(UnsupportedModelError, "model", type(model).__name__, *FAMILIES, model=model)


def test_meta_device() -> None:
    full = make("llama")
    with torch.device("meta"):
        model = type(full)(full.config)
    refused(UnsupportedModelError, "model", "meta", model=model)


@pytest.mark.parametrize("marker", ["config", "quantizer", "int8"])
def test_quantised(marker: str) -> None:
    model = make("llama", torch.float32)
    if marker == "config":
        model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    elif marker == "quantizer":
        model.hf_quantizer = object()
    else:
        weight = model.model.layers[1].mlp.up_proj
        weight.weight = torch.nn.Parameter(weight.weight.detach().to(torch.int8), requires_grad=False)
    refused(UnsupportedModelError, "model", "quantised", model=model)


def test_several_devices() -> None:
    model = make("llama", torch.float32)
    model.model.layers[2].mlp.to("meta")
    refused(UnsupportedModelError, "model", "meta|device", model=model)


def test_mixed_dtypes() -> None:
    model = make("llama", torch.float32)
    model.model.layers[1].mlp.to(torch.bfloat16)
    refused(UnsupportedModelError, "model", "dtype", "float32", "bfloat16", model=model)


def test_unknown_attention_write_is_refused() -> None:
    """A family name with other modules inside: family, layer, expected and found."""
    model = make("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(40, 32, dtype=torch.float64)
    refused(UnsupportedModelError, "llama", "layer 1", "32", "40", model=model)
    model = make("llama")
    del model.model.layers[2].mlp
    refused(UnsupportedModelError, "llama", "layer 2", "mlp", model=model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "path",
    ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj", "model.layers.0.input_layernorm",
     "model.layers.1.self_attn.o_proj", "model.norm", "lm_head"],
)  # fmt: skip
def test_non_finite_weights(path: str, bad: float) -> None:
    """The first bad layer and the tensor are named, also when a later layer is bad as well."""
    model = make("llama", torch.float32)
    with torch.no_grad():
        model.get_submodule(path).weight.fill_(bad)
        model.lm_head.weight.fill_(bad)
    text = refused(NonFiniteError, re.escape(path), model=model)
    layer = re.search(r"layers\.(\d)", path)
    assert layer is None or re.search(rf"layers?[ .]{layer[1]}", text)


def test_non_finite_embedding_row() -> None:
    """Only weights that a run meets count: a bad row of a token that no prompt holds is no error."""
    model = make("llama", torch.float32)
    unused = next(i for i in range(VOCAB) if not (good()["clean"] == i).any() and not (good()["corrupted"] == i).any())
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = float("nan")
    pa.fast_patch(model, **good(), **QUIET)
    with torch.no_grad():
        model.model.embed_tokens.weight[good()["corrupted"][1, 3]] = float("nan")
    refused(NonFiniteError, "embed_tokens", model=model)


def test_overflow_with_finite_weights() -> None:
    """Infinity that arises in the run: the layer where it first appears."""
    model = make("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e30)
    refused(NonFiniteError, r"layers?[ .]1", model=model)


def test_smallest_budget_works() -> None:
    """The budget that the message names is enough, one byte less is not."""
    for name, side in (("llama", "none"), ("gemma2", "left"), ("neox", "right")):
        model = make(name, torch.float32)
        given = good(side)
        text = refused(MemoryBudgetError, "memory_budget", "1", model=model, **given, memory_budget=1)
        least = int(re.search(r"at least ([\d,_]+) bytes", text)[1].replace(",", ""))
        pa.fast_patch(model, **given, memory_budget=least, **QUIET)
        refused(MemoryBudgetError, str(least - 1), model=model, **given, memory_budget=least - 1)


def test_inputs_are_not_written_to() -> None:
    given = good("left")
    before = copy.deepcopy(given)
    pa.fast_patch(make("llama"), **given, **QUIET)
    for name, value in given.items():
        assert torch.equal(value, before[name]), name


def test_other_integer_types_and_lists() -> None:
    """int32 ids, lists and bool masks mean the same as int64 tensors."""
    given = good("left")
    first = pa.fast_patch(make("llama"), **given, **QUIET)
    for kind in (lambda t: t.int(), lambda t: t.tolist(), lambda t: t.numpy()):
        again = pa.fast_patch(make("llama"), **{name: kind(value) for name, value in given.items()}, **QUIET)
        assert (again.head_logits == first.head_logits).all()
    for name in ("attention_mask", "corrupted_attention_mask"):
        given[name] = given[name].bool()
    assert (pa.fast_patch(make("llama"), **given, **QUIET).head_logits == first.head_logits).all()
