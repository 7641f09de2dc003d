"""Quantised weights: patching and knock-outs through the model's own modules, W_O of the sender in high precision."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import literal_oracle
import numpy as np
import pytest
import torch
from quantised_models import EXACT, INT8, KINDS, config, load, save
from single_thread import one_thread  # noqa: F401
from tiny_models import batch, inputs, prompts

import pyarith as pa
from pyarith.engine import oracle, planner
from pyarith.engine.guard import untouched
from pyarith.errors import NonFiniteError, SelfCheckError, UnsupportedModelError
from pyarith.models import quantised, weights
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.sites import resolve

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
torchao = pytest.importorskip("torchao", reason="the extra quant is not installed")

from bitsandbytes.functional import _convert_weight_packed_for_cpu  # noqa: E402

PAIRS = prompts((7, 5, 9))
ANSWERS = [31, 40, 64]
QUIET: dict[str, Any] = {"progress": False}
FAMILIES = ("llama-gqa2", "gemma2", "gpt2", "neox")


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def patched(model: torch.nn.Module, **options: Any) -> pa.PatchResult:
    return pa.fast_patch(model, **inputs(PAIRS, ANSWERS, "left"), **{**QUIET, **options})


def pack(model: torch.nn.Module) -> None:
    """What the first forward pass in evaluation mode does to 4-bit weights on a CPU with bf16 instructions."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.data, state = _convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
            assert state is module.weight.quant_state and state.packing_format_for_cpu


def raw(model: torch.nn.Module) -> dict[str, bytes]:
    """Every stored tensor, bytes as they lie, and the marks that a forward pass of bitsandbytes may leave."""
    found = {}
    for name, whole in model.named_parameters():
        for part, tensor in quantised.plain_tensors(name, whole):
            found[part] = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    for name, module in model.named_modules():
        for mark in ("support_avx512bf16_for_cpu", "_save_to_state_dict"):
            found[f"{name} {mark}"] = str(vars(module).get(mark)).encode()
    return found


# results


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_literal_protocol(folders: dict[str, Any], name: str, kind: str) -> None:
    """One hooked pass of the quantised model per sender gives the same logits, to fp32 rounding."""
    model = load(folders[name], kind, attn_implementation="eager")
    with untouched(model):
        expected = literal_oracle.path_patch(model, PAIRS)
    before = raw(model)
    result = patched(model, verify=1)
    assert raw(model) == before
    tokens = np.array(ANSWERS)
    heads, mlps, clean, _ = expected.at(tokens)
    assert np.abs(heads - clean).max() > 1e-2
    np.testing.assert_allclose(result.head_logits, heads, atol=1e-4)
    np.testing.assert_allclose(result.mlp_logits, mlps, atol=1e-4)
    np.testing.assert_allclose(result.clean_logits, clean, atol=1e-4)
    if name == "gpt2" and kind.startswith("torchao"):
        assert "quantised" not in result.settings  # torchao leaves Conv1D alone
    else:
        assert result.settings["fused"] is False and kind.split("-")[0] in result.settings["quantised"]
        assert "quantised weights: " in repr(result)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, about transformers
