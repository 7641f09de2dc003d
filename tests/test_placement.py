"""Models that accelerate has spread by ``device_map``: the numbers of the model in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from tiny_models import inputs, make, prompts

import pyarith as pa
from pyarith.engine.replay import Replay
from pyarith.engine.store import circumstances
from pyarith.errors import InputError, UnsupportedModelError
from pyarith.models import placement
from pyarith.models.fingerprint import model_fingerprint
from pyarith.models.sites import resolve

pytest.importorskip("accelerate")
GIVEN = inputs(prompts((7, 5, 9)), torch.tensor([11, 90, 3]), "left")
QUIET: dict[str, Any] = {"progress": False, "verify": 1, "log_probs": True}
PLACES = {
    "every other layer on disk": lambda name: "disk" if ".0" in name or ".2" in name else "cpu",
    "all on disk": lambda name: "disk",
}


def spread(model: Any, folder: Path, place: Any) -> Any:
    """The model loaded again by transformers with a device_map."""
    model.save_pretrained(folder / "model")
    blocks = next(name for name, child in model.named_modules() if isinstance(child, torch.nn.ModuleList))
    root = blocks.split(".")[0]
    top = [f"{root}.{name}" for name, _ in model.get_submodule(root).named_children()]
    names = [name for name in top if name != blocks] + [name for name, _ in model.named_children() if name != root]
    names += [f"{blocks}.{i}" for i in range(len(model.get_submodule(blocks)))]
    return type(model).from_pretrained(
        folder / "model",
        dtype=torch.float32,
        device_map={name: place(name) for name in names},
        offload_folder=folder / "offloaded",
        attn_implementation=model.config._attn_implementation,
    )


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_offloaded_layers(name: str, place: Any, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    moved = spread(model, tmp_path, place)
    assert any(p.is_meta for p in moved.parameters())
    expected = pa.fast_patch(model, **GIVEN, **QUIET)
    found = pa.fast_patch(moved, **GIVEN, **QUIET)
    for field in ("head_logits", "mlp_logits", "clean_logits", "head_log_probs"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=2e-5, atol=2e-5)
    assert all(p.is_meta for n, p in moved.named_parameters() if ".0." in n)  # and is as it was
    assert model_fingerprint(moved) == model_fingerprint(model)
    circumstances(resolve(moved, spread=True))


def test_discover_on_an_offloaded_model(tmp_path: Path) -> None:
    model, tokenizer = pa.load_demo()
    moved = spread(model, tmp_path, PLACES["every other layer on disk"])
    pairs = pa.tasks.arithmetic(tokenizer, n=12, seed=1)
    expected, found = (pa.discover(one, pairs, progress=False) for one in (model, moved))
    np.testing.assert_allclose(found.result.head_logits, expected.result.head_logits, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found.correct, expected.correct)


def test_a_map_of_one_device_is_nothing_special(tmp_path: Path) -> None:
    model = make("llama", torch.float32)
    moved = spread(model, tmp_path, lambda name: "cpu")
    assert not placement.is_spread(moved)
    found = pa.fast_patch(moved, **GIVEN, **QUIET)
    assert found.settings["fused"]
    np.testing.assert_array_equal(found.head_logits.shape, (3, 4, 3))


def test_modules_wrapped_by_accelerate_keep_the_fused_path(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = make("llama", torch.float32)
    expected = pa.fast_patch(model, **GIVEN, **QUIET)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    found = pa.fast_patch(model, **GIVEN, **QUIET)
    assert found.settings["fused"]
    np.testing.assert_array_equal(found.head_logits, expected.head_logits)
    model.model.layers[1].mlp._old_forward = lambda x: x * 0  # a forward that is not the class's own
    assert not placement.own_forward(model.model.layers[1].mlp)


def test_only_living_rows_need_to_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one device can show it: at every boundary only the rows alive are handed on."""
    model = make("gemma2", torch.float32)
    expected = pa.fast_patch(model, **GIVEN, **QUIET)
    seen = []

    def travel(self: Replay, rows: torch.Tensor, alive: int, device: torch.device) -> torch.Tensor:
        there = torch.full_like(rows, float("nan"))
        there[:alive] = rows[:alive]
        waiting = self._waiting(rows)
        if waiting is not None:
            waiting[alive:] = float("nan")
        seen.append((alive, device))
        return there

    monkeypatch.setattr(Replay, "_travel", travel)
    found = pa.fast_patch(model, **GIVEN, **QUIET)
    assert seen[:2] == [(0, torch.device("cpu")), (5, torch.device("cpu"))]
    np.testing.assert_array_equal(found.head_logits, expected.head_logits)


def test_others_refuse_it(tmp_path: Path) -> None:
    moved = spread(make("llama", torch.float32), tmp_path, PLACES["all on disk"])
    with pytest.raises(UnsupportedModelError, match=r"spread over devices or offloaded by device_map.*load it whole"):
        pa.SelectiveTuner(moved, [(0, 1)])


def test_weights_without_data_are_refused() -> None:
    model = make("llama", torch.float32).to("meta")
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        pa.fast_patch(model, **GIVEN, **QUIET)


def test_a_hook_of_the_user_is_still_seen(tmp_path: Path) -> None:
    moved = spread(make("llama", torch.float32), tmp_path, PLACES["all on disk"])
    moved.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="without hooks"):
        circumstances(resolve(moved, spread=True))
