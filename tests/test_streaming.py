"""Weights that stay in their files: the numbers of a model in memory, bit for bit, without its bytes."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from tiny_models import MORE, NAMES, inputs, make, prompts

import pyarith as pa
from pyarith.demo import MODEL_DIR
from pyarith.engine import planner
from pyarith.engine.store import circumstances
from pyarith.errors import InputError, UnsupportedModelError
from pyarith.models import streaming
from pyarith.models.checkpoint import Checkpoint
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.sites import resolve
from pyarith.models.streaming import BufferedStream

ALL = [*NAMES, *MORE]
ANSWERS = torch.tensor([11, 90, 3, 42])


def stream(model: Any, folder: Path, dtype: Any) -> Any:
    """A tiny model saved and streamed, with its own attention implementation."""
    attention = model.config._attn_implementation
    return pa.stream_checkpoint(saved(model, folder), device="cpu", dtype=dtype, attn_implementation=attention)


def in_memory(model: Any, folder: Path, dtype: Any) -> Any:
    """The same model as ``from_pretrained`` gives it: where tensors lie changes the last bits of some products."""
    attention = model.config._attn_implementation
    return type(model).from_pretrained(folder, dtype=dtype or torch.float32, attn_implementation=attention)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several forward passes in every block, so that each layer runs for more than one group."""
    monkeypatch.setattr(planner, "_MAX_TOKENS", {"cpu": 16})
    monkeypatch.setattr(planner, "_MAX_PREFIXED_TOKENS", {"cpu": 4})
    # the vocabulary of 97 in several chunks, in the op and where the unembedding stays in its file
    for name, size in (("_LEAST_TOKENS", 8), ("_MOST_TOKENS", 40)):
        monkeypatch.setattr(importlib.import_module("pyarith.ops.vocab_logsumexp"), name, size)
    monkeypatch.setattr(streaming, "_CHUNK", 32 * 20)


