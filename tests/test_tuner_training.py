"""Training with a SelectiveTuner: what must stay identical, bit for bit, and what it must equal."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from test_tuner import HEADS, batch, trained_places

import pyarith as pa

OPTIMIZERS = {
    "own": lambda tuner: tuner.optimizer(lr=0.02, weight_decay=0.1),
    "adamw": lambda tuner: torch.optim.AdamW(tuner.parameters(), lr=0.02, weight_decay=0.1),
    "adamw-fused": lambda tuner: torch.optim.AdamW(tuner.parameters(), lr=0.02, weight_decay=0.1, fused=True),
    "sgd": lambda tuner: torch.optim.SGD(tuner.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda tuner: torch.optim.RMSprop(tuner.parameters(), lr=0.01, weight_decay=0.1),
}


def steps(model: Any, optimizer: Any, n: int, first: int = 0) -> list[float]:
    losses = []
    for number in range(first, first + n):
        loss = model(**batch(number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_twenty_steps_leave_every_other_entry_bit_identical(name, optimizer):
    dtype = torch.bfloat16 if optimizer in ("own", "sgd") else torch.float32
    model = tiny_models.make(name, dtype)
    places = trained_places(model, HEADS, "group", (1,))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pa.SelectiveTuner(model, HEADS, mlps=[1]) as tuner:
        steps(model, OPTIMIZERS[optimizer](tuner), 20)
        for one, value in zip(tuner.slices, tuner.parameters(), strict=True):
            held = torch.cat(one.views(), one.dim)  # rounded to nearest
            assert torch.equal(held, value.to(held.dtype))
    for key, tensor in model.state_dict().items():
        changed = tensor != before[key]
        expected = places.get(key, torch.zeros_like(changed))
        assert not (changed & ~expected).any(), key
        assert changed[expected].float().mean() > 0.9 if expected.any() else True, key


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_all_heads_and_mlps_equal_adamw_with_the_rest_frozen(name):
    model, other = tiny_models.make(name), tiny_models.make(name)
    every = [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(4)]
    layers = range(model.config.num_hidden_layers)
    places = trained_places(other, every, "group", tuple(layers))
    for key, parameter in other.named_parameters():
        parameter.requires_grad_(bool(places[key].all()))
        assert places[key].all() or not places[key].any()
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    reference = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], **settings)
    with pa.SelectiveTuner(model, every, mlps=layers) as tuner:
        losses = steps(model, tuner.optimizer(**settings), 8)
        assert losses == pytest.approx(steps(other, reference, 8), rel=1e-6)  # transformers takes the loss in fp32
    for (key, found), want in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, msg=key)


def test_own_optimizer_equals_torchs_with_clipping_and_accumulation():
    """Two half batches, gradients scaled by 4 and clipped, against torch's AdamW and clip_grad_norm_."""
    models = [tiny_models.make("llama-gqa2") for _ in range(2)]
    tuners = [pa.SelectiveTuner(model, HEADS) for model in models]
    own = tuners[0].optimizer(lr=0.01, grad_scale=4.0, max_grad_norm=0.05)
    torchs = torch.optim.AdamW(tuners[1].parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.1, 5) for one in (own, torchs)]
    for number in range(5):
        for model, factor in zip(models, (1.0, 4.0), strict=True):
            for half in range(2):
                (factor * model(**batch(2 * number + half)).loss / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(tuners[1].parameters()), 0.05)
        for optimizer, schedule in zip((own, torchs), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        torch.testing.assert_close(own.grad_norm.double(), norm, rtol=1e-6, atol=0)
        assert norm > 0.05
    for found, want in zip(*(tuner.parameters() for tuner in tuners), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)  # a thousandth of one step: the scale is fp32


def test_interrupted_and_resumed_equals_uninterrupted_and_seeds_give_the_same_bits():
    def run(stop: int | None) -> tuple[list[float], list[torch.Tensor]]:
        model = tiny_models.make("llama-gqa2", torch.bfloat16)
        tuner = pa.SelectiveTuner(model, HEADS)
        optimizer = tuner.optimizer(lr=0.01, stochastic_rounding=True, seed=3)
        if stop is None:
            return steps(model, optimizer, 8), list(tuner.parameters())
        losses = steps(model, optimizer, stop)
        values, state = tuner.state_dict(), optimizer.state_dict()
        model = tiny_models.make("llama-gqa2", torch.bfloat16)
        tuner = pa.SelectiveTuner(model, HEADS)
        optimizer = tuner.optimizer(lr=0.01, stochastic_rounding=True, seed=3)
        tuner.load_state_dict(values)
        optimizer.load_state_dict(state)
        return losses + steps(model, optimizer, 8 - stop, stop), list(tuner.parameters())

    losses, values = run(None)
    for stop in (None, 3):
        again, found = run(stop)
        assert again == losses and all(torch.equal(a, b) for a, b in zip(found, values, strict=True))


def test_state_exists_for_the_slices_only():
    model = tiny_models.make("llama", torch.bfloat16)
    with pa.SelectiveTuner(model, HEADS) as tuner:
        optimizer = tuner.optimizer(lr=0.01)
        model(**batch()).loss.backward()
        optimizer.step()
        held = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        held += [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(t.numel() * t.element_size() for t in held) == 3 * 4 * tuner.n_parameters


def test_the_trainer_of_transformers_trains_clips_saves_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    data = [{name: tensor[0] for name, tensor in batch(seed).items()} for seed in range(16)]
    settings = transformers.TrainingArguments(
        str(tmp_path),
        **{"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "use_cpu": True},
        **{"max_grad_norm": 0.1, "weight_decay": 0.1, "report_to": [], "disable_tqdm": True, "logging_steps": 1},
    )

    def train(**resume: Any) -> Any:
        model = tiny_models.make("llama-gqa2", torch.float32)
        with pa.SelectiveTuner(model, HEADS):
            trainer = transformers.Trainer(model=model, args=settings, train_dataset=data)
            trainer.train(**resume)
        return model, trainer.state.log_history

    model, log = train()
    assert log[0]["grad_norm"] > 0.1
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    own, start = model.state_dict(), tiny_models.make("llama-gqa2", torch.float32).state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[key], own[key]) for key in own)
    places = trained_places(model, HEADS, "group")
    assert all(((own[key] != start[key]) == places[key]).float().mean() > 0.95 for key in own)
    assert not any(((own[key] != start[key]) & ~places[key]).any() for key in own)
    resumed, _ = train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, own[key]) for key, value in resumed.state_dict().items())


