"""The training loop: gradients of a step, schedules, replay, checkpoints, what is not finite; settings."""

from __future__ import annotations

import json
import math
import resource
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from true_fp64 import true_fp64

from pyarith.errors import InputError, InputTypeError, NonFiniteError, StorageError
from pyarith.tuning import Examples, TuneSettings, loop
from pyarith.tuning.batches import IGNORED, Batches, micro_batch
from pyarith.tuning.checkpoint import Checkpoint, write_whole
from pyarith.tuning.loop import Trainee, completion_loss, make_schedule, train

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


# checkpoints


class Interrupted(Exception):
    pass


def stop_after(step):
    def told(progress):
        if progress.step == step:
            raise Interrupted

    return told


def resumed(tmp_path, settings, make, model_of, every=2, stop=5):
    """(trainee, history) of a run that was interrupted and gone on with; a new model each time, as after a kill."""
    place = Checkpoint(tmp_path / "a" / "checkpoint.safetensors", {"settings": settings.identity()}, every)
    for _ in range(2):
        trainee = trainee_of(model_of(), make)
        torch.manual_seed(3)
        try:
            return trainee, train(
                trainee,
                batches_of(settings),
                settings,
                checkpoint=place,
                progress=stop_after(stop) if _ == 0 else False,
            )
        except Interrupted:
            torch.rand(7)
    raise AssertionError


def dropping():
    """A GPT-2 with dropout, in training mode."""
    return tiny_models.make("gpt2", torch.float32, attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2).train()


@pytest.mark.parametrize(
    ("make", "model_of"),
    [
        (torch.optim.AdamW, lambda: tiny_models.make("llama", torch.float32)),
        (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), lambda: tiny_models.make("llama", torch.bfloat16)),
        (lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True), dropping),
        (lambda p, lr: torch.optim.AdamW(p, lr, fused=True), lambda: tiny_models.make("qwen2", torch.float32)),
    ],
    ids=["AdamW", "SGD in bf16", "Adam and dropout", "fused AdamW"],
)
def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(tmp_path, make, model_of):
    settings = settings_of(epochs=3, warmup=0.2)
    whole = trainee_of(model_of(), make)
    torch.manual_seed(3)
    history = train(whole, batches_of(settings), settings, progress=False)
    again, later = resumed(tmp_path, settings, make, model_of)
    assert same(dict(whole.state()), dict(again.state()))
    old, new = whole.optimizer.state_dict(), again.optimizer.state_dict()
    assert old["param_groups"] == new["param_groups"] and old["state"].keys() == new["state"].keys()
    for number, state in old["state"].items():
        for key, value in state.items():
            found = new["state"][number][key]
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, key
    timed = ("seconds", "memory")
    assert all(
        history.columns[name] == later.columns[name] for name in loop.COLUMNS if name not in (*timed, "general_loss")
    )
    assert (history.resumed_at, later.resumed_at) == (None, 4) and len(later) == 9


def test_checkpoints_of_other_runs_are_refused_by_what_differs(tmp_path):
    settings = settings_of(steps=4)
    path = tmp_path / "checkpoint.safetensors"
    identity = {"settings": settings.identity(), "heads": ["1.2"], "data": {"task": "sha256:a"}}
    run(settings, checkpoint=Checkpoint(path, identity, 3))
    before = path.read_bytes()
    other = {"settings": replace(settings, lr=0.5).identity(), "heads": ["1.3"], "data": {"task": "sha256:a"}}
    model = tiny_models.make("llama", torch.float32)
    start = values(model)
    with pytest.raises(InputError) as caught:
        run(settings, model, checkpoint=Checkpoint(path, other, 3))
    for words in ("another run", "settings.lr was 0.01, now 0.5", 'heads was ["1.2"], now ["1.3"]', "resume=False"):
        assert words in str(caught.value)
    assert path.read_bytes() == before and same(values(model), start)
    run(settings, model, checkpoint=Checkpoint(path, other, 3), resume=False)
    assert path.read_bytes() != before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        run(settings, checkpoint=Checkpoint(path, identity, 3))
    for bad in ({}, {"format": 9}):
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path, {"pyarith": json.dumps(bad)} if bad else None)
        with pytest.raises(InputError, match="expected format 1" if bad else "cannot be read"):
            run(settings, checkpoint=Checkpoint(path, identity, 3))


