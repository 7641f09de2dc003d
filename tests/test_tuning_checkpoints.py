"""Training runs that are interrupted, cannot be written, or stop being finite."""

from __future__ import annotations

import json
import math
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from tuning_runs import batches_of, examples_of, run, same, settings_of, trainee_of, values

from pyarith.errors import InputError, NonFiniteError, StorageError
from pyarith.tuning import loop
from pyarith.tuning.checkpoint import Checkpoint, write_whole
from pyarith.tuning.loop import train

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
