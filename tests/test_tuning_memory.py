"""Memory of a step of Precise SFT at the LLaMA2-7B shape, counted on tensors without data; bench/gpu.py measures it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hollow import Recorded, hollow
from torch._subclasses.fake_tensor import FakeTensorMode

import pyarith as pa
from pyarith.tuning import loss as tuning_loss
from pyarith.tuning import selective

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def loss_of(tuner, ids):
    """``tuner.loss`` of labels that all count: picking those that do is no op of a tensor without data."""
    hidden = tuner._sites.decoder(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1).clone()
    targets = ids[:, 1:].flatten()
    weight = tuner.model.lm_head.weight
    factors = (1 / len(targets), 1.0, 0.0)  # mean; logits neither scaled nor capped
    return tuning_loss._VocabLoss.apply(hidden, weight, None, targets, factors, torch.float32)


def test_a_step_at_7b_fits_the_targets_of_the_gpu_benchmark(monkeypatch):
    for folder in ("tests/ops", "bench"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import gpu_tuning

    monkeypatch.setattr(selective.Base, "of", lambda *_: None)  # a fingerprint reads values
    work = gpu_tuning.WORK
    heads = gpu_tuning.chosen_heads(work)
    lowest = min(layer for layer, _ in heads)
    assert {layer for layer, _ in heads} == set(range(11, 18)) and len(set(heads)) == 32
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = hollow("llama2-7b", num_hidden_layers=32 - lowest)  # what lies below the tuned layers keeps nothing
        ids = torch.zeros(work.batch, work.pos, dtype=torch.int64)
        with torch.no_grad(), Recorded() as inference:
            model(ids, use_cache=False)
        tuner = pa.SelectiveTuner(model, [(layer - lowest, head) for layer, head in heads])
        with Recorded() as plain:
            loss_of(tuner, ids)  # all that the backward pass needs is there, and the logits of a block
        model.train().activation_checkpointing_enable()
        with Recorded() as checkpointed:
            loss_of(tuner, ids).backward()
        held = tuner.state_bytes["slices"] + tuner.state_bytes["adamw"] - inference.peak
    # a checkpoint keeps the input of its layer until the garbage collector comes by, those of the layers below too
    inputs_below = lowest * ids.numel() * work.d_model * torch.bfloat16.itemsize
    counts = ((plain.peak, 11.7, 12), (checkpointed.peak + inputs_below, 2.2, 4))  # as in docs/gpu.md
    for peak, counted, most in counts:
        assert (held + peak) / GIB == pytest.approx(counted, abs=0.05) and counted <= most