def test_accelerate_prepares_and_accumulates():
    accelerate = pytest.importorskip("accelerate")
    model, other = (tiny_models.make("llama", torch.float32) for _ in range(2))
    tuner, plain = pa.SelectiveTuner(model, HEADS), pa.SelectiveTuner(other, HEADS)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, tuner.optimizer(lr=0.01))
    reference = plain.optimizer(lr=0.01)
    for number in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch(number)).loss)
            optimizer.step()
            optimizer.zero_grad()
        (other(**batch(number)).loss / 2).backward()
        if number % 2:
            reference.step()
            reference.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(tuner.parameters(), plain.parameters(), strict=True))


def test_autocast_trains_fp32_weights():
    """Gradients under bf16 autocast are those of a model whose projections are computed in bf16."""
    model, other = (tiny_models.make("llama", torch.float32) for _ in range(2))
    with pa.SelectiveTuner(model, HEADS) as tuner, torch.autocast("cpu", torch.bfloat16):
        found, want = model(**batch()), other(**batch())
        assert torch.equal(found.loss, want.loss)
    found.loss.backward()
    want.loss.backward()
    full = dict(other.named_parameters())
    for one, value in zip(tuner.slices, tuner.parameters(), strict=True):
        grad = full[one.name].grad
        expected = torch.cat([grad.narrow(one.dim, a, b - a) for a, b in one.ranges], one.dim)
        assert value.grad.dtype == torch.float32
        torch.testing.assert_close(value.grad, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number >= 0, got -1"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "betas"),
        ({"lr": 1.0, "grad_scale": 0.0}, "grad_scale: expected a positive number"),
        ({"lr": 1.0, "max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with (
        pa.SelectiveTuner(tiny_models.make("llama"), HEADS) as tuner,
        pytest.raises(pa.errors.InputError, match=message),
    ):
        tuner.optimizer(**options)
