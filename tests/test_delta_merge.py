"""``pyarith merge``: a base and a delta become one checkpoint, or nothing is written."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import tiny_models
import torch
from deltas import HEADS, logits, same, tuned
from tokenizers_for_tests import byte_level
from typer.testing import CliRunner

from pyarith.cli import app
from pyarith.tuning import read_delta

pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_level()
    tiny_models.make("llama", torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Any, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def merge(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], prog_name="pyarith")


def refused(done: Any, *words: str) -> None:
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    assert all(word in done.stderr for word in ("pyarith: error: ", *words)), done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merges_in_the_dtype_of_the_delta(dtype, checkpoint, tmp_path):
    from transformers import AutoTokenizer

    model = load(checkpoint, dtype=dtype)
    trained = tuned(model, tmp_path / "delta", HEADS, [])
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()  # of a run that was killed
    (tmp_path / ".out.partial" / "old").write_text("")
    done = merge(checkpoint, tmp_path / "delta", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    merged = load(tmp_path / "out")
    assert same(merged, trained) and torch.equal(logits(merged), logits(model))
    name = str(dtype).removeprefix("torch.")
    total, part = sum(p.numel() for p in model.parameters()), read_delta(tmp_path / "delta").n_parameters
    fingerprint = read_delta(tmp_path / "delta").base.fingerprint
    assert done.stdout.splitlines()[:2] == [
        f"{checkpoint} in {name}, fingerprint {fingerprint[:19]}: the base of {tmp_path / 'delta'}",
        f"Merged 3 heads and 0 MLPs in layers 1-2: {part:,} of {total:,} parameters replaced ({part / total:.2%})",
    ]
    assert done.stdout.splitlines()[2].startswith(f"Wrote {tmp_path / 'out'} (")
    text = "12 + 7 = "
    again, first = (AutoTokenizer.from_pretrained(folder)(text) for folder in (tmp_path / "out", checkpoint))
    assert again["input_ids"] == first["input_ids"]
    files = list((tmp_path / "out").iterdir())
    assert "old" not in [file.name for file in files] and not (tmp_path / ".out.partial").exists()
    assert len({file.stat().st_mode for file in files}) == 1


def test_what_cannot_be_merged_writes_nothing(checkpoint, tmp_path):
    tuned(load(checkpoint), tmp_path / "delta", [(2, 1)], [1])
    out = tmp_path / "out"
    refused(merge(checkpoint, tmp_path / "nowhere", "--out", out), "folder: expected a delta with delta.json")
    refused(merge(tmp_path / "nothing", tmp_path / "delta", "--out", out), "MODEL: no folder")
    assert merge(checkpoint, tmp_path / "delta", "--out", out).exit_code == 0
    refused(merge(checkpoint, tmp_path / "delta", "--out", out), "out: expected a new or an empty folder", str(out))
    refused(merge(checkpoint, tmp_path / "delta", "--out", checkpoint), "out: expected a new or an empty folder")
    (tmp_path / "file").write_text("")
    refused(merge(checkpoint, tmp_path / "delta", "--out", tmp_path / "file"), "out: expected a new or an empty folder")
    refused(
        merge(out, tmp_path / "delta", "--out", tmp_path / "twice"),
        "model: expected the base of the delta",
        "layers.2.self_attn.q_proj.weight",
        "holds the values of this delta already",
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["delta", "file", "out"]


@pytest.mark.parametrize("where", ["tokenizer", "rename"])
def test_a_full_disk_leaves_nothing_behind(where, checkpoint, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    tuned(load(checkpoint), tmp_path / "delta", [(2, 1)], [])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    holder, name = {"tokenizer": (PreTrainedTokenizerBase, "save_pretrained"), "rename": (os, "fsync")}[where]
    monkeypatch.setattr(holder, name, full)
    done = merge(checkpoint, tmp_path / "delta", "--out", tmp_path / "out")
    refused(done, "out: cannot write", "No space left on device", "free space or choose another place")
    assert [file.name for file in tmp_path.iterdir()] == ["delta"]