def test_adapters_on_quantised_weights(folders: dict[str, Any]) -> None:
    """LoRA on 4 bits: what both make together is the head's write."""
    peft = pytest.importorskip("peft", reason="peft is an optional dependency")
    setting = peft.LoraConfig(r=2, target_modules=["o_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(load(folders["llama-gqa2"], "nf4", attn_implementation="eager"), setting).eval()
    with untouched(wrapped):
        heads, *_ = literal_oracle.path_patch(wrapped.base_model.model, PAIRS).at(np.array(ANSWERS))
    np.testing.assert_allclose(patched(wrapped, verify=1).head_logits, heads, atol=1e-4)


@pytest.mark.parametrize("kind", INT8)
def test_int8_activations(folders: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few steps of 8 bits of the literal protocol; what depends on the block is said and is in the floor."""
    model = load(folders["llama-gqa2"], kind, attn_implementation="eager")
    with untouched(model):
        expected = literal_oracle.path_patch(model, PAIRS)
    result = patched(model)
    heads, _, clean, _ = expected.at(np.array(ANSWERS))
    assert np.abs(result.head_logits - heads).max() < 0.1 * np.abs(clean).max()
    assert np.corrcoef(result.head_changes.ravel(), (heads - clean).ravel())[0, 1] > 0.98
    says = result.settings["quantised"]
    assert "activations in int8" in says and ("by block" in says) == (kind == "int8")
    if kind == "int8":
        monkeypatch.setitem(planner._MAX_ROWS, "cpu", 3)  # one variant of the three prompts at a time
        one_by_one = patched(model, verify=0)
        assert 1e-3 < result.noise_floor.max() < 1
        assert np.abs(one_by_one.head_changes - result.head_changes).max() < 4 * result.noise_floor.max()


def test_bf16(folders: dict[str, Any]) -> None:
    """A bf16 model with biases that bitsandbytes casts in place; the sender's W_O stays fp32."""
    model = load(folders["llama-gqa2"], "nf4", torch.bfloat16)
    before = raw(model)
    patched(model)
    assert raw(model) == before
    sites = resolve(model)
    assert sites.quantised.compute == {torch.float32} and sites.dtype == torch.bfloat16
    assert weights.HeadOutputs(sites)[0].dtype == torch.float32


def test_knock_outs(folders: dict[str, Any]) -> None:
    """ablated and ablation_sweep on 4 and 8 bits give the same logits."""
    for kind, most in (("nf4", 1e-4), ("torchao-int8", 1e-4), ("int8", 0.2)):
        model = load(folders["llama-gqa2"], kind)
        ids, _, mask, _ = batch(PAIRS, "left")
        swept = pa.ablation_sweep(
            model, ids, torch.tensor(ANSWERS), attention_mask=mask, sets=[[(0, 1), (1, 2)]], progress=False
        )
        with untouched(model), pa.ablated(model, heads=[(0, 1), (1, 2)]):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        own = logits[torch.arange(3), torch.tensor(ANSWERS)].numpy()
        assert np.abs(swept.logits[0] - own).max() < most, kind
        assert "quantised weights: " in repr(swept)


def test_command_line(tmp_path: Any) -> None:
    """``pyarith discover`` on a quantised checkpoint in a folder, in fp16, which transformers refuses to cast."""
    from typer.testing import CliRunner

    from pyarith.cli import app
    from pyarith.demo import MODEL_DIR

    folder, out = tmp_path / "model", tmp_path / "run"
    load(MODEL_DIR, "nf4", torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    ran = CliRunner().invoke(app, ["discover", str(folder), "--operator", "+", "--n", "8", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    settings = json.loads((out / "result" / "result.json").read_text())["settings"]
    assert "bitsandbytes nf4 (" in settings["quantised"] and settings["dtype"] == "float16"
    assert json.loads((out / "run.json").read_text())["model"]["fingerprint"] == model_fingerprint(load_plain(folder))


# weights


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight(folders: dict[str, Any], kind: str) -> None:
    """The dense weight, column by column, is what the module makes of a one in one place."""
    module: Any = load(folders["llama-gqa2"], kind).model.layers[0].self_attn.o_proj
    dense = quantised.dense_weight(module, torch.float64)
    assert dense.dtype == torch.float64 and dense.shape == (64, 64)
    with torch.no_grad(), quantised.held(module):
        own = module(torch.eye(64)[None])[0] - module.bias
    # in int8 torchao's one is 127 / 127.5, and LLM.int8 gives fp16
    near = {"atol": 2e-6, "rtol": 0.0}
    if kind in INT8:
        near = {"atol": 1e-3, "rtol": 2**-7 if kind.startswith("torchao") else 2**-10}
    torch.testing.assert_close(dense.t().float(), own, **near)


def test_dense_weight_before_and_after_the_first_pass(folders: dict[str, Any]) -> None:
    """LLM.int8 moves its scales in the first forward pass."""
    model = load(folders["llama-gqa2"], "int8")
    module = model.model.layers[0].mlp.down_proj
    before = quantised.dense_weight(module, torch.float32)
    patched(model)
    assert module.weight.SCB is None
    torch.testing.assert_close(quantised.dense_weight(module, torch.float32), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4-double"])
def test_packed_weights(folders: dict[str, Any], kind: str) -> None:
    """Packed by a forward pass of the user's: read back, same fingerprint, and nothing of it is scrambled."""
    model = load(folders["llama-gqa2"], kind, torch.bfloat16)
    packed = copy.deepcopy(model)
    pack(packed)
    before = raw(packed)
    assert before != raw(model)
    assert model_fingerprint(packed) == model_fingerprint(model)
    for one, other in zip(model.modules(), packed.modules(), strict=True):
        if isinstance(one, bitsandbytes.nn.Linear4bit):
            dense = [quantised.dense_weight(m, torch.float32) for m in (one, other)]
            torch.testing.assert_close(*dense, rtol=2**-8, atol=0)
    assert raw(packed) == before


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint(folders: dict[str, Any], kind: str, tmp_path: Any) -> None:
    """Stable over running, saving and loading; another when a scale or a code changes."""
    model = load(folders["llama-gqa2"], kind)
    first = model_fingerprint(model)
    patched(model, verify=0)
    model.save_pretrained(tmp_path)
    assert first == model_fingerprint(model) == model_fingerprint(load_plain(tmp_path))
    weight = model.model.layers[1].mlp.up_proj.weight
    if kind.startswith("torchao"):
        weight.scale.mul_(2)
    elif kind == "nf4":
        weight.quant_state.absmax.mul_(2)
    elif kind == "fp4-double":
        weight.quant_state.offset.mul_(2)
    else:
        model.model.layers[1].mlp.up_proj.state.SCB.mul_(2)
    assert model_fingerprint(model) != first


@pytest.mark.parametrize("kind", KINDS)
def test_costs(folders: dict[str, Any], kind: str) -> None:
    """The forecast counts what packed weights stand for; the budget holds one dense weight."""
    plain = pa.fast_patch(
        load_plain(folders["llama-gqa2"]), **inputs(PAIRS, ANSWERS, "left"), progress=False, verify=0
    ).settings["forecast"]
    found = patched(load(folders["llama-gqa2"], kind), verify=0).settings["forecast"]
    for name in ("capture_flop", "replay_flop"):
        assert found[name] == plain[name]
    assert found["bytes"] >= 4 * 64 * 128


def test_bytes_of_the_benchmark(folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a weight of the linears in the blocks, with scales, biases and the tables of nested scales (1 KiB)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    from bench_quantised import stored_bytes

    plain = stored_bytes(load_plain(folders["llama-gqa2"]))
    for kind, least, most in (
        ("nf4", 0.5, 0.7),
        ("fp4-double", 0.5, 0.9),
        ("int8", 1.0, 1.2),
        ("torchao-int8", 1.0, 1.2),
    ):
        found = stored_bytes(load(folders["llama-gqa2"], kind))
        assert least < 4 * found["bytes_linears"] / plain["bytes_linears"] < most, kind
        assert plain["bytes_model"] - plain["bytes_linears"] == found["bytes_model"] - found["bytes_linears"]


def test_page_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "bench"))
    import bench_quantised as bench

    made = bench.table((root / "bench" / "results" / "quantised.jsonl").read_text(encoding="utf-8").splitlines())
    page = (root / "docs" / "quantised.md").read_text(encoding="utf-8")
    assert bench.START + made + bench.END in page, "run `python bench/bench_quantised.py --page`"


def load_plain(folder: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


# what is refused, and what is noticed


def refused(model: Any, *words: str, error: type[Exception] = UnsupportedModelError) -> None:
    with pytest.raises(error) as caught:
        patched(model)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_quantised_unembedding(folders: dict[str, Any]) -> None:
    from transformers import BitsAndBytesConfig

    setting = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    refused(load(folders["llama-gqa2"], "", quantization=setting), "lm_head", "unembedding", "llm_int8_skip_modules")


@pytest.mark.parametrize("kind", ["int8", "torchao-int8"])
def test_offloaded(folders: dict[str, Any], kind: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is an optional dependency")
    model = load(folders["llama-gqa2"], kind)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    refused(model, "layers.0.self_attn.q_proj", "offloaded", "device_map")


def test_quantised_in_every_pass(folders: dict[str, Any]) -> None:
    from transformers import BitsAndBytesConfig

    setting = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    refused(load(folders["llama-gqa2"], "", quantization=setting), "llm_int8_has_fp16_weight")


def test_kernels_that_are_not_here(folders: dict[str, Any]) -> None:
    """torchao's int4 for its own kernels, on a machine without them: the library's reason is in the message."""
    from torchao.quantization import Int4Tensor

    model = load_plain(folders["llama-gqa2"])
    groups = torch.ones(2, 128)
    packed = Int4Tensor(torch.zeros(128, 32, dtype=torch.int8), groups, groups.clone(), [1, 32], torch.Size([128, 64]))
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    refused(model, "layers.1.mlp.up_proj", "Int4Tensor", "cannot run on cpu", "Error: ", "another format")


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_tuning(folders: dict[str, Any], kind: str) -> None:
    model = load(folders["llama-gqa2"], kind)
    for targets in ({"heads": [(1, 0)]}, {"heads": [], "mlps": [1]}):
        with pytest.raises(UnsupportedModelError, match=r"layers\.1\.\S+ is quantised.*fp32.*can be trained"):
            pa.SelectiveTuner(model, **targets)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_wrong_write_is_noticed(folders: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check's tolerance, wider for 8 bits, still tells heads in the wrong order and a forgotten scale."""
    right = quantised.dense_weight
    for wrong in (lambda w: w.roll(16, 1), lambda w: 1.5 * w):
        monkeypatch.setattr(weights, "dense_weight", lambda *a, wrong=wrong: wrong(right(*a)))
        refused(load(folders["llama-gqa2"], kind), "self-check", "attention write", error=SelfCheckError)


def test_a_changed_scale_is_checked_again(folders: dict[str, Any]) -> None:
    """torchao's weights have no address and no version of their own: their parts are watched."""
    model = load(folders["llama-gqa2"], "torchao-int8")
    sites = resolve(model)
    before = oracle._state(sites)
    model.model.layers[0].self_attn.o_proj.weight.scale.mul_(2)
    assert oracle._state(sites) != before


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_non_finite(folders: dict[str, Any], kind: str) -> None:
    model = load(folders["llama-gqa2"], kind)
    model.model.norm.weight.data[3] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(model, "model.norm.weight", "NaN", error=NonFiniteError)


def test_the_log_is_not_filled(folders: dict[str, Any]) -> None:
    """LLM.int8 warns at every product; a run says it once, in its settings, and leaves the logger as it was."""
    model, lines = load(folders["llama-gqa2"], "int8"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("bitsandbytes.autograd._functions")
    log.addHandler(handler)
    try:
        patched(model)
        assert lines == [] and log.filters == []
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))
        assert len(lines) > 10
    finally:
        log.removeHandler(handler)


def test_configs_are_what_they_say() -> None:
    assert config("int8").llm_int8_threshold == 2.0 and config("fp4-double").bnb_4bit_use_double_quant
