"""Path patching by the letter: one full forward of the Hugging Face model per sender, with hooks.

Shares no code with pyarith. Each prompt runs alone and without padding, so that padding, batching and
shared prefixes of the library are measured against runs that have none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# model_type -> (list of blocks, attention output projection in a block, MLP in a block)
PATHS = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp"),
    "mistral": ("model.layers", "self_attn.o_proj", "mlp"),
    "qwen2": ("model.layers", "self_attn.o_proj", "mlp"),
    "qwen3": ("model.layers", "self_attn.o_proj", "mlp"),
    "gemma2": ("model.layers", "self_attn.o_proj", "mlp"),
    "gemma3_text": ("model.layers", "self_attn.o_proj", "mlp"),
    "olmo2": ("model.layers", "self_attn.o_proj", "mlp"),
    "granite": ("model.layers", "self_attn.o_proj", "mlp"),
    "cohere": ("model.layers", "self_attn.o_proj", "mlp"),
    "cohere2": ("model.layers", "self_attn.o_proj", "mlp"),
    "stablelm": ("model.layers", "self_attn.o_proj", "mlp"),
    "phi": ("model.layers", "self_attn.dense", "mlp"),
    "gptj": ("transformer.h", "attn.out_proj", "mlp"),
    "falcon": ("transformer.h", "self_attention.dense", "mlp"),
    "phi3": ("model.layers", "self_attn.o_proj", "mlp"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), ("model.layers", "self_attn.o_proj", "mlp")),
}


def written(output: Any) -> torch.Tensor:
    """What an MLP writes; a mixture of experts may give its routing beside it."""
    return output[0] if isinstance(output, tuple) else output


def rewritten(output: Any, value: torch.Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@dataclass
class Sites:
    """The hooked modules of one model, in layer order."""

    outs: list[torch.nn.Module]
    mlps: list[torch.nn.Module]
    n_heads: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Sites:
        blocks, out, mlp = PATHS[model.config.model_type]
        layers = list(model.get_submodule(blocks))
        return cls(
            [layer.get_submodule(out) for layer in layers],
            [layer.get_submodule(mlp) for layer in layers],
            model.config.num_attention_heads,
        )


@dataclass
class Run:
    """Next-token logits at END, and what every site gave at all positions."""

    logits: torch.Tensor  # [vocab]
    z: list[torch.Tensor]  # per layer [1, pos, n_heads * d_head]
    mlp: list[torch.Tensor]  # per layer [1, pos, d_model]


@contextmanager
def hooked(
    sites: Sites, z: dict[int, torch.Tensor] | None = None, mlp: dict[int, torch.Tensor] | None = None
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Record z and MLP outputs; where ``z`` or ``mlp`` names a layer, put that value there instead."""
    seen_z: list[torch.Tensor] = []
    seen_mlp: list[torch.Tensor] = []

    def on_z(layer: int) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> Any:
            seen_z.append(args[0].detach().clone())
            return (z[layer], *args[1:]) if z and layer in z else None

        return hook

    def on_mlp(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> Any:
            seen_mlp.append(written(output).detach().clone())
            # a copy: Falcon adds to it in place
            return rewritten(output, mlp[layer].clone()) if mlp and layer in mlp else None

        return hook

    with ExitStack() as stack:
        for layer, (out, block_mlp) in enumerate(zip(sites.outs, sites.mlps, strict=True)):
            stack.callback(out.register_forward_pre_hook(on_z(layer)).remove)
            stack.callback(block_mlp.register_forward_hook(on_mlp(layer)).remove)
        yield seen_z, seen_mlp


def forward(model: torch.nn.Module, ids: list[int], **patches: Any) -> Run:
    """One prompt through the whole model."""
    sites = Sites.of(model)
    tokens = torch.tensor([ids])
    with torch.no_grad(), hooked(sites, **patches) as (z, mlp):
        positions = torch.arange(len(ids))[None]
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return Run(logits[0, -1], z, mlp)


def patch_head(
    model: torch.nn.Module, ids: list[int], clean: Run, corrupted: Run, layer: int, head: int, *,
    mlps: str = "recomputed", where: str = "end",
) -> torch.Tensor:  # fmt: skip
    """Logits at END with one head's z taken from the corrupted run and all other heads frozen at clean z."""
    n_heads = Sites.of(model).n_heads
    z = {i: value.clone() for i, value in enumerate(clean.z)}
    d_head = z[layer].shape[-1] // n_heads
    place = slice(-1, None) if where == "end" else slice(None)
    columns = slice(head * d_head, (head + 1) * d_head)
    z[layer][:, place, columns] = corrupted.z[layer][:, place, columns]
    frozen = dict(enumerate(clean.mlp)) if mlps == "frozen" else {}
    return forward(model, ids, z=z, mlp=frozen).logits


def patch_mlp(
    model: torch.nn.Module, ids: list[int], clean: Run, corrupted: Run, layer: int, *,
    mlps: str = "recomputed", where: str = "end",
) -> torch.Tensor:  # fmt: skip
    """The same with an MLP's output as sender. A norm after the MLP acts per position, so before it will do."""
    place = slice(-1, None) if where == "end" else slice(None)
    sender = clean.mlp[layer].clone()
    sender[:, place] = corrupted.mlp[layer][:, place]
    outputs = dict(enumerate(clean.mlp)) if mlps == "frozen" else {}
    outputs[layer] = sender
    return forward(model, ids, z=dict(enumerate(clean.z)), mlp=outputs).logits


@dataclass
class Oracle:
    """Full next-token logits of every run: any answer, foil or log-probability can be read from them."""

    heads: np.ndarray  # [n_layers, n_heads, batch, vocab]
    mlps: np.ndarray  # [n_layers, batch, vocab]
    clean: np.ndarray  # [batch, vocab]
    corrupted: np.ndarray  # [batch, vocab]

    @property
    def answers(self) -> np.ndarray:
        """The token the clean model prefers: its logit is positive, so relative effects exist."""
        return self.clean.argmax(-1)

    def at(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Logits of one token per prompt: heads [n_layers, n_heads, batch], MLPs, clean, corrupted."""
        rows = np.arange(len(self.clean))
        return (
            self.heads[:, :, rows, tokens],
            self.mlps[:, rows, tokens],
            self.clean[rows, tokens],
            self.corrupted[rows, tokens],
        )

    def effects(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean relative effects of heads and MLPs (in exact arithmetic the identity row is the clean run)."""
        heads, mlps, clean, _ = self.at(tokens)
        good = clean > 0
        head = (heads[..., good] / clean[good] - 1).mean(-1)
        return head, (mlps[..., good] / clean[good] - 1).mean(-1)


def path_patch(model: torch.nn.Module, pairs: list[Any], *, mlps: str = "recomputed", where: str = "end") -> Oracle:
    """Every head and MLP of every layer as sender, for pairs with ``.clean`` and ``.corrupted`` id lists."""
    sites = Sites.of(model)
    heads, mlp_rows, cleans, corrupteds = [], [], [], []
    for pair in pairs:
        clean, corrupted = forward(model, pair.clean), forward(model, pair.corrupted)
        how = {"mlps": mlps, "where": where}
        heads.append([
            [patch_head(model, pair.clean, clean, corrupted, layer, head, **how) for head in range(sites.n_heads)]
            for layer in range(len(sites.outs))
        ])  # fmt: skip
        mlp_rows.append(
            [patch_mlp(model, pair.clean, clean, corrupted, layer, **how) for layer in range(len(sites.mlps))]
        )
        cleans.append(clean.logits)
        corrupteds.append(corrupted.logits)

    def stack(rows: Any) -> torch.Tensor:
        return torch.stack([stack(row) if isinstance(row, list) else row for row in rows])

    return Oracle(
        stack(heads).movedim(0, 2).double().numpy(),
        stack(mlp_rows).movedim(0, 1).double().numpy(),
        stack(cleans).double().numpy(),
        stack(corrupteds).double().numpy(),
    )
