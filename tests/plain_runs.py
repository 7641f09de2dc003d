"""Streams and writes at END by plain hooks, one unpadded prompt at a time; shares no code with pyarith."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from literal_oracle import PATHS, written
from single_thread import one_thread  # noqa: F401
from tiny_models import make, pad, prompts
from true_fp64 import true_fp64

LENGTHS = (7, 5, 9, 7)
ANSWERS = torch.tensor([11, 90, 3, 42])
OPERANDS = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIDES = ["none", "left", "right"]


def rows(side: str) -> list[list[int]]:
    return [prompt.clean for prompt in prompts((9, 9, 9, 9) if side == "none" else LENGTHS)]


@dataclass
class Run:
    """One prompt at END: [layer, d_model] streams, writes, the z of heads, and the model's own logits."""

    pre: torch.Tensor
    post: torch.Tensor
    attention: torch.Tensor  # output of the projection, before a norm of its own
    mlp: torch.Tensor  # what is added, after a norm of its own
    z: torch.Tensor
    logits: torch.Tensor
    parallel: bool

    @property
    def mlp_in(self) -> torch.Tensor:
        return self.pre if self.parallel else self.post - self.mlp


def plain_run(model: Any, ids: list[int]) -> Run:
    kind = model.config.model_type
    path, out, mlp = PATHS[kind]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in ("attention", "z", "mlp", "post")}
    handles = []
    for block in model.get_submodule(path):
        projection = block.get_submodule(out)
        writes = block.post_feedforward_layernorm if kind == "gemma2" else block.get_submodule(mlp)
        handles += [
            projection.register_forward_pre_hook(lambda _, args: seen["z"].append(args[0][0, -1])),
            projection.register_forward_hook(lambda _, __, y: seen["attention"].append(y[0, -1])),
            writes.register_forward_hook(lambda _, __, y: seen["mlp"].append(written(y)[0, -1])),
            block.register_forward_hook(
                lambda _, __, y: seen["post"].append((y[0] if isinstance(y, tuple) else y)[0, -1])
            ),
        ]
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    kept = {name: torch.stack(values) for name, values in seen.items()}
    pre = torch.stack([output.hidden_states[0][0, -1], *kept["post"][:-1]])
    parallel = kind == "gpt_neox" and model.config.use_parallel_residual
    return Run(pre=pre, logits=output.logits[0, -1], parallel=parallel, **kept)


@cache
def runs(name: str, side: str) -> list[Run]:
    model = make(name)
    with true_fp64():
        return [plain_run(model, ids) for ids in rows("none" if side == "none" else "left")]


def given(side: str) -> dict[str, Any]:
    ids, mask = pad(rows(side), side)
    return {"prompts": ids, "attention_mask": mask, "answers": ANSWERS, "tokens_per_pass": 14}


def final_norm(model: Any) -> Any:
    decoder = model.base_model
    return next(getattr(decoder, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, name))


def capped(model: Any, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
