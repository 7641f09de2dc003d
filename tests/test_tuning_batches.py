"""Which examples go into which step, padded or packed."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from single_thread import one_thread  # noqa: F401
from true_fp64 import true_fp64

from pyarith.errors import InputError, UnsupportedModelError
from pyarith.tuning import Examples
from pyarith.tuning.batches import IGNORED, Batches, check_isolated, micro_batch, order


def examples_of(lengths, seed=0, vocab=tiny_models.VOCAB):
    """Random tokens, the second half of each in the loss."""
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(0, vocab, length) for length in lengths)
    trained = tuple(np.arange(length) >= max(1, length // 2) for length in lengths)
    return Examples(ids, trained, np.arange(1, len(ids) + 1))


LENGTHS = (5, 9, 3, 7, 2, 6, 4, 8, 5, 3)


def members(batches, step):
    return [one for micro in batches.at(step) for row in micro.members for one in row]


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    batches = Batches(examples_of(LENGTHS), batch_size=4, rows=2, seed=3)
    assert batches.steps_per_epoch == 3
    epochs = [[sorted(members(batches, 3 * epoch + step)) for step in range(3)] for epoch in range(3)]
    assert [list(map(len, epoch)) for epoch in epochs] == [[4, 4, 2]] * 3
    assert all(sorted(chain(*epoch)) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = Batches(examples_of(LENGTHS, seed=5), batch_size=4, rows=8, seed=3, packed=20)
    assert [sorted(members(again, step)) for step in range(9)] == list(chain(*epochs)), "the same for every arm"
    for other in (Batches(examples_of(LENGTHS), 4, 2, seed=4), Batches(examples_of(LENGTHS), 4, 2, seed=3, stream=1)):
        assert [sorted(members(other, step)) for step in range(9)] != list(chain(*epochs))
    with pytest.raises(ValueError, match="read-only"):
        order(10, 3, 0)[0] = 1


def test_rows_are_padded_on_the_right_with_positions_and_labels():
    examples = examples_of((3, 5))
    micro = micro_batch(examples, [(1,), (0,)])
    assert micro.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert micro.input_ids[1, :3].tolist() == examples.ids[0].tolist()
    assert micro.labels[1].tolist() == [IGNORED, *examples.ids[0][1:].tolist(), IGNORED, IGNORED]
    assert micro.labels[0].tolist() == [IGNORED, IGNORED, *examples.ids[1][2:].tolist()]


def test_micro_batches_hold_examples_of_like_length():
    batches = Batches(examples_of(LENGTHS), batch_size=10, rows=5)
    widths = [micro.input_ids.shape for micro in batches.at(0)]
    assert widths == [(5, 9), (5, 5)]


def test_packed_rows_restart_positions_and_hold_what_fits():
    examples = examples_of(LENGTHS)
    batches = Batches(examples, batch_size=10, rows=2, packed=12)
    micros = batches.at(0)
    lengths = [sum(LENGTHS[one] for one in row) for micro in micros for row in micro.members]
    assert max(lengths) <= 12 and len(lengths) == 5 and sum(lengths) == sum(LENGTHS)
    for micro in micros:
        assert micro.attention_mask is None and len(micro.members) <= 2
        for row, inside in enumerate(micro.members):
            starts = [0, *np.cumsum([LENGTHS[one] for one in inside])]
            assert (micro.position_ids[row, starts[:-1]] == 0).all()
            for one, start in zip(inside, starts, strict=False):
                place = slice(start, start + LENGTHS[one])
                assert micro.input_ids[row, place].tolist() == examples.ids[one].tolist()
                assert micro.position_ids[row, place].tolist() == list(range(LENGTHS[one]))
            assert micro.position_ids[row, starts[-1] :].tolist() == list(range(micro.input_ids.shape[1] - starts[-1]))
            assert int((micro.labels[row] != IGNORED).sum()) == sum(examples.targets[one] for one in inside)
    with pytest.raises(InputError, match="packed: expected at least 9 tokens"):
        Batches(examples, 4, 2, packed=8)


def total_loss(model, micros):
    """Sum of the cross-entropy over all labels, by the full logits."""
    total = 0.0
    for micro in micros:
        logits = model(**micro.inputs(), use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, micro.labels[:, 1:].flatten(), reduction="sum"))
    return total


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "eager") for name in tiny_models.NAMES), *((name, "sdpa") for name in ("llama-gqa2", "mistral", "gpt2"))],
)
@torch.no_grad()
def test_packing_and_padding_are_exact_in_every_family(name, attention):
    """In fp64: packed, padded, and each example alone through the model's own loss."""
    model, examples = tiny_models.make(name, attn=attention), examples_of(LENGTHS)
    with true_fp64():
        alone = 0.0
        for ids, trained in zip(examples.ids, examples.trained, strict=True):
            labels = torch.tensor(np.where(trained, ids, IGNORED))[None]
            alone += float(model(input_ids=torch.tensor(ids)[None], labels=labels).loss) * trained.sum()
        for packed in (None, 12, 40):
            found = total_loss(model, Batches(examples, 10, 2, packed=packed).at(0))
            assert found == pytest.approx(alone, rel=1e-12), packed
        check_isolated(model, model, examples, 2)


def test_models_that_do_not_keep_examples_apart_are_refused():
    model, examples = tiny_models.make("llama", torch.float32), examples_of(LENGTHS)

    def leaking(**inputs):  # as an attention kernel that reads no positions
        return model(**{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})

    def counting(**inputs):  # as a model that counts positions by itself
        return model(**{**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None]})

    def whispering(**inputs):  # as a kernel whose mask is finite: too little to be seen beside rounding
        found = model(**inputs)
        first = inputs["input_ids"][:, :1, None]
        return SimpleNamespace(logits=found.logits + 1e-6 * first * (inputs["attention_mask"] is None))

    def shifting(**inputs):  # nothing leaks, and the numbers are others than those of an example alone
        return SimpleNamespace(logits=model(**inputs).logits * (1.5 if inputs["attention_mask"] is None else 1.0))

    check_isolated(model, model, examples, 1)
    for broken in (leaking, counting, whispering, shifting):
        with pytest.raises(UnsupportedModelError, match=r"packing: LlamaForCausalLM with attention 'eager' does not"):
            check_isolated(model, broken, examples, 2)

    def first_row_only(**inputs):  # as flash attention, which tells packed examples apart in a single row only
        return (model if len(inputs["input_ids"]) == 1 else leaking)(**inputs)

    check_isolated(model, first_row_only, examples, 1)
    with pytest.raises(UnsupportedModelError, match="micro_batch_size=1"):
        check_isolated(model, first_row_only, examples, 2)
