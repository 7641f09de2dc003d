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
    mlp: torch.Tensor  # what is added, after a norm of its own and a multiplier
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
    handles, m = [], getattr(model.config, "residual_multiplier", 1.0)
    for block in model.get_submodule(path):
        projection = block.get_submodule(out)
        writes = getattr(block, "post_feedforward_layernorm", block.get_submodule(mlp))
        handles += [
            projection.register_forward_pre_hook(lambda _, args: seen["z"].append(args[0][0, -1])),
            projection.register_forward_hook(lambda _, __, y: seen["attention"].append(y[0, -1])),
            writes.register_forward_hook(lambda _, __, y: seen["mlp"].append(m * written(y)[0, -1])),
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
    return Run(pre=pre, logits=output.logits[0, -1], parallel=is_parallel(model.config), **kept)


def is_parallel(config: Any) -> bool:
    if config.model_type == "falcon":
        return bool(config.new_decoder_architecture or config.parallel_attn)
    return config.model_type in ("phi", "gptj", "cohere", "cohere2") or getattr(config, "use_parallel_residual", False)


@cache
def runs(name: str, side: str) -> list[Run]:
    model = make(name)
    with true_fp64():
        return [plain_run(model, ids) for ids in rows("none" if side == "none" else "left")]


def given(side: str) -> dict[str, Any]:
    ids, mask = pad(rows(side), side)
    return {"prompts": ids, "attention_mask": mask, "answers": ANSWERS, "tokens_per_pass": 14}


def final_norm(model: Any) -> Any:
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next(getattr(model.base_model, name) for name in names if hasattr(model.base_model, name))


def logit_scale(model: Any) -> float:
    return getattr(model.config, "logit_scale", 1.0) / getattr(model.config, "logits_scaling", 1.0)


def capped(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """The model's logits, of scaled ones."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