def same(found: pa.PatchResult, expected: pa.PatchResult) -> None:
    for name in ("head_logits", "mlp_logits", "clean_logits", "corrupted_logits", "head_log_probs", "noise_floor"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.settings["plan"] == expected.settings["plan"]
    assert found.verification_error == expected.verification_error


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["mapped", "buffered"])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_model_in_memory(name: str, dtype: Any, tmp_path: Path, small_groups: None) -> None:
    model = make(name, torch.float32)
    given = inputs(prompts((7, 5, 9, 7)), ANSWERS, "left")
    streamed, model = stream(model, tmp_path, dtype), in_memory(model, tmp_path, dtype)
    options = {"progress": False, "verify": 1, "log_probs": True}
    expected = pa.fast_patch(model, **given, **options)
    assert np.abs(expected.head_logits - expected.clean_logits).max() > 1e-2
    same(pa.fast_patch(streamed, **given, **options), expected)
    assert isinstance(streamed.pyarith_stream, BufferedStream) == (dtype is not None)
    # rows of both are gathered from the file: neither is held whole
    tables = (streamed.get_input_embeddings().weight, streamed.get_output_embeddings().weight)
    starts = {tensor.data_ptr() for tensor in streamed.pyarith_stream.checkpoint.tensors.values()}
    assert all(table.dtype == torch.float32 and table.data_ptr() in starts for table in tables)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_each_layer_is_read_once(
    name: str, tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the weights per block of prompts, also where blocks are parallel and need two layers at once."""
    model = make(name, torch.float32, num_hidden_layers=4)
    streamed = stream(model, tmp_path, torch.float64)
    given = inputs(prompts((7, 5, 9, 7)), ANSWERS, "left")
    pa.fast_patch(streamed, **given, progress=False, verify=0)
    read = []
    fetch = BufferedStream._fetch

    def counted(self: BufferedStream, layer: int, before: Any) -> Any:
        read.append(layer)
        return fetch(self, layer, before)

    monkeypatch.setattr(BufferedStream, "_fetch", counted)
    monkeypatch.setattr("pyarith.engine.oracle.attach", lambda *_: None)
    pa.fast_patch(streamed, **given, progress=False, verify=0)
    # the first layer also comes ahead of the next pass; what is still there from the pass before is not read again
    assert 3 in read and all(read.count(layer) <= (2 if layer == 0 else 1) for layer in range(4)), read


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["mapped", "buffered"])
def test_stored_prefix(dtype: Any, mlps: str, tmp_path: Path, small_groups: None) -> None:
    model = make("gemma2", torch.float32)
    given = inputs(prompts((24, 24, 24, 24), shared=18, differ=(20,)), ANSWERS, "none")
    streamed, model = stream(model, tmp_path, dtype), in_memory(model, tmp_path, dtype)
    options = {"progress": False, "verify": 0, "log_probs": True, "mlps": mlps}
    expected = pa.fast_patch(model, **given, **options)
    assert expected.settings["prefix"] >= 16
    same(pa.fast_patch(streamed, **given, **options), expected)


def test_discover_on_a_folder() -> None:
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, n=12, seed=1)
    expected = pa.discover(model, pairs, progress=False)
    found = pa.discover(MODEL_DIR, pairs, progress=False)
    np.testing.assert_array_equal(found.result.head_logits, expected.result.head_logits)
    np.testing.assert_array_equal(found.correct, expected.correct)


def test_shards(tmp_path: Path) -> None:
    model = make("llama", torch.float32)
    folder = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    streamed = pa.stream_checkpoint(folder, device="cpu", attn_implementation="eager")
    given = inputs(prompts((7, 5, 9, 7)), ANSWERS, "left")
    expected = pa.fast_patch(in_memory(model, folder, None), **given, progress=False)
    np.testing.assert_array_equal(pa.fast_patch(streamed, **given, progress=False).head_logits, expected.head_logits)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["mapped", "buffered"])
def test_is_known_by_its_weights(dtype: Any) -> None:
    model, _ = pa.load_demo()
    streamed = pa.stream_checkpoint(MODEL_DIR, device="cpu", dtype=dtype)
    assert model_fingerprint(streamed) == model_fingerprint(model if dtype is None else model.to(dtype))
    circumstances(resolve(streamed, spread=True))  # its own hooks are no reason to refuse
    streamed.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"without hooks.*got some on model.layers.1.mlp"):
        circumstances(resolve(streamed, spread=True))


def test_others_refuse_it() -> None:
    streamed = pa.stream_checkpoint(MODEL_DIR, device="cpu")
    for call in (
        lambda: pa.SelectiveTuner(streamed, [(0, 1)]),
        lambda: pa.ablation_sweep(streamed, torch.ones(1, 3, dtype=torch.int64), torch.ones(1).long(), sets=[[(0, 1)]]),
    ):
        with pytest.raises(UnsupportedModelError, match=r"weights are streamed from a checkpoint.*load it whole"):
            call()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_streamed_in_the_form_that_the_model_holds(name: str, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    saved(model, tmp_path)
    if name == "mixtral":
        with pytest.raises(UnsupportedModelError, match=r"stored in another form.*save_original_format=False"):
            pa.stream_checkpoint(tmp_path)
    saved(model, tmp_path, save_original_format=False)
    given = inputs(prompts((7, 5, 9, 7)), ANSWERS, "left")
    for dtype in (None, torch.float64):
        streamed = pa.stream_checkpoint(tmp_path, device="cpu", dtype=dtype, attn_implementation="eager")
        whole = in_memory(model, tmp_path, dtype)
        for one in (streamed, whole):
            one.config._experts_implementation = "eager"
        expected = pa.fast_patch(whole, **given, progress=False, log_probs=True)
        same(pa.fast_patch(streamed, **given, progress=False, log_probs=True), expected)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["mapped", "buffered"])
def test_non_finite_weights_are_named(dtype: Any, tmp_path: Path) -> None:
    model = make("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    streamed = pa.stream_checkpoint(saved(model, tmp_path), device="cpu", dtype=dtype)
    with pytest.raises(pa.errors.NonFiniteError, match=r"weight model.layers.1.mlp.up_proj.weight"):
        pa.fast_patch(streamed, **inputs(prompts((7, 5)), ANSWERS[:2], "left"), progress=False)


# what is wrong with the files


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return saved(make("llama", torch.float32), tmp_path / "model", max_shard_size="20KB")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_header(path: Path, change: Any) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_missing_shard(sharded: Path) -> None:
    gone = shards(sharded)[1]
    gone.unlink()
    with pytest.raises(InputError, match=rf"lacks 1 of the \d files that its index names: {gone.name}"):
        pa.stream_checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    short = shards(sharded)[1]
    content = short.read_bytes()
    short.write_bytes(content[:keep])
    with pytest.raises(InputError, match=rf"{short.name} is cut short or damaged: it has {len(content[:keep])} bytes"):
        pa.stream_checkpoint(sharded)


def test_damaged_header(sharded: Path) -> None:
    path = shards(sharded)[0]
    content = bytearray(path.read_bytes())
    content[9] = 0
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name} is cut short or damaged: its header cannot be read"):
        pa.stream_checkpoint(sharded)


def test_damaged_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*index.json"):
        pa.stream_checkpoint(sharded)


def test_shards_of_different_checkpoints(sharded: Path, tmp_path: Path) -> None:
    first, second, *_ = shards(sharded)
    shutil.copy(second, first)
    with pytest.raises(InputError, match=rf"{first.name} lacks \d+ tensors that the index places there"):
        pa.stream_checkpoint(sharded)


def test_wrong_shape(sharded: Path) -> None:
    def change(header: Any) -> None:
        name = next(name for name in header if name != "__metadata__" and len(header[name]["shape"]) == 2)
        header[name]["shape"].reverse()

    for path in shards(sharded):
        edit_header(path, change)
    with pytest.raises(InputError, match=r"tensors \(name, shape in the file, shape in the model\) do not fit"):
        pa.stream_checkpoint(sharded)


def test_shape_that_contradicts_the_bytes(sharded: Path) -> None:
    def change(header: Any) -> None:
        header[next(name for name in header if name != "__metadata__")]["shape"] = [3, 3]

    edit_header(shards(sharded)[0], change)
    with pytest.raises(InputError, match=r"of shape \[3, 3\] in F32 should take 36 bytes, its header gives"):
        pa.stream_checkpoint(sharded)


def test_unknown_dtype(sharded: Path) -> None:
    def change(header: Any) -> None:
        header[next(name for name in header if name != "__metadata__")]["dtype"] = "F4"

    edit_header(shards(sharded)[0], change)
    with pytest.raises(InputError, match="is stored as F4, which is not supported"):
        pa.stream_checkpoint(sharded)


def test_missing_tensor(tmp_path: Path) -> None:
    model = make("llama", torch.float32)
    folder = saved(model, tmp_path)

    def change(header: Any) -> None:
        header["model.layers.7.mlp.up_proj.weight"] = header.pop("model.layers.1.mlp.up_proj.weight")

    edit_header(folder / "model.safetensors", change)
    with pytest.raises(InputError, match=r"lacks 1 tensors that LlamaForCausalLM needs: model.layers.1.mlp.up_proj"):
        pa.stream_checkpoint(folder)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder with config.json"):
        pa.stream_checkpoint(tmp_path)
    shutil.copy(MODEL_DIR / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"expected model.safetensors or .*, found neither"):
        Checkpoint(tmp_path)


def test_foreign_families_and_quantised_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match="family 'bert' is not supported"):
        pa.stream_checkpoint(tmp_path)
    config = json.loads((MODEL_DIR / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UnsupportedModelError, match="quantised weights, which cannot be streamed"):
        pa.stream_checkpoint(tmp_path)


# memory

_LIMITED = """
import resource, sys
import torch
import pyarith as pa
torch.set_num_threads(1)

def run(model):
    ids = torch.arange(1, 13).view(2, 6)
    other = ids.clone(); other[:, 2] += 30
    return pa.fast_patch(model, ids, other, torch.tensor([5, 6]), progress=False, verify=1, memory_budget="8MiB")

run(pa.stream_checkpoint(sys.argv[1]))  # what every process needs once
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
size = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (used + size // 4,) * 2)
if sys.argv[3] == "whole":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
else:
    model = pa.stream_checkpoint(sys.argv[2], device="cpu")
print(run(model).head_logits.shape)
"""


def test_memory_is_a_quarter_of_the_model(tmp_path: Path) -> None:
    """Private memory: what the process owns. With the model read into memory the same limit is not enough."""
    model = make(
        "llama", torch.float32, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_key_value_heads=4
    )
    size = sum(parameter.nbytes for parameter in model.parameters())
    folder = saved(model, tmp_path / "model", max_shard_size="50MB")
    small = saved(make("llama", torch.float32), tmp_path / "small")
    script = tmp_path / "limited.py"
    script.write_text(_LIMITED)
    for how, fine in (("streamed", True), ("whole", False)):
        command = [sys.executable, str(script), str(small), str(folder), how, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) == fine, done.stderr
        assert ("(16, 4, 2)" in done.stdout) == fine
        if not fine:
            assert "memory" in done.stderr.lower()
