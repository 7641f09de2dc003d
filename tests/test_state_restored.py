"""A call leaves no trace, also when it is broken off in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, SDPA, inputs, make, prompts

import pyarith as pa

QUIET = {"progress": False, "verify": 2}


def given(side: str = "left") -> dict[str, Any]:
    return inputs(prompts((7, 5, 9, 6)), [1, 2, 3, 4], side)


def lived_in(name: str = "llama-gqa2", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model in the middle of something: mixed training flags, gradients, frozen weights, a hook of its own."""
    model = make(name, dtype)
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        if i % 4 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    model.register_forward_hook(lambda *_: None)
    next(model.children()).register_forward_pre_hook(lambda *_: None)
    model.config.use_cache = True
    return model


@pytest.mark.parametrize("name", NAMES)
def test_after_a_run(name: str) -> None:
    for attn in ("eager", "sdpa") if name in SDPA else ("eager",):
        model = lived_in(name)
        model.config._attn_implementation = attn
        with unchanged(model):
            pa.fast_patch(model, **given(), log_probs=True, foils=torch.ones(4, 2, dtype=torch.int64), **QUIET)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"])
def test_dtypes(dtype: torch.dtype) -> None:
    model = lived_in(dtype=dtype)
    with unchanged(model):
        pa.fast_patch(model, **given(), mlps="frozen", **QUIET)


def test_training_mode_does_not_matter() -> None:
    """Dropout of a model in training mode stays out of the numbers."""
    dropout = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    model = make("gpt2", torch.float32, **dropout)
    still = pa.fast_patch(model, **given(), **QUIET)
    model.train()
    with unchanged(model):
        trained = pa.fast_patch(model, **given(), **QUIET)
    np.testing.assert_array_equal(still.head_logits, trained.head_logits)


def test_gradient_checkpointing() -> None:
    model = make("llama", torch.float32)
    plain = pa.fast_patch(model, **given(), **QUIET)
    model.train()
    # transformers renamed it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with unchanged(model):
        result = pa.fast_patch(model, **given(), **QUIET)
    np.testing.assert_array_equal(result.head_logits, plain.head_logits)


def test_model_made_in_inference_mode() -> None:
    """Its weights have no version counters; that is no reason to fail."""
    plain = pa.fast_patch(make("llama", torch.float32), **given(), **QUIET)
    with torch.inference_mode():
        model = make("llama", torch.float32)
    with unchanged(model):
        result = pa.fast_patch(model, **given(), **QUIET)
    np.testing.assert_array_equal(result.head_logits, plain.head_logits)


@pytest.mark.parametrize("outside", ["grad", "no_grad", "inference_mode", "autocast", "fp64_default", "deterministic"])
def test_switches_outside(outside: str) -> None:
    """Whatever torch is set to outside, the numbers are the same and the switch stays."""
    model = lived_in()
    plain = pa.fast_patch(model, **given(), **QUIET)
    contexts = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "fp64_default": torch.no_grad,
        "deterministic": torch.no_grad,
    }
    try:
        if outside == "fp64_default":
            torch.set_default_dtype(torch.float64)
        if outside == "deterministic":
            torch.use_deterministic_algorithms(True)
        with contexts[outside](), unchanged(model):
            result = pa.fast_patch(model, **given(), **QUIET)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    np.testing.assert_array_equal(result.head_logits, plain.head_logits)
    assert result.head_logits.dtype == np.float32


class Broken(BaseException):
    """Like Ctrl-C, not an ``Exception``."""


def raising(error: type[BaseException], after: int) -> Any:
    calls = []

    def call(*_: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise error("in mid-run")

    return call


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Broken], ids=lambda e: e.__name__)
@pytest.mark.parametrize("after", [0, 1])
def test_progress_that_raises(after: int, error: type[BaseException]) -> None:
    model = lived_in()
    with unchanged(model), pytest.raises(error):
        # batches one by one, so that there is a second call
        pa.fast_patch(model, [given(), given("right")], verify=2, progress=raising(error, after))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "path", ["model.layers.1.mlp", "model.layers.2.self_attn.q_proj", "model.layers.0", "model.norm", "model"]
)
def test_interrupted_inside_the_model(path: str, after: int, error: type[BaseException]) -> None:
    """Ctrl-C while a module of the model runs, in capture, replay or verification."""
    model = lived_in()
    model.get_submodule(path).register_forward_hook(raising(error, after))
    with unchanged(model):
        try:
            pa.fast_patch(model, **given(), **QUIET)
        except error:
            return
        # fewer calls than that were needed: only late breaks may not happen
        assert after > 0


def test_a_run_after_a_broken_one() -> None:
    """No hook is left behind that would change the next result."""
    model = make("llama", torch.float32)
    first = pa.fast_patch(model, **given(), **QUIET)
    hook = model.model.layers[1].mlp.register_forward_hook(raising(KeyboardInterrupt, 0))
    with pytest.raises(KeyboardInterrupt):
        pa.fast_patch(model, **given(), **QUIET)
    hook.remove()
    again = pa.fast_patch(model, **given(), **QUIET)
    np.testing.assert_array_equal(first.head_logits, again.head_logits)


def test_model_still_trains() -> None:
    """Autograd through the model works after a run, and the result needs no gradient."""
    model = make("llama", torch.float32)
    pa.fast_patch(model, **given(), **QUIET)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


FIRST_USE = """
import torch, transformers, random, sys
import numpy as np
from tiny_models import make, inputs, prompts
model = make("llama", torch.float32)
given = inputs(prompts(), [1, 2, 3], "left")
transformers.logging.set_verbosity_error()
from snapshot import unchanged
loaded = set(sys.modules)
with unchanged(model):
    import pyarith as pa
    new = {name.split(".")[0] for name in set(sys.modules) - loaded}
    assert not new & {"matplotlib", "scipy", "triton", "pandas", "plotly", "typer"}, new
with unchanged(model):
    pa.fast_patch(model, **given)
print("fine")
"""


def test_first_use_in_a_fresh_process() -> None:
    """Import, first-time measurements and caches draw from no generator and set no switch."""
    places = [Path(__file__).parent, Path(pa.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"  # and nothing is printed when the output is no terminal
