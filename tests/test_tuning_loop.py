"""The training loop: gradients of a step, schedules, replay, checkpoints, what is not finite; settings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from true_fp64 import true_fp64
from tuning_runs import LENGTHS, batches_of, examples_of, run, same, settings_of, trainee_of, values

from pyarith.errors import InputError, InputTypeError
from pyarith.tuning import TuneSettings, loop
from pyarith.tuning.batches import IGNORED, Batches, micro_batch
from pyarith.tuning.loop import completion_loss, make_schedule, train

# the loss and its gradient


@pytest.mark.parametrize("masked", [True, False], ids=["by mask", "by columns"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
@torch.no_grad()
def test_completion_loss_is_the_models_own(name, masked, monkeypatch):
    """Equal to labels=, with logits at labelled places only: where transformers takes masks, and where it does not."""
    monkeypatch.setattr(loop, "_logits_by_mask", lambda: masked)
    model, examples = tiny_models.make(name), examples_of()
    micro = micro_batch(examples, [(1,), (0,), (4,)])
    seen = []

    def forward(**inputs):
        seen.append(model(**inputs))
        return seen[-1]

    with true_fp64():
        own = model(**micro.inputs(), labels=micro.labels).loss * int((micro.labels != IGNORED).sum())
        assert float(completion_loss(forward, micro)) == pytest.approx(float(own), rel=1e-12)
    count = sum(int(examples.targets[one]) for one in (1, 0, 4))
    width = len(set().union(*(np.flatnonzero(examples.trained[one]) for one in (1, 0, 4))))
    assert seen[0].logits.shape[:-1] == ((count,) if masked else (3, width))


@pytest.mark.parametrize("shape", [(10, None), (3, None), (1, None), (2, 12), (9, 60)], ids=str)
def test_the_gradient_is_that_of_the_mean_over_all_completion_tokens(shape):
    """However a step is cut into micro-batches, and packed or not."""
    rows, packed = shape
    model, examples = tiny_models.make("llama-gqa2"), examples_of()
    trainee = trainee_of(model, torch.optim.SGD, lr=1.0)
    settings = settings_of(lr=1.0, batch_size=10, steps=1, schedule="constant", warmup=0.0)
    with true_fp64():
        total = sum(
            model(input_ids=torch.tensor(ids)[None], labels=torch.tensor(np.where(t, ids, IGNORED))[None]).loss
            * t.sum()
            for ids, t in zip(examples.ids, examples.trained, strict=True)
        ) / int(examples.targets.sum())
        total.backward()
        expected = {name: value.detach() - value.grad for name, value in model.named_parameters()}
        history = train(trainee, Batches(examples, 10, rows, packed=packed), settings, progress=False)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=1e-12, msg=name)
    assert history.columns["loss"][0] == pytest.approx(total.item(), rel=1e-12)
    assert history.columns["completion_tokens"] == [examples.targets.sum()]
    assert history.columns["tokens"] == [sum(LENGTHS)]


def test_gradients_are_clipped_to_their_norm_and_told_before_it():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            grads = [value.grad for group in self.param_groups for value in group["params"] if value.grad is not None]
            seen.append(float(torch.nn.utils.get_total_norm(grads)))
            return super().step(closure)

    told = []
    for clip in (None, 0.5):
        model = tiny_models.make("llama", torch.float32)
        settings = settings_of(steps=1)
        told += train(trainee_of(model, Spy, clip), batches_of(settings), settings, progress=False).columns["grad_norm"]
    assert seen[0] == pytest.approx(told[0]) and told[0] == told[1] > 0.5
    assert seen[1] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        ("linear", lambda x: 1 - x),
        ("polynomial", lambda x: (1 - x) ** 2),
        ("constant", lambda x: 1.0),
    ],
)
def test_schedules(schedule, shape):
    settings = settings_of(lr=0.3, steps=10, warmup=0.15, schedule=schedule)
    trainee = trainee_of(tiny_models.make("llama", torch.float32), lr=0.3)
    rates = train(trainee, batches_of(settings), settings, progress=False).columns["lr"]
    warm = 2  # 1.5 rounded up
    expected = [0.3 * (step / warm if step < warm else shape((step - warm) / (10 - warm))) for step in range(10)]
    assert rates == pytest.approx(expected)
    assert make_schedule(trainee.optimizer, replace(settings, warmup=0.0), 10).get_last_lr()[0] > 0


def test_same_seed_same_bits_and_every_arm_sees_the_same_examples():
    settings, seen = settings_of(epochs=2), []
    (one, _, history), (other, _, again) = run(settings), run(settings)
    assert same(values(one), values(other)) and history.columns["loss"] == again.columns["loss"]
    assert not same(values(one), values(run(settings_of(epochs=2, seed=1))[0]))
    for make in (torch.optim.AdamW, torch.optim.SGD):
        trainee = trainee_of(tiny_models.make("gpt2", torch.float32), make)
        spied = replace(trainee, objective=lambda micro, t=trainee: (seen.append(micro.members), t.objective(micro))[1])
        train(spied, batches_of(settings), settings, progress=False)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and len(seen) == 2 * 2 * 5


def test_fixed_groups_come_in_another_order():
    settings = settings_of()
    batches = batches_of(settings, regroup=False)
    epochs = [[tuple(batches.chosen(3 * epoch + step)) for step in range(3)] for epoch in range(6)]
    assert len({frozenset(epoch) for epoch in epochs}) == 1 and len(set(map(tuple, epochs))) > 1
    free = batches_of(settings)
    assert (
        set(epochs[0])
        == {tuple(free.chosen(step)) for step in range(3)}
        != {tuple(free.chosen(3 + s)) for s in range(3)}
    )


# replay


def test_replay_with_weight_one_changes_no_bit():
    settings = settings_of(epochs=2)
    general = batches_of(settings, examples_of((4, 8, 6), seed=9), stream=1)
    (one, _, history), (other, _, again) = run(settings), run(settings, replay=general)
    assert same(values(one), values(other))
    assert history.columns["loss"] == again.columns["loss"] and np.isnan(again.columns["general_loss"]).all()


def test_replay_is_weighted():
    task, other = examples_of(), examples_of((4, 8, 6), seed=9)
    settings = settings_of(lr=1.0, steps=1, batch_size=10, task_weight=0.75, schedule="constant", warmup=0.0)

    def mean(model, examples):
        losses = []
        for ids, trained in zip(examples.ids, examples.trained, strict=True):
            labels = torch.tensor(np.where(trained, ids, IGNORED))[None]
            losses.append(model(input_ids=torch.tensor(ids)[None], labels=labels).loss * trained.sum())
        return sum(losses) / int(examples.targets.sum())

    model = tiny_models.make("llama")
    with true_fp64():
        parts = mean(model, task), mean(model, other)
        (0.75 * parts[0] + 0.25 * parts[1]).backward()
        expected = {name: value.detach() - value.grad for name, value in model.named_parameters()}
        trainee = trainee_of(model, torch.optim.SGD, lr=1.0)
        general = Batches(other, 3, 2, stream=1)
        history = train(trainee, batches_of(settings, task), settings, replay=general, progress=False)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=1e-12, msg=name)
    told = {name: history.columns[name][0] for name in ("loss", "task_loss", "general_loss", "completion_tokens")}
    task_loss, general_loss = (part.item() for part in parts)
    assert told == pytest.approx(
        {
            "loss": 0.75 * task_loss + 0.25 * general_loss,
            "task_loss": task_loss,
            "general_loss": general_loss,
            "completion_tokens": task.targets.sum() + other.targets.sum(),
        }
    )
    with pytest.raises(InputError, match=r"replay: expected general data beside task_weight=0\.75"):
        train(trainee, batches_of(settings), settings, progress=False)


# progress and settings


def test_progress_is_told_every_step():
    seen, settings = [], settings_of(epochs=1)
    trainee = trainee_of(tiny_models.make("llama", torch.float32))
    history = train(trainee, batches_of(settings), settings, progress=seen.append)
    assert [(one.step, one.steps) for one in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [one.loss for one in seen] == history.columns["loss"] and all(one.memory > 1e6 for one in seen)
    assert str(seen[0]).startswith(f"loss {seen[0].loss:.4f}, ") and "tokens/s, peak" in str(seen[0])
    with pytest.raises(InputTypeError, match="progress: expected None, False or a callable, got str"):
        train(trainee, batches_of(settings), settings, progress="yes")


def test_a_bar_is_shown_on_demand(capsys):
    settings = settings_of(steps=2)
    train(trainee_of(tiny_models.make("llama", torch.float32)), batches_of(settings), settings, progress=True)
    shown = capsys.readouterr().err
    assert "precise_sft" in shown and "loss " in shown and "2/2" in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0}, "lr: expected a positive number, got 0"),
        ({"lr": math.nan}, "lr: expected a positive number"),
        ({"lr_scale": -1.0}, "lr_scale: expected a positive number"),
        ({"grad_scale": "all"}, "grad_scale: expected a positive number or 'heads', got 'all'"),
        ({"max_grad_norm": 0}, "max_grad_norm: expected a positive number or None, got 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        ({"warmup": 1.0}, "warmup: expected 0 <= share < 1"),
        ({"schedule": "step"}, "schedule: expected one of cosine, linear, polynomial, constant, got 'step'"),
        ({"epochs": 0}, "epochs: expected a whole number >= 1"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number >= 1"),
        ({"micro_batch_size": True}, "micro_batch_size: expected a whole number >= 1"),
        ({"steps": 0}, "steps: expected None or a whole number >= 1"),
        ({"task_weight": 0.0}, "task_weight: expected 0 < weight <= 1"),
        ({"task_weight": 1.5}, "task_weight: expected 0 < weight <= 1"),
        ({"kv": "all"}, "kv: expected one of group, none"),
        ({"seed": -1}, "seed: expected a whole number >= 0"),
        ({"packing": 3}, "packing: expected True or False, got 3"),
        ({"prefix_cache": "much"}, "prefix_cache: expected bytes or a text such as"),
        ({"prefix_cache": "1GiB", "packing": True}, "prefix_cache: expected regroup=False beside packing"),
        ({"learning_rate": 1.0}, "settings: expected some of lr, .*, got learning_rate"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        TuneSettings.of("default", changes)


def test_presets_and_changes():
    paper = TuneSettings.preset("paper")
    assert (paper.lr, paper.batch_size, paper.epochs, paper.grad_scale, paper.max_grad_norm) == (
        2e-5,
        128,
        2,
        "heads",
        None,
    )
    assert TuneSettings.of(paper, {"lr": 1e-3}) == replace(paper, lr=1e-3)
    assert TuneSettings.of("default", {}) == TuneSettings() and "save_every" not in paper.identity()
    with pytest.raises(InputError, match="settings: expected TuneSettings or one of default, paper, got 'fast'"):
        TuneSettings.of("fast", {})
