"""Ablation by the letter: one forward pass of the Hugging Face model per set and prompt, with plain hooks.

Shares no code with pyarith; each prompt runs alone and without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import literal_oracle
import numpy as np
import tiny_models
import torch
from tiny_models import make, pad, prompts
from true_fp64 import true_fp64

import pyarith as pa

QUIET: dict[str, Any] = {"progress": False, "verify": 0}
EXACT = {"rtol": 1e-12, "atol": 2e-12}
LENGTHS = (7, 5, 7, 9, 5, 9)
POSITIONS = ("all", "end")
# heads of one and of several layers, an MLP alone, before, beside and behind heads, a whole layer, the last layer
SETS: list[Any] = [
    [(0, 1), (2, 3)],
    [(0, 0), (0, 2), (1, 3), (2, 0)],
    ("mlp", 0),
    [("mlp", 1), ("mlp", 2)],
    [(1, 1), ("mlp", 1)],
    [(0, 3), ("mlp", 1)],
    [("mlp", 0), (1, 2), (2, 1)],
    [(1, 0), (1, 1), (1, 2), (1, 3)],
    [(2, 2), ("mlp", 2)],
    (2, 0),
    [(2, 0), (2, 3)],
]


def rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.clean) for p in prompts(lengths, seed=seed))


def short(lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple((5 + 11 * i + 3 * p) % tiny_models.VOCAB for p in range(n)) for i, n in enumerate(lengths))


def given(ids: tuple[tuple[int, ...], ...], side: str = "left") -> dict[str, Any]:
    tokens, mask = pad([list(row) for row in ids], side)
    return {"input_ids": tokens, "attention_mask": mask, "answers": answers(len(ids))}


def answers(n: int) -> torch.Tensor:
    return torch.arange(n) * 7 % tiny_models.VOCAB


# the literal run


def ablated_logits(
    model: torch.nn.Module, ids: tuple[int, ...], row: int, targets: list[Any], baseline: Any, where: str
) -> torch.Tensor:
    """Next-token logits [vocab] of one prompt with the targets replaced by hooks, one forward pass of the model."""
    sites = literal_oracle.Sites.of(model)
    heads = None if isinstance(baseline, pa.ZeroAblation) else baseline.heads
    mlps = None if isinstance(baseline, pa.ZeroAblation) else baseline.mlps
    place = [len(ids) - 1] if where == "end" else list(range(len(ids)))

    def picked(values: torch.Tensor | None, layer: int, width: int) -> torch.Tensor:
        """[pos, width] of this prompt and layer."""
        if values is None:
            return torch.zeros(len(place), width, dtype=torch.float64)
        if isinstance(baseline, pa.ResampleAblation):
            return values[layer, row, place].flatten(1)
        return values[layer, place if baseline.over == "batch" else [0] * len(place)].flatten(1)

    def on_z(layer: int, chosen: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> Any:
            z = args[0].clone()
            d_head = z.shape[-1] // sites.n_heads
            new = picked(heads, layer, z.shape[-1]).to(z.dtype)
            for head in chosen:
                at = slice(head * d_head, (head + 1) * d_head)
                z[0, place, at] = new[:, at]
            return (z, *args[1:])

        return hook

    def on_write(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            write = literal_oracle.written(output).clone()
            write[0, place] = picked(mlps, layer, write.shape[-1]).to(write.dtype)
            return literal_oracle.rewritten(output, write)

        return hook

    blocks = model.get_submodule(literal_oracle.PATHS[model.config.model_type][0])
    with ExitStack() as stack, torch.no_grad():
        for layer in {layer for layer, _ in targets if layer != "mlp"}:
            chosen = [head for found, head in targets if found == layer]
            stack.callback(sites.outs[layer].register_forward_pre_hook(on_z(layer, chosen)).remove)
        for layer in [layer for kind, layer in targets if kind == "mlp"]:
            write = getattr(blocks[layer], "post_feedforward_layernorm", sites.mlps[layer])
            stack.callback(write.register_forward_hook(on_write(layer)).remove)
        positions = torch.arange(len(ids))[None]
        return model(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0, -1]


def as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, tuple) else value


def single_heads(model: torch.nn.Module) -> list[Any]:
    return [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(4)]


def reference(
    model: torch.nn.Module, ids: tuple[tuple[int, ...], ...], sets: list[Any], baseline: Any, where: str
) -> torch.Tensor:
    """Full logits [1 + set, batch, vocab]; the first is the intact model."""
    return torch.stack(
        [
            torch.stack([ablated_logits(model, p, i, as_list(s), baseline, where) for i, p in enumerate(ids)])
            for s in [[], *sets]
        ]
    )


def make_baseline(kind: str, model: torch.nn.Module, ids: tuple[tuple[int, ...], ...]) -> Any:
    tokens, mask = pad([list(row) for row in ids], "right")
    if kind == "zero":
        return pa.ZeroAblation()
    if kind == "mean":
        return pa.MeanAblation.from_inputs(model, tokens, mask)
    if kind == "mean-per-position":
        others = torch.tensor([list(row) for row in rows((9, 9, 9, 9), seed=8)])
        return pa.MeanAblation.from_inputs(model, others, over="batch")
    return pa.ResampleAblation.from_inputs(model, tokens, mask)


BASELINES = ("zero", "mean", "mean-per-position", "resample")


@cache
def truth(name: str, kind: str, where: str, attn: str = "eager") -> tuple[Any, torch.Tensor]:
    """(baseline, logits [1 + set, batch, vocab]) of every head alone and then SETS."""
    model = make(name, attn=attn)
    with true_fp64():
        baseline = make_baseline(kind, model, rows())
        return baseline, reference(model, rows(), [*single_heads(model), *SETS], baseline, where)


def agree(result: Any, full: torch.Tensor, **tolerance: float) -> None:
    """Every logit is that of the literal run, which must not be trivial."""
    n = full.shape[1]
    found = full[:, torch.arange(n), answers(n)].double().numpy()
    assert np.abs(found[1:] - found[0]).max(1).min() > 1e-3, "a set without any effect tests nothing"
    np.testing.assert_allclose(result.logits, found[1:], **(tolerance or EXACT))
    np.testing.assert_allclose(result.clean_logits, found[0], **(tolerance or EXACT))
    np.testing.assert_allclose(result.identity_logits, found[0], **(tolerance or EXACT))
