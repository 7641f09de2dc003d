"""Small training runs for tests of the loop."""

from __future__ import annotations

import numpy as np
import tiny_models
import torch

from pyarith.tuning import Examples, TuneSettings
from pyarith.tuning.batches import Batches
from pyarith.tuning.loop import Trainee, train

LENGTHS = (5, 9, 3, 7, 2, 6, 4, 8, 5, 3)


def examples_of(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(0, tiny_models.VOCAB, length) for length in lengths)
    trained = tuple(np.arange(length) >= max(1, length // 2) for length in lengths)
    return Examples(ids, trained, np.arange(1, len(ids) + 1))


def settings_of(**changes):
    return TuneSettings(**{"lr": 1e-2, "batch_size": 4, "micro_batch_size": 2, "max_grad_norm": None, **changes})


def batches_of(settings, examples=None, **changes):
    chosen = {"batch_size": settings.batch_size, "rows": settings.micro_batch_size, "seed": settings.seed, **changes}
    return Batches(examples or examples_of(), **chosen)


def trainee_of(model, make=torch.optim.AdamW, max_grad_norm=None, **options):
    optimizer = make(model.parameters(), **{"lr": 1e-2, **options})
    return Trainee.of_model(model, optimizer, max_grad_norm)


def run(settings, model=None, make=torch.optim.AdamW, batches=None, **options):
    """(model, trainee, history) after training a tiny model."""
    model = model or tiny_models.make("llama", torch.float32)
    trainee = trainee_of(model, make)
    return model, trainee, train(trainee, batches or batches_of(settings), settings, progress=False, **options)


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