@contextmanager
def full_disk(size):
    """No file can grow beyond ``size`` bytes; writing more fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path):
    settings, path = settings_of(steps=6), tmp_path / "checkpoint.safetensors"
    place = Checkpoint(path, {}, 2)
    with pytest.raises(Interrupted):
        train(
            trainee_of(tiny_models.make("llama", torch.float32)),
            batches_of(settings),
            settings,
            checkpoint=place,
            progress=stop_after(3),
        )
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(StorageError) as caught:
        run(settings, checkpoint=place)
    for words in (f"cannot write {path} (about 0.4 MiB)", "the one before is still there", "free space"):
        assert words in str(caught.value)
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]
    model, _, history = run(settings, checkpoint=place)
    assert history.resumed_at == 2 and same(values(model), values(run(settings)[0]))
    with full_disk(1000), pytest.raises(OSError, match="nothing was there before"):
        write_whole(tmp_path / "new" / "x.json", lambda at: at.write_text("x" * 9000))
    assert list((tmp_path / "new").iterdir()) == []


# what is not finite


@pytest.mark.parametrize("kind", ["loss", "gradient", "replay"])
def test_what_is_not_finite_stops_before_the_update(tmp_path, kind):
    settings = settings_of(steps=9, task_weight=0.5 if kind == "replay" else 1.0)
    general = batches_of(settings, examples_of((4, 8, 6), seed=9), stream=1) if kind == "replay" else None
    model = tiny_models.make("llama", torch.float32)
    trainee, calls, kept = trainee_of(model), [], {}
    per_step = 4 if kind == "replay" else 2

    def objective(micro):
        calls.append(micro)
        loss = trainee.objective(micro)
        if len(calls) <= 3 * per_step:
            return loss
        kept.setdefault("state", values(model))
        factor = {"loss": math.nan, "replay": math.inf}.get(kind)
        if factor is None:  # a finite loss whose gradient is not
            loss.register_hook(lambda grad: grad * math.inf)
            return loss
        late = kind == "replay" and len(micro.members) == 1
        return loss * factor if late or kind == "loss" else loss

    place = Checkpoint(tmp_path / "checkpoint.safetensors", {}, 100)
    with pytest.raises(NonFiniteError) as caught:
        train(
            replace(trainee, objective=objective), batches_of(settings), settings, replay=general, checkpoint=place,
            progress=False,
        )  # fmt: skip
    words = {"loss": "got loss nan", "gradient": "gradient norm", "replay": "loss of the general data inf"}[kind]
    rows = ", ".join(map(str, sorted(examples_of().rows[batches_of(settings).chosen(3)])))
    for text in ("step 4 of 9", words, f"rows {rows}", "state after step 3", str(place.path), "Lower lr"):
        assert text in str(caught.value)
    assert same(values(model), kept["state"]) and all(value.grad is None for value in model.parameters())
    saved = place.load()
    assert saved.values["step"] == 3 and same(
        saved.part("state"), {k: v for k, v in values(model).items() if k in saved.part("state")}
    )


@pytest.mark.parametrize("every", [2, 9, None])
def test_an_update_that_spoils_the_values_is_taken_back_where_a_checkpoint_is(tmp_path, every):
    """Finite losses and gradients, and a step that gives an infinite weight: seen at the next loss."""
    settings = settings_of(steps=9, schedule="constant", warmup=0.0)
    model, seen = tiny_models.make("llama", torch.float32), []

    class Spoils(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            seen.append(values(model))
            if len(seen) == 5:
                self.param_groups[0]["params"][3].data[0, 0] = math.inf

    place = None if every is None else Checkpoint(tmp_path / "checkpoint.safetensors", {}, every)
    if every == 9:  # of an earlier run, which is not to be gone back to
        place.save({"step": 1}, {})
    with pytest.raises(NonFiniteError, match="step 6 of 9: expected finite numbers, got loss nan") as caught:
        train(trainee_of(model, Spoils), batches_of(settings), settings, checkpoint=place, resume=False, progress=False)
    if every == 2:
        assert "update of step 5 was too large: the model holds the state after step 4 again" in str(caught.value)
        assert same(values(model), seen[3])
        assert place.load().values["step"] == 4
    else:
        assert "the model holds values that are not finite, load it again" in str(caught.value)


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
