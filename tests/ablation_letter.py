"""Ablation by the letter: hooks written for the tests, one prompt at a time, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from literal_oracle import PATHS, rewritten, written
from tiny_models import pad, prompts

HEADS, MLPS = [(0, 1), (0, 2), (2, 0)], [1]
SIDES = ["none", "left", "right"]
Model = torch.nn.Module
Rows = list[list[int]]


def rows(lengths: tuple[int, ...] = (7, 5, 9), seed: int = 1) -> Rows:
    return [p.clean for p in prompts(lengths, seed=seed)]


def given(side: str, ragged: bool = True) -> tuple[Rows, torch.Tensor, torch.Tensor | None]:
    tokens = rows((7, 5, 9, 5, 7, 9) if ragged and side != "none" else (7, 7, 7))
    return tokens, *pad(tokens, side)


# --- the letter ---------------------------------------------------------------------------------------------------


def blocks(model: Model) -> list[Model]:
    return list(model.get_submodule(PATHS[model.config.model_type][0]))


def projection(model: Model, layer: int) -> Model:
    return blocks(model)[layer].get_submodule(PATHS[model.config.model_type][1])


def mlp_write(model: Model, layer: int) -> Model:
    block = blocks(model)[layer]
    return block.get_submodule("post_feedforward_layernorm" if hasattr(block, "post_feedforward_layernorm") else "mlp")


def width(model: Model) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


@contextmanager
def letter(model: Model, heads: dict[tuple[int, int], Any], mlps: dict[int, Any] | None = None) -> Iterator[None]:
    """Write values (0 or what broadcasts to [1, pos, size]) over slices of z and over MLP outputs."""
    with ExitStack() as stack:
        for (layer, head), value in heads.items():
            part = slice(head * width(model), (head + 1) * width(model))

            def on_z(_module: Any, args: Any, part: slice = part, value: Any = value) -> Any:
                z = args[0].clone()
                z[:, :, part] = value
                return (z, *args[1:])

            stack.callback(projection(model, layer).register_forward_pre_hook(on_z).remove)
        for layer, value in (mlps or {}).items():

            def on_mlp(_module: Any, _args: Any, output: Any, value: Any = value) -> Any:
                return rewritten(output, torch.zeros_like(written(output)) + value)

            stack.callback(mlp_write(model, layer).register_forward_hook(on_mlp).remove)
        yield


def run(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits [pos, vocab] of one prompt without padding and without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def seen(model: Model, tokens: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """z [pos, head, d_head] and MLP writes [pos, d_model] of one prompt, per layer."""
    z, writes = [], []
    n = model.config.num_attention_heads
    with ExitStack() as stack:
        for layer in range(len(blocks(model))):
            hook = projection(model, layer).register_forward_pre_hook(
                lambda _, args: z.append(args[0][0].reshape(-1, n, width(model)))
            )
            stack.callback(hook.remove)
            hook = mlp_write(model, layer).register_forward_hook(
                lambda _, __, output: writes.append(written(output)[0].clone())  # Falcon adds to it in place
            )
            stack.callback(hook.remove)
        run(model, tokens)
    return z, writes


def logits(model: Model, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits [batch, pos, vocab] of a padded batch."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def real(values: torch.Tensor, tokens: Rows, side: str) -> list[torch.Tensor]:
    """What belongs to real tokens, per prompt."""
    return [v[len(v) - len(t) :] if side == "left" else v[: len(t)] for v, t in zip(values, tokens, strict=True)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=2e-12)


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2)
